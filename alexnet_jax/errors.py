"""The exceptions that end a program on purpose, each with a message and an exit code."""

from typing import Any, ClassVar

EXIT_BAD_INPUT = 2  # as in argparse
EXIT_DIVERGED = 3
EXIT_LOST = 69  # EX_UNAVAILABLE of sysexits.h: another process of the run is gone
EXIT_NOT_SAVED = 74  # EX_IOERR of sysexits.h
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: saved, try again
EXIT_CTRL_C = 130  # as a shell reports it


def shell_code(returncode: int) -> int:
    """Returns the exit code of a `subprocess` as a shell reports it: 128 + the signal, if any."""
    return 128 - returncode if returncode < 0 else returncode


class InputError(ValueError):
    """Bad input: an option, a file, a data set, a run folder.

    The message is one clear sentence that says what is wrong, which value, and what would be
    right. The commands print it without a traceback.
    """

    exit_code: ClassVar[int] = EXIT_BAD_INPUT

    def __str__(self) -> str:
        # It quotes names and values of any origin.
        return printable(super().__str__())


class Diverged(ArithmeticError):
    """The loss is no longer a finite number; the last good checkpoint is kept."""

    exit_code: ClassVar[int] = EXIT_DIVERGED


class SaveFailed(OSError):
    """The end of a run could not be saved; what was saved before is kept."""

    exit_code: ClassVar[int] = EXIT_NOT_SAVED


class Interrupted(Exception):
    """A signal asked the run to stop, and it has saved a checkpoint.

    Attributes:
        step: The step that was saved.
    """

    exit_code: ClassVar[int] = EXIT_INTERRUPTED

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped and saved at step {step:,}")
        self.step = step


# With many processes, all of them raise these at the same point.
AGREED = (InputError, Diverged, SaveFailed, Interrupted)


def printable(text: str) -> str:
    """Escapes what moves a terminal's cursor or changes its colors."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def show(value: Any) -> str:
    """Formats a value for a sentence: one short line, whatever it is."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # an int of more than 4,300 digits, or a user's own class
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:60]}...{text[-17:]}"
