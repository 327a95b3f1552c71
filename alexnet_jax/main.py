"""Trains a network: ``python -m alexnet_jax.main --config=configs/cifar10.py``.

The same command goes on where an interrupted run stopped. Exit codes: 0 finished, 2 bad input,
3 the loss diverged, 75 interrupted and saved.
"""

import re
import shlex
import sys
from pathlib import Path
from typing import NoReturn

from absl import app, flags
from ml_collections import config_flags

from alexnet_jax import writers
from alexnet_jax.config import flatten, unknown_key_message
from alexnet_jax.errors import Diverged, InputError, Interrupted

EXIT_BAD_INPUT = 2
EXIT_DIVERGED = 3
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: try again

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The config file; --config.section.key=value changes an option."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run folder; by default runs/<name of the config file>."
)


def _parse_flags(arguments: list[str]) -> list[str]:
    """Parses the command line, turning every way it can be wrong into one sentence."""
    try:
        return _checked_parse(arguments)
    except InputError as error:
        _fail(error)


def _checked_parse(arguments: list[str]) -> list[str]:
    path = next(
        (a.split("=", 1)[1] for a in arguments if re.match(r"--?config=", a)),
        None,
    )
    if path is None and not any(re.match(r"--?(config$|help)", a) for a in arguments):
        raise InputError(f"--config is missing; name a config file{_known_configs()}.")
    if path is not None and not Path(path.split(":", 1)[0]).is_file():
        raise InputError(f"--config={path} is not a file; name a config file{_known_configs()}.")
    try:
        rest = flags.FLAGS(arguments)
    except (AttributeError, KeyError) as error:
        raise InputError(_unknown_option(arguments, error)) from None
    except (flags.Error, TypeError, ValueError, OSError) as error:
        raise InputError(str(error).strip().replace("\n", " ")) from None
    if len(rest) > 1:
        raise InputError(f"{rest[1]!r} is no option; options begin with --.")
    return rest


def _unknown_option(arguments: list[str], error: Exception) -> str:
    """Finds the option that the config does not have, for absl's error does not name it whole."""
    path = next(a.split("=", 1)[1] for a in arguments if re.match(r"--?config=", a))
    config = config_flags.config_flags.ConfigFileFlagParser("config").parse(path)
    known = dict(flatten(config))
    for argument in arguments:
        match = re.match(r"--(?:no)?config\.([^=]+)", argument)
        if match and match[1] not in known:
            return unknown_key_message(match[1], config)
    return f"{path} could not be read: {type(error).__name__}: {error}"


def _known_configs() -> str:
    found = sorted(str(path) for path in Path("configs").glob("*.py"))
    return f", such as {', '.join(found)}" if found else ""


def _fail(error: Exception, code: int = EXIT_BAD_INPUT) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(code)


def main(arguments: list[str]) -> None:
    """Runs what the command line asks for."""
    del arguments  # all parsed into the flags
    filename = config_flags.get_config_filename(flags.FLAGS["config"])
    workdir = Path(_WORKDIR.value or Path("runs", Path(filename.split(":", 1)[0]).stem))
    writers.log_to_terminal()
    from alexnet_jax.train import train_and_evaluate  # after the flags, which fail at once

    command = shlex.join(["python", "-m", "alexnet_jax.main", *sys.argv[1:]])
    try:
        train_and_evaluate(_CONFIG.value, workdir)
    except InputError as error:
        _fail(error)
    except Diverged as error:
        _fail(error, EXIT_DIVERGED)
    except Interrupted as stop:
        print(f"Saved at step {stop.step:,}. To go on:\n  {command}", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except KeyboardInterrupt:
        print(f"\nStopped before anything new was saved. To go on:\n  {command}", file=sys.stderr)
        sys.exit(130)


def run() -> None:
    """Entry point."""
    app.run(main, flags_parser=_parse_flags)


if __name__ == "__main__":
    run()
