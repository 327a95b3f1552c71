"""Options: fields of frozen dataclasses, each with a default, a range and one line of help.

    @dataclass(frozen=True)
    class TrainConfig(Section, section="train"):
        epochs: int = option(20, "Passes over the training images.", at_least=1)

The annotation of the field is the type of the option, a `Literal` its choices. An instance is
always valid: it raises an InputError for a value of another type or out of range. The options of a
network are fields of its linen class.
"""

import dataclasses
import difflib
import operator
import struct
import typing
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal, TypeVar

from alexnet_jax.errors import InputError, show

T = TypeVar("T")

# A step computes in float32, where the smallest numbers are flushed to 0, and counts in int32.
_SMALLEST_FLOAT = 2.0**-126
_LARGEST_FLOAT = (2 - 2.0**-23) * 2.0**127
_LARGEST_INT = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Option:
    """The declaration of an option. The range is that of each item where it is a tuple.

    Attributes:
        default: Its default value.
        help: What it means, in one sentence.
        at_least: Smallest value.
        at_most: Largest value.
        above: Bound that is itself too small.
        below: Bound that is itself too large.
        check: A test for what bounds cannot say, and the values that pass it, in words that
            follow "it must be".
        resumable: Whether a run may resume with another value: it changes how fast the run is or
            where its data is, never what is computed.
        type: The annotation of its field.
    """

    default: Any
    help: str
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    check: tuple[Callable[[Any], bool], str] | None = None
    resumable: bool = False
    type: Any = None

    @property
    def allowed(self) -> str:
        """The values that it, or each of its items, may have: "at least 0"; "" for any."""
        item = typing.get_args(self.type)[0] if _origin(self.type) is tuple else self.type
        parts = [f"{word} {bound}" for word, bound, _ in self._bounds]
        if self.at_least is not None and self.at_most is not None:
            parts = [f"between {self.at_least} and {self.at_most}"]
        if _origin(item) is Literal:
            parts.append("one of " + ", ".join(map(str, typing.get_args(item))))
        if self.check:
            parts.append(self.check[1])
        return " and ".join(parts)

    @property
    def described(self) -> str:
        """Its meaning, with its range or choices."""
        allowed = dataclasses.replace(self, check=None).allowed
        return f"{self.help} ({allowed})" if allowed else self.help

    def validate(self, key: str, value: Any) -> None:
        """Rejects a value of another type or out of range; an int may stand for a float.

        Raises:
            InputError: Names the option by its `key`, its value, and what would be right.
        """
        _check_type(key, value, self.type, self.default)
        which = "each of its items" if isinstance(value, tuple) else "it"
        for item in value if isinstance(value, tuple) else (value,):
            rounded = _to_float32(item) if type(item) is float else item
            note, right = "", ""
            if not self._in_range(item):
                right = self.allowed
            elif type(item) is int and self.at_most is self.below is None and item > _LARGEST_INT:
                right = f"at most {_LARGEST_INT}"
            elif not self._in_range(rounded):
                note, right = f", in float32 {rounded!r}", f"{self.allowed} in float32, too"
            if right:
                raise InputError(f"config.{key} is {show(value)}{note}; {which} must be {right}.")

    def _in_range(self, item: Any) -> bool:
        within = all(holds(item, bound) for _, bound, holds in self._bounds)
        return within and (self.check is None or self.check[0](item))

    @property
    def _bounds(self) -> list[tuple[str, float, Callable[[Any, Any], bool]]]:
        bounds = [
            ("at least", self.at_least, operator.ge),
            ("greater than", self.above, operator.gt),
            ("at most", self.at_most, operator.le),
            ("less than", self.below, operator.lt),
        ]
        return [(word, bound, holds) for word, bound, holds in bounds if bound is not None]


def option(default: T, help: str, **declaration: Any) -> T:
    """Declares an option as a field of a dataclass: the arguments are those of `Option`."""
    declared = Option(default, help, **declaration)
    return dataclasses.field(default=default, metadata={"option": declared})


def fraction(default: float, help: str) -> float:
    """Declares an option that is at least 0 and less than 1."""
    return option(default, help, at_least=0, below=1)


def options_of(cls: type) -> dict[str, Option]:
    """Returns the options among the fields of a dataclass, such as a linen module, in their order.

    A subclass that only gives a field another default inherits the declaration.
    """
    found = {}
    for field in dataclasses.fields(cls):
        for base in cls.__mro__:
            declared = base.__dict__.get("__dataclass_fields__", {}).get(field.name)
            if declared is not None and "option" in declared.metadata:
                found[field.name] = dataclasses.replace(
                    declared.metadata["option"], default=field.default, type=declared.type
                )
                break
    return found


