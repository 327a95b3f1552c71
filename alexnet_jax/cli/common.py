"""What all programs have in common: how they end, and flags that they hand on to training runs.

Nothing here imports JAX, so that --help is quick.
"""

import argparse
import errno
import functools
import gc
import os
import select
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ParamSpec, TextIO

from alexnet_jax.errors import (
    EXIT_BAD_INPUT,
    EXIT_CTRL_C,
    EXIT_NOT_SAVED,
    Diverged,
    InputError,
    SaveFailed,
    show,
)

# For --help: those that every program has.
EXIT_CODES = (
    f"{EXIT_BAD_INPUT} bad input, {EXIT_NOT_SAVED} a file cannot be written, "
    f"{EXIT_CTRL_C} after Ctrl-C"
)

# Imports and tracing make objects by the hundred thousand, nearly all to stay. With Python's own
# threshold of 700 the search for garbage among them took 6% of the start of a training run, 0.4 s.
_GARBAGE_THRESHOLD = 10_000

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

P = ParamSpec("P")


def entry_point(
    *, interrupted: str = "Interrupted."
) -> Callable[[Callable[P, int | None]], Callable[P, int]]:
    """Decorates the main function of a program, so that it ends as all of them do.

    An error that is meant for a person becomes ``error: sentence`` on standard error and its exit
    code; so does a full disk. Ctrl-C becomes a word and `EXIT_CTRL_C`. Where nobody reads on, as
    behind ``| head``, the program ends quietly. Anything else is a mistake of its own, and keeps
    its traceback.

    Args:
        interrupted: What to say after Ctrl-C.

    Returns:
        A decorator; what it returns has the arguments of the function, and returns the exit code.
        The function may return None for 0.
    """

    def decorate(main: Callable[P, int | None]) -> Callable[P, int]:
        @functools.wraps(main)
        def program(*args: P.args, **kwargs: P.kwargs) -> int:
            code = 0
            gc.set_threshold(_GARBAGE_THRESHOLD)
            try:
                try:
                    code = main(*args, **kwargs) or 0
                except (InputError, Diverged, SaveFailed) as error:
                    code = error.exit_code
                    print(f"error: {error}", file=sys.stderr)
                except KeyboardInterrupt:
                    code = EXIT_CTRL_C
                    print(interrupted, file=sys.stderr)
                except SystemExit:  # argparse has answered
                    print(end="", flush=True)
                    raise
                print(end="", flush=True)  # at the end of the process it is too late to notice
            except OSError as error:
                return _could_not_write(error) or code
            return code

        return program

    return decorate


def _could_not_write(error: OSError) -> int:
    """Returns the exit code for an error of a full disk, or of a pipe that nobody reads any more.

    Raises:
        OSError: The error, if it is another one, such as of a pipe to a process of the program's.
    """
    code, streams = 0, (sys.stdout, sys.stderr)
    if error.errno in _NO_ROOM:
        code = EXIT_NOT_SAVED
        where = error.filename or "the output"
        print(f"error: {where} could not be written ({error.strerror}).", file=sys.stderr)
    elif not (isinstance(error, BrokenPipeError) and any(map(_nobody_reads, streams))):
        raise error
    for stream in streams:
        try:
            stream.flush()
        except OSError:  # what is left would be tried again at the end of the process
            silence(stream)
    return code


def silence(stream: TextIO) -> None:
    """Lets what is written to a stream, which cannot be written any more, go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _nobody_reads(stream: TextIO) -> bool:
    poll = select.poll()
    try:
        poll.register(stream, 0)  # an error is told of, whether or not it is asked for
    except OSError:  # it is no file
        return False
    return bool(poll.poll(0))


def split(arguments: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Splits a command line at its first ``--``.

    argparse cannot do it: it takes a list of open length only once, and not on both sides of
    options.

    Args:
        arguments: After the program's name; None takes the process's own.

    Returns:
        What is the program's own, for its parser, and the flags of `alexnet_jax.main` that go to
        every run which it starts.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    end = given.index("--") if "--" in given else len(given)
    return given[:end], given[end + 1 :]


def path(text: str) -> Path:
    """Makes a path of an argument; for argparse's `type`.

    A shell leaves the ``~`` of ``--workdir=~/runs`` as it is.

    Raises:
        argparse.ArgumentTypeError: It begins with ``~`` and the name of nobody.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{show(text)} is in the home of nobody") from None


def check_flags(flags: Sequence[str], taken: Sequence[str], who: str) -> None:
    """Refuses flags that a program sets itself in the runs which it starts.

    Args:
        flags: Of `split`.
        taken: The names of those that the program sets, such as "workdir" or "config.seed".
        who: Sets them, for the sentence.

    Raises:
        InputError: One of the flags is taken, in any of the forms that absl knows.
    """
    for flag in flags:
        given = flag.split("=", 1)[0]
        name = given.lstrip("-")
        if given != name and (name in taken or name.removeprefix("no") in taken):
            raise InputError(f"{given} after -- is set by {who} itself; leave it out.")
