"""The command `alexnet-jax`: it runs the command that its first argument names."""

import difflib
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from alexnet_jax.cli import common
from alexnet_jax.errors import InputError

COMMANDS = (
    *("train", "prepare", "predict", "evaluate", "export", "report", "sweep", "compare"),
    *("import-torchvision", "export-torchvision"),
)


@common.entry_point
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; without arguments, that of the process. Returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = given[0] if given else "--help"
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}."
        raise InputError(f"unknown command {name!r}; {hint}")
    code: int = _module(name).main(given[1:])
    return code


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"alexnet_jax.cli.{name.replace('-', '_')}")


def _help() -> str:
    lines = ["usage: alexnet-jax COMMAND ...", ""]
    for name in COMMANDS:
        summary = (_module(name).__doc__ or "").partition("\n")[0]
        lines.append(f"  {name:<20}{summary}")
    return "\n".join([*lines, "", "`alexnet-jax COMMAND --help` says what a command takes."])
