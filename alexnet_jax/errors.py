"""The exceptions that end a program on purpose, each with a sentence, and a code (`programs`)."""

from typing import Any


class InputError(ValueError):
    """Bad input: an option, a file, a data set, a run folder.

    The message is one clear sentence that says what is wrong, which value, and what would be
    right. The programs print it without a traceback and exit with code 2; nothing is lost.
    """

    def __str__(self) -> str:
        # It quotes names and values of any origin.
        return printable(super().__str__())


class Diverged(ArithmeticError):
    """The loss is no longer a finite number; the last good checkpoint is kept."""


class SaveFailed(OSError):
    """The end of a run could not be saved; what was saved before is kept."""


class Interrupted(Exception):
    """A person or a scheduler asked the run to stop, and it has saved where it stands.

    Attributes:
        step: The step that was saved.
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped and saved at step {step:,}")
        self.step = step


def printable(text: str) -> str:
    """Escapes what would move a terminal's cursor, or change its colours."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def show(value: Any) -> str:
    """Writes a value for a sentence: in one line that is not long, whatever it is."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # An int of more than 4,300 digits, or a class of a person's own.
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:60]}...{text[-17:]}"