def check_options(instance: Any, section: str) -> None:
    """Rejects an instance of a dataclass whose options are of another type or out of range.

    Raises:
        InputError: Names the first option found wrong, its value, and what would be right.
    """
    for name, declared in options_of(instance.__class__).items():
        declared.validate(f"{section}.{name}".lstrip("."), getattr(instance, name))


class Section:
    """A section of the config, to be subclassed by a frozen dataclass; checked when it is made.

    Attributes:
        section: Its name, as in ``config.optimizer``; "" for the config itself.
    """

    section: ClassVar[str]

    def __init_subclass__(cls, section: str) -> None:
        cls.section = section

    def __post_init__(self) -> None:
        check_options(self, self.section)
        self.check()

    def check(self) -> None:
        """Raises an InputError for values that are valid alone and not together."""


# Other names of options, which are unlike ours.
_ALIASES = {"beta1": "b1", "beta2": "b2", "gamma": "step_factor", "precision": "dtype"}


def unknown_option(key: str, known: Iterable[str]) -> str:
    """Returns the message for an unknown option, with the known ones that were perhaps meant.

    Args:
        key: "section.name" of the unknown option.
        known: Those of the known ones.
    """
    shown = key if len(key) <= 80 else show(key)[1:-1]
    section, _, name = key.rpartition(".")
    likeness = {other: _likeness(name, other.rpartition(".")[2]) for other in known}
    best = max(likeness.values())
    near = [other for other in likeness if likeness[other] > max(0.6, best - 0.1)]
    near = [other for other in near if section and other.startswith(f"{section}.")] or near
    near = sorted(near, key=likeness.__getitem__, reverse=True)[:3]
    names = list(dict.fromkeys(other.partition(".")[0] for other in known if "." in other))
    alike = difflib.get_close_matches(section or name, names, n=1)
    if near:
        hint = f"did you mean {' or '.join(f'config.{other}' for other in near)}?"
    elif alike:
        options = [other for other in known if other.startswith(f"{alike[0]}.")]
        hint = f"the options of {alike[0]} are {', '.join(o.rpartition('.')[2] for o in options)}."
    else:
        hint = f"the sections are {', '.join(names)}."
    return f"unknown option config.{shown}; {hint}"


def _likeness(name: str, option: str) -> float:
    """Returns how likely an unknown name means an option: from 0 to 2, if it is the same word."""
    if option in (name, _ALIASES.get(name)):
        return 2.0
    words, ours = set(name.split("_")), option.split("_")
    if name == "".join(word[:1] for word in ours) or (len(name) > 2 and option.startswith(name)):
        return 1.0  # "lr" and "accum"
    in_common = len(words & set(ours)) / len(words | set(ours))
    alike = difflib.SequenceMatcher(None, name, option).ratio()
    return max(alike, 0.5 + in_common / 2 if in_common else 0.0)


def _origin(kind: Any) -> Any:
    return typing.get_origin(kind) or kind


def _check_type(key: str, value: Any, kind: Any, example: Any) -> None:
    wanted, kinds = _origin(kind), typing.get_args(kind)
    if wanted is Literal:
        wanted = type(kinds[0])
    if type(value) is not wanted and not (wanted is float and type(value) is int):
        like = "" if example is None else f" such as {example!r}"
        raise InputError(
            f"config.{key} is {show(value)}, {_a(type(value))}; it must be {_a(wanted)}{like}."
        )
    right = ""
    if wanted is float and not abs(value) <= _LARGEST_FLOAT:
        right = f"be a finite number of at most {_LARGEST_FLOAT:.1e}"
    elif _origin(kind) is Literal and value not in kinds:
        right = f"be one of {', '.join(map(str, kinds))}"
    elif wanted is tuple and kinds[-1] is not ... and len(kinds) != len(value):
        right = f"have {len(kinds)} items"
    if right:
        raise InputError(f"config.{key} is {show(value)}; it must {right}.")
    if wanted is tuple:
        for i, item in enumerate(value):
            item_kind = kinds[0] if kinds[-1] is ... else kinds[i]
            _check_type(f"{key}[{i}]", item, item_kind, example[0] if example else None)


def _to_float32(value: float) -> float:
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded if abs(rounded) >= _SMALLEST_FLOAT else 0.0


def _a(kind: type) -> str:
    return f"{'an' if kind.__name__[0] in 'aeiou' else 'a'} {kind.__name__}"
