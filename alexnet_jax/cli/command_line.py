"""The command line of `main`: --config, --workdir, and --config.section.key for each option.

Beside them stand --coordinator, --num_processes and --process_id, where many processes train.

absl and ml_collections parse it; what is here finds out first what they would only answer with a
traceback, and turns their own errors into sentences.
"""

import difflib
import itertools
import os
import re
import runpy
import shlex
import sys
import traceback
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from alexnet_jax.config import check_type, default_config, flatten, unknown_key_message
from alexnet_jax.distributed.initialize import ProcessFlags
from alexnet_jax.errors import InputError

USAGE = """\
Trains a network: python -m alexnet_jax.main --config=configs/cifar10.py

The same command goes on where an interrupted run stopped. Exit codes: 0 finished, 2 bad input,
3 the loss diverged, 69 another process of the run is gone, 74 the end could not be saved,
75 interrupted and saved, 130 stopped by Ctrl-C without a save.
"""

# The options that are not of the config.
_PLAIN = ("workdir", *ProcessFlags._fields)

# ml_collections looks into the command line by itself, and already here; that of the process may
# name a --flagfile that cannot be read. `parse` fills in what there is.
_arguments: list[str] = []
_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "The config file; --config.section.key=value changes an option.",
    sys_argv=_arguments,
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run folder; by default runs/<name of the config file>."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "Address of process 0, host:port, if there are many."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes train as one.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")


def parse(arguments: list[str]) -> tuple[ConfigDict, Path, ProcessFlags]:
    """Reads the command line.

    Args:
        arguments: Of the process, with the program's name first.

    Returns:
        The config with its changes, the run folder, and what is said of other processes.

    Raises:
        InputError: Whatever can be wrong with it, as one sentence.
        SystemExit: It asks for help, which has been printed.
    """
    paths = [a.split("=", 1)[1] for a in arguments if re.match(r"--?config=", a)]
    pairs = itertools.pairwise(arguments)
    paths += [value for name, value in pairs if name in ("--config", "-config")]
    if any(re.fullmatch(r"--?(h|\?|help(short|full)?)", a) for a in arguments):
        print(_help(paths[0] if paths else None))
        sys.exit(0)
    if not paths:
        raise InputError(f"--config is missing; name a config file{_known_configs()}.")
    if len(paths) > 1:
        raise InputError(f"--config is given twice, {' and '.join(paths)}; name one config file.")
    config = load_config(paths[0])
    options = dict(flatten(config))
    for argument in arguments:
        match = re.match(r"--?(?:no)?config\.([^=]*)", argument)
        if match and match[1] in config and match[1] not in options:
            raise InputError(
                f"config.{match[1]} is a section; set its options one by one, such as "
                f"--config.{next(key for key in options if key.startswith(f'{match[1]}.'))}=..."
            )
        if match and match[1] not in options:
            raise InputError(unknown_key_message(match[1], config))
    _arguments[:] = arguments
    try:
        rest = flags.FLAGS(arguments)
    except flags.UnrecognizedFlagError as error:
        near = [f"--config.{key}" for key in options if f".{key}".endswith(f".{error.flagname}")]
        near += [f"--{key}" for key in difflib.get_close_matches(error.flagname, _PLAIN, n=1)]
        hint = f"did you mean {' or '.join(near)}?" if near else "--help lists the options."
        raise InputError(f"--{error.flagname} is no option; {hint}") from None
    except flags.IllegalFlagValueError as error:
        match = re.match(r"flag --config\.([^=]+)=(.*?): ", str(error), re.DOTALL)
        if match:
            check_type(match[1], match[2], options[match[1]])
        raise InputError(_one_line(error)) from None
    except Exception as error:  # Parsers of values raise nearly every kind on odd ones.
        raise InputError(_one_line(error)) from None
    if len(rest) > 1:
        raise InputError(f"{rest[1]!r} is no option; options begin with --.")
    if _WORKDIR.value == "":
        raise InputError("--workdir is empty; name a folder, or leave it out.")
    name = Path(paths[0].split(":", 1)[0]).stem
    workdir = Path(_WORKDIR.value or Path("runs", name))
    return (
        _CONFIG.value,
        workdir,
        ProcessFlags(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value),
    )


def load_config(path: str) -> ConfigDict:
    """Reads a config file, with what may follow it after a colon; absl's errors are tracebacks.

    Raises:
        InputError: It is not there, or makes no config.
    """
    file, *argument = path.split(":", 1)
    if not os.path.isfile(file):  # pathlib's raises where a name is too long.
        raise InputError(f"--config={path} is not a file; name a config file{_known_configs()}.")
    try:
        get_config = runpy.run_path(file).get("get_config")
        config = get_config(*argument) if get_config else None
        if isinstance(config, ConfigDict):
            dict(flatten(config))  # A placeholder without a value raises when it is read.
    except (Exception, SystemExit) as error:  # it is a person's program, and may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f", line {f.lineno}," for f in frames[::-1] if f.filename == file), "")
        what = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        raise InputError(f"{path}{line} cannot be used: {what}{_one_line(error)}") from None
    if not isinstance(config, ConfigDict):
        raise InputError(
            f"{path} has no function get_config() that returns a ConfigDict; "
            f"write it as in an example{_known_configs()}."
        )
    return config


def _help(path: str | None) -> str:
    """Lists every option with its value, in a config file if one is given."""
    config = default_config() if path is None else load_config(path)
    return "\n".join(
        [
            USAGE,
            "  --config=FILE      the config file",
            "  --workdir=FOLDER   the run folder; by default runs/<name of the config file>",
            "  --coordinator=HOST:PORT --num_processes=N --process_id=I",
            "                     to train in N processes (docs/scaling.md); I is from 0 to N-1,",
            "                     and the address that of process 0",
            "",
            f"Options and their values {f'in {path}' if path else 'by default'}; "
            "alexnet_jax/config.py says what each means:",
            *(f"  --config.{key}={shlex.quote(str(value))}" for key, value in flatten(config)),
        ]
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _known_configs() -> str:
    found = sorted(str(path) for path in Path("configs").glob("*.py"))
    return f", such as {', '.join(found)}" if found else ""
