"""The command line of training: --config, --workdir, and --config.section.name for each option.

ml_collections and absl parse it. Mistakes that they would answer with a traceback are found
before, and their own errors become sentences.
"""

import difflib
import itertools
import re
import shlex
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags
from ml_collections import ConfigDict, config_flags

from alexnet_jax.config import (
    SECTIONS,
    declared_options,
    flatten,
    known_configs,
    load_config,
)
from alexnet_jax.errors import InputError
from alexnet_jax.options import unknown_option

if TYPE_CHECKING:
    from alexnet_jax.distributed.initialize import ProcessFlags

USAGE = """\
Trains a network: alexnet-jax train --config=cifar10
or, which is the same, python -m alexnet_jax.main --config=cifar10

The same command resumes an interrupted run. Exit codes: 0 finished, 2 bad input, 3 the loss
diverged, 69 another process of the run is gone, 74 the end could not be saved, 75 interrupted and
saved, 130 stopped by Ctrl-C without saving.

  --config=CONFIG    a config file, or the name of one: cifar10
  --workdir=FOLDER   the run folder; by default runs/<name of the config file>
  --coordinator=HOST:PORT --num_processes=N --process_id=I
                     train in N processes (docs/scaling.md); I is from 0 to N-1, and the address
                     is that of process 0
"""


def parse(arguments: list[str]) -> tuple[ConfigDict, Path, "ProcessFlags"]:
    """Parses the command line.

    Args:
        arguments: Those of the process, with the program's name first.

    Returns:
        The config with its changes, the run folder, and the flags about other processes.

    Raises:
        InputError: The command line is wrong.
        SystemExit: It asks for help, which has been printed.
    """
    name, rest = _split_config(arguments)
    if any(re.fullmatch(r"--?(h|\?|help(short|full)?)", argument) for argument in rest):
        print(_help(name))
        sys.exit(0)
    from alexnet_jax.distributed.initialize import ProcessFlags  # imports JAX

    if name is None:
        raise InputError(f"--config is missing; {known_configs()}.")
    config = ConfigDict(load_config(name))  # a FrozenConfigDict takes no flags
    options = dict(flatten(config))
    for argument in rest:
        match = re.match(r"--?(?:no)?config\.([^=]*)", argument)
        if match and match[1] in config and match[1] not in options:
            raise InputError(
                f"config.{match[1]} is a section; set its options one by one, such as "
                f"--config.{next(key for key in options if key.startswith(f'{match[1]}.'))}=..."
            )
        if match and match[1] not in options:
            raise InputError(unknown_option(match[1], options))
    values = flags.FlagValues()  # absl's own belongs to the user's program
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    flags.DEFINE_string("coordinator", None, "", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "", flag_values=values)
    flags.DEFINE_integer("process_id", None, "", flag_values=values)
    stray = _parse(values, rest, config)
    if stray:
        raise InputError(f"unknown argument {stray[0]!r}; options begin with --.")
    if values.workdir == "":
        raise InputError("--workdir is empty; name a folder, or leave it out.")
    workdir = Path(values.workdir or Path("runs", Path(name.split(":", 1)[0]).stem))
    return (
        values.config,
        workdir,
        ProcessFlags(*(values[name].value for name in ProcessFlags._fields)),
    )


def _split_config(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Returns the value of --config, None without it, and the other arguments."""
    found: list[str] = []
    rest = arguments[:1]
    remaining = iter(arguments[1:])
    for argument in remaining:
        if argument in ("--config", "-config"):
            found += itertools.islice(remaining, 1)
        elif re.match(r"--?config=", argument):
            found.append(argument.split("=", 1)[1])
        else:
            rest.append(argument)
    if len(found) > 1:
        raise InputError(f"--config is given twice, {' and '.join(found)}; name one config file.")
    return (found[0] if found else None), rest


def _parse(values: flags.FlagValues, arguments: list[str], config: ConfigDict) -> list[str]:
    """Sets the flags; returns the arguments that are not flags."""
    try:
        # It reads the command line already, where a --flagfile may be missing.
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=arguments)
        return values(arguments)[1:]
    except flags.UnrecognizedFlagError as error:
        keys = [key for key, _ in flatten(config)]
        near = [f"--config.{key}" for key in keys if f".{key}".endswith(f".{error.flagname}")]
        near += [f"--{key}" for key in difflib.get_close_matches(error.flagname, values, n=1)]
        hint = f"did you mean {' or '.join(near)}?" if near else "--help lists the options."
        raise InputError(f"unknown option --{error.flagname}; {hint}") from None
    except Exception as error:  # Parsers of values raise nearly every kind on odd ones.
        match = re.match(r"flag --config\.([^=]+)=(.*?): ", str(error), re.DOTALL)
        if match and isinstance(error, flags.IllegalFlagValueError):
            declared_options(config.model.name)[match[1]].validate(match[1], match[2])
        raise InputError(" ".join(str(error).split())) from None


def _help(name: str | None) -> str:
    """Lists every option with its value, in a config file if one is given, and its meaning."""
    values = dict(flatten(load_config(name))) if name else {}
    known = declared_options(values.get("model.name"))
    lines = [USAGE, f"Options and their values {f'in {name}' if name else 'by default'}:"]
    for section, cls in SECTIONS.items():
        if section:
            lines += ["", f"{section}: {(cls.__doc__ or '').partition(chr(10))[0]}"]
        for key, declared in known.items():
            if key.rpartition(".")[0] == section:
                value = str(values.get(key, declared.default))
                value = f'"{value}"' if "'" in value else shlex.quote(value)
                lines += [f"  --config.{key}={value}", *_wrap(declared.described)]
        if section == "model" and name is None:
            lines += _wrap("Its options: name a config, as in --config=cifar10 --help.")
    return "\n".join(lines)


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, 96, initial_indent=" " * 8, subsequent_indent=" " * 8)
