"""The search space of a sweep: ranges and choices of options, as the command line writes them."""

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from ml_collections import ConfigDict

from alexnet_jax.config import declared_options
from alexnet_jax.errors import InputError
from alexnet_jax.options import Option, unknown_option

try:
    from optuna import distributions
except ImportError:
    raise InputError(
        'a sweep requires Optuna; install it: pip install "alexnet_jax[tune]".'
    ) from None

# "section.key" of each option that is searched.
Space: TypeAlias = Mapping[str, distributions.BaseDistribution]

# The sweep sets these itself.
_NOT_SEARCHED = ("eval.test", "data.test_split")

_EXAMPLES = {
    "--range": "optimizer.learning_rate=1e-4:1e-2:log",
    "--choice": "optimizer.schedule=linear,cosine",
}


def parse_space(ranges: Sequence[str], choices: Sequence[str], config: ConfigDict) -> Space:
    """Parses the flags --range and --choice.

    Args:
        ranges: Each "KEY=LOW:HIGH" or "KEY=LOW:HIGH:log", with or without "config." before KEY.
        choices: Each "KEY=VALUE,VALUE", tuples in parentheses; the values stay text.
        config: All options with values of their types.

    Raises:
        InputError: A flag is malformed, names an unknown option or a value that it cannot have, or
            there are no flags.
    """
    options = declared_options(config.model.name)
    space: dict[str, distributions.BaseDistribution] = {}
    for flag, given in [("--range", r) for r in ranges] + [("--choice", c) for c in choices]:
        key, _, text = given.partition("=")
        key = key.lstrip("-").removeprefix("config.")
        if not text:
            raise InputError(f"{flag}={given} has no values; write it as {flag}={_EXAMPLES[flag]}.")
        if key not in options:
            raise InputError(unknown_option(key, options))
        if key in _NOT_SEARCHED:
            raise InputError(
                f"config.{key} cannot be searched: a sweep never evaluates on the test set; "
                "evaluate the best trial on it afterwards."
            )
        if key in space:
            raise InputError(f"config.{key} is given twice; give it one range or choice.")
        parse = _parse_range if flag == "--range" else _parse_choice
        space[key] = parse(key, text, options[key])
    if not space:
        raise InputError(
            "no option is searched; give at least one --range or --choice, such as "
            f"--range={_EXAMPLES['--range']}."
        )
    return space


def _parse_range(key: str, text: str, option: Option) -> distributions.BaseDistribution:
    match = re.fullmatch(r"([^:]+):([^:]+)(:log)?", text)
    if option.type not in (int, float):
        raise InputError(f"--range={key}={text}: {key} is not a number; give --choice instead.")
    if match is None:
        raise InputError(
            f"--range={key}={text} is not a range of numbers; write it as {key}=LOW:HIGH or "
            f"{key}=LOW:HIGH:log."
        )
    low, high = (_parse_value(end, option.default) for end in match.groups()[:2])
    for end, value in zip(match.groups(), (low, high), strict=False):
        if type(value) not in (int, float):
            raise InputError(f"--range={key}: {end!r} is not a number.")
        option.validate(key, value)
    if not low < high:
        raise InputError(f"--range={key}={text} is empty; the first number must be the smaller.")
    if match[3] and low <= 0:
        raise InputError(
            f"--range={key}={text} has no logarithms; start above 0, or leave out :log."
        )
    if option.type is int:
        return distributions.IntDistribution(low, high, log=bool(match[3]))
    return distributions.FloatDistribution(low, high, log=bool(match[3]))


def _parse_choice(key: str, text: str, option: Option) -> distributions.BaseDistribution:
    values = [value.strip() for value in re.split(r",(?![^(]*\))", text)]
    for value in values:
        option.validate(key, _parse_value(value, option.default))
    if len(values) < 2 or len(set(values)) < len(values):
        raise InputError(f"--choice={key}={text} must name two values or more, each once.")
    return distributions.CategoricalDistribution(values)


def _parse_value(text: str, default: Any) -> Any:
    """Parses a value as the command line would; text that is no such value stays text."""
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return float(value) if type(default) is float and type(value) is int else value
