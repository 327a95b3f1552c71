"""What the commands share: their parser, how they end, and flags that they pass on to runs.

Imports no JAX, so that --help is quick.
"""

import argparse
import errno
import functools
import gc
import os
import select
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, ParamSpec, TextIO

from alexnet_jax.errors import (
    EXIT_BAD_INPUT,
    EXIT_CTRL_C,
    EXIT_NOT_SAVED,
    Diverged,
    InputError,
    SaveFailed,
    show,
)

# Imports and tracing make objects by the hundred thousand, nearly all to stay. With Python's own
# threshold of 700 the search for garbage among them took 6% of the start of a training run, 0.4 s.
_GARBAGE_THRESHOLD = 10_000

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

P = ParamSpec("P")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; `{self.prog} --help` lists the arguments.")


def create_parser(
    program: str, doc: str | None, *, success: str, other: str = "", usage: str | None = None
) -> argparse.ArgumentParser:
    """Creates the parser of a command, whose --help shows the docstring of its module.

    Args:
        program: For example "alexnet-jax report".
        doc: The first line describes the command; the others follow the list of its arguments.
        success: What exit code 0 means.
        other: Exit codes that not every command has.
        usage: Only where argparse cannot write it.

    Returns:
        The parser, which raises an InputError where argparse prints the usage and exits.
    """
    description, _, notes = (doc or "").strip().partition("\n\n")
    codes = (
        f"Exit codes: 0 {success}, {EXIT_BAD_INPUT} bad input, {EXIT_NOT_SAVED} a file cannot be "
        f"written, {EXIT_CTRL_C} after Ctrl-C{other}."
    )
    return _Parser(
        prog=program,
        usage=usage,
        description=description,
        epilog="\n\n".join([*filter(None, [notes]), textwrap.fill(codes, 100)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def path(text: str) -> Path:
    """Converts an argument to a path, for argparse's `type`; a shell leaves --workdir=~/a as it is.

    Raises:
        argparse.ArgumentTypeError: It begins with ``~`` and the name of no user.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{show(text)} is in the home of no user") from None


def positive(text: str) -> int:
    """Converts an argument to an int of at least 1, for argparse's `type`.

    Raises:
        ValueError: It is not an int.
        argparse.ArgumentTypeError: It is less than 1.
    """
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def entry_point(main: Callable[P, int | None]) -> Callable[P, int]:
    """Decorates the main function of a command, so that all commands end alike.

    An InputError and its like are printed as ``error: message`` and set the exit code; so does a
    full disk. Ctrl-C is `EXIT_CTRL_C`. Where nobody reads the output any more, as behind
    ``| head``, the command ends quietly. Any other exception is a bug and keeps its traceback.

    Returns:
        A function that returns the exit code; the decorated one may return None for 0.
    """

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        code = 0
        gc.set_threshold(_GARBAGE_THRESHOLD)
        try:
            try:
                code = main(*args, **kwargs) or 0
            except (InputError, Diverged, SaveFailed) as error:
                code = error.exit_code
                say(f"error: {error}")
            except KeyboardInterrupt:
                code = EXIT_CTRL_C
                say("Interrupted.")
            except SystemExit:  # argparse has printed its help
                print(end="", flush=True)
                raise
            for stream in (sys.stdout, sys.stderr):
                stream.flush()  # at the end of the process it is too late to notice
        except OSError as error:
            return _write_failed(error) or code
        return code

    return run


def _write_failed(error: OSError) -> int:
    """Returns the exit code for a full disk, or for an output that nobody reads.

    Raises:
        OSError: The error, if it is another one, such as of a pipe to a child process.
    """
    code, streams = 0, (sys.stdout, sys.stderr)
    if error.errno in _DISK_FULL:
        code = EXIT_NOT_SAVED
        where = error.filename or "the output"
        say(f"error: {where} could not be written ({error.strerror}).")
    elif not (isinstance(error, BrokenPipeError) and any(map(_is_closed, streams))):
        raise error
    for stream in streams:
        try:
            stream.flush()
        except OSError:  # at its end the process would try again
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
    return code


def say(text: str) -> None:
    """Prints to standard error, whether or not anybody reads it."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _is_closed(stream: TextIO) -> bool:
    """Whether the stream is a pipe that nobody reads."""
    poll = select.poll()
    try:
        poll.register(stream, 0)  # errors are reported without being asked for
    except OSError:  # it is not a file
        return False
    return bool(poll.poll(0))


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits a command line at its first ``--`` into arguments and flags for the runs it starts.

    argparse cannot: it takes one list of open length, and not on both sides of options.
    """
    given = list(arguments)
    end = given.index("--") if "--" in given else len(given)
    return given[:end], given[end + 1 :]


def check_flags(flags: Sequence[str], taken: Sequence[str], who: str) -> None:
    """Rejects flags, in any form that absl accepts, which `who` sets itself in the runs it starts.

    Raises:
        InputError: The name of a flag is in `taken`, such as "workdir" or "config.seed".
    """
    for flag in flags:
        given = flag.split("=", 1)[0]
        name = given.lstrip("-")
        if given != name and (name in taken or name.removeprefix("no") in taken):
            raise InputError(f"{given} after -- is set by {who} itself; leave it out.")
