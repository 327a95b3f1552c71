"""Declarations of options: what a value may be, and what is said of another."""

import dataclasses
from typing import Literal

import pytest

from alexnet_jax.errors import InputError
from alexnet_jax.options import Section, option, options_of


@dataclasses.dataclass(frozen=True)
class Example(Section, section="example"):
    count: int = option(1, "A count.", at_least=1)
    seed: int = option(0, "A seed.", at_least=0, below=2**32, resumable=True)
    rate: float = option(0.5, "A rate.", above=0)
    share: float = option(0.5, "A share.", at_least=0, at_most=1)
    on: bool = option(True, "A switch.")
    kind: Literal["a", "b"] = option("a", "A kind.")
    sizes: tuple[int, ...] = option((1, 2), "Sizes.", at_least=1)
    pairs: tuple[tuple[str, float], ...] = option(
        (), "Pairs.", check=(lambda pair: pair[1] > 0, "a pattern and a positive number")
    )

    def check(self):
        if self.on and self.kind == "b":
            raise InputError("not both")


@dataclasses.dataclass(frozen=True)
class Other(Example, section="example"):
    count: int = 7


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("count", 0, "is 0; it must be at least 1."),
        ("count", True, "is True, a bool; it must be an int such as 1."),
        ("count", 2.0, "is 2.0, a float; it must be an int such as 1."),
        ("count", 2**31, f"is {2**31}; it must be at most {2**31 - 1}."),
        ("seed", 2**32, f"is {2**32}; it must be at least 0 and less than {2**32}."),
        ("rate", 0.0, "is 0.0; it must be greater than 0."),
        ("rate", 1e-60, "is 1e-60, in float32 0.0; it must be greater than 0 in float32, too."),
        ("rate", 1e39, "is 1e+39; it must be a finite number of at most 3.4e+38."),
        ("rate", float("nan"), "is nan; it must be a finite number of at most 3.4e+38."),
        ("rate", "1", "is '1', a str; it must be a float such as 0.5."),
        ("share", 1.5, "is 1.5; it must be between 0 and 1."),
        ("on", 1, "is 1, an int; it must be a bool such as True."),
        ("kind", "c", "is 'c'; it must be one of a, b."),
        ("kind", None, "is None, a NoneType; it must be a str such as 'a'."),
        ("sizes", (3, 0), "is (3, 0); each of its items must be at least 1."),
        ("sizes", [3], "is [3], a list; it must be a tuple such as (1, 2)."),
        ("sizes", (3, "a"), "[1] is 'a', a str; it must be an int such as 1."),
        ("pairs", (("a", 1.0), ("b",)), "[1] is ('b',); it must have 2 items."),
        ("pairs", (("a", 1.0), (3, 1.0)), "[1][0] is 3, an int; it must be a str."),
        ("pairs", (("a", -1),), "is (('a', -1),); each of its items must be a pattern and a "),
    ],
)
def test_a_wrong_value_is_rejected(name, value, says):
    with pytest.raises(InputError) as caught:
        Example(**{name: value})
    assert str(caught.value).startswith(
        f"config.example.{name}{'' if says[0] == '[' else ' '}{says}"
    )


def test_possible_values():
    Example(count=2**31 - 1, seed=2**32 - 1, rate=1, share=1.0, sizes=(), pairs=(("a", 1),))


def test_a_section_checks_what_is_wrong_only_together():
    with pytest.raises(InputError, match="not both"):
        Example(kind="b")


def test_a_subclass_inherits_the_declaration_and_changes_the_default():
    declared = options_of(Other)["count"]
    assert (declared.default, declared.at_least, declared.help) == (7, 1, "A count.")
    with pytest.raises(InputError, match=r"config\.example\.count is 0"):
        Other(count=0)


def test_the_range_in_words():
    allowed = {name: declared.allowed for name, declared in options_of(Example).items()}
    assert allowed == {
        "count": "at least 1",
        "seed": "at least 0 and less than 4294967296",
        "rate": "greater than 0",
        "share": "between 0 and 1",
        "on": "",
        "kind": "one of a, b",
        "sizes": "at least 1",
        "pairs": "a pattern and a positive number",
    }
