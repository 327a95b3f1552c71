"""What a sweep may change: ranges and choices of options, as the command line writes them."""

import ast
import dataclasses
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from alexnet_jax.config import check_option, flatten, unknown_key_message
from alexnet_jax.errors import InputError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

# What a sweep decides for itself.
_OWN = ("eval.test", "data.test_split")


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both among them; evenly spread, or their logarithms are.

    Attributes:
        key: "section.key" of the option.
        low: An int if the option is one, else a float.
        high: Likewise.
        log: Whether the logarithms are spread evenly.
    """

    key: str
    low: float
    high: float
    log: bool

    @property
    def distribution(self) -> "BaseDistribution":
        """As Optuna has it."""
        from optuna.distributions import FloatDistribution, IntDistribution

        if isinstance(self.low, int):
            return IntDistribution(self.low, int(self.high), log=self.log)
        return FloatDistribution(self.low, self.high, log=self.log)

    def __str__(self) -> str:
        return f"{self.key} from {self.low} to {self.high}{', log' * self.log}"


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of several values, written as on the command line.

    Attributes:
        key: "section.key" of the option.
        values: At least two.
    """

    key: str
    values: tuple[str, ...]

    @property
    def distribution(self) -> "BaseDistribution":
        """As Optuna has it."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.values)

    def __str__(self) -> str:
        return f"{self.key} one of {', '.join(self.values)}"


Space = Sequence[Range | Choice]


def parse_space(ranges: Sequence[str], choices: Sequence[str], config: ConfigDict) -> Space:
    """Reads what may change.

    Args:
        ranges: Each "KEY=LOW:HIGH" or "KEY=LOW:HIGH:log", with or without "config." before KEY.
        choices: Each "KEY=VALUE,VALUE", tuples in parentheses.
        config: Says what options there are, and of what type.

    Raises:
        InputError: One cannot be read, names no option, or has values that it cannot have; or
            there are none at all.
    """
    options = dict(flatten(config))
    space: list[Range | Choice] = []
    for flag, given in [("--range", r) for r in ranges] + [("--choice", c) for c in choices]:
        key, equals, text = given.partition("=")
        key = key.lstrip("-").removeprefix("config.")
        if not equals or not text:
            example = "optimizer.learning_rate=1e-4:1e-2:log"
            if flag == "--choice":
                example = "optimizer.schedule=linear,cosine"
            raise InputError(f"{flag}={given} has no values; write it as {flag}={example}.")
        if key not in options:
            raise InputError(unknown_key_message(key, config))
        if key in _OWN:
            raise InputError(
                f"config.{key} cannot be searched: a sweep never opens the test set; measure the "
                "best trial on it afterwards."
            )
        if key in [one.key for one in space]:
            raise InputError(f"config.{key} is given twice; give it one range or choice.")
        read = _read_range if flag == "--range" else _read_choice
        space.append(read(key, text, options[key]))
    if not space:
        raise InputError(
            "nothing is to change; give at least one --range or --choice, such as "
            "--range=optimizer.learning_rate=1e-4:1e-2:log."
        )
    return space


def _read_range(key: str, text: str, default: Any) -> Range:
    match = re.fullmatch(r"([^:]+):([^:]+)(:log)?", text)
    if match is None or type(default) not in (int, float):
        raise InputError(
            f"--range={key}={text} is no range of numbers; write it as {key}=LOW:HIGH or "
            f"{key}=LOW:HIGH:log"
            + ("." if type(default) in (int, float) else f", or give --choice: {key} is no number.")
        )
    low, high = (_number(key, end, default) for end in match.groups()[:2])
    if not low < high:
        raise InputError(f"--range={key}={text} is empty; the first number must be the smaller.")
    if match[3] and low <= 0:
        raise InputError(f"--range={key}={text} has no logarithms; begin above 0, or leave :log.")
    return Range(key, low, high, log=bool(match[3]))


def _number(key: str, text: str, default: int | float) -> float:
    number: float
    try:
        number = int(text)
    except ValueError:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
    if math.isnan(number):
        raise InputError(f"--range={key}: {text!r} is no number.")
    if type(default) is float:
        number = float(number)
    check_option(key, number, default)
    return number


def _read_choice(key: str, text: str, default: Any) -> Choice:
    values = tuple(value.strip() for value in re.split(r",(?![^(]*\))", text))
    for value in values:
        check_option(key, _value(value, default), default)
    if len(set(values)) < 2 or len(set(values)) < len(values):
        raise InputError(f"--choice={key}={text} must name two values or more, each once.")
    return Choice(key, values)


def _value(text: str, default: Any) -> Any:
    """Reads a value as the command line would; text that is no such value stays text."""
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return float(value) if type(default) is float and type(value) is int else value
