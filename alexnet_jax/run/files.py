"""Files that are written whole or not at all, and JSON laid out for people.

Imports nothing of the package but its errors, so that every room may use it.
"""

import json
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from alexnet_jax.errors import InputError, SaveFailed


@contextmanager
def replacing(path: Path, *, sync: bool = True) -> Iterator[BinaryIO]:
    """Opens a new file that takes the place of `path` once all of it is written.

    Whenever the process is killed, `path` is the old file or the new one. Missing folders are made.

    Args:
        path: The file to write.
        sync: Whether to wait for the disk, so that the file survives a power failure.

    Raises:
        SaveFailed: It cannot be written, as where the disk is full.
    """
    # The name is unique, since other processes and hosts may be writing the same file.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise SaveFailed(
            f"{path} could not be written ({error.strerror or error}); fix this and rerun the "
            "same command."
        ) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file; this and all below as `replacing` does it."""
    with replacing(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Writes a file of UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, laid out by `format_json`."""
    write_text(path, format_json(value) + "\n")


def write_npz(
    path: Path, arrays: Mapping[str, np.ndarray], *, compress: bool = True, sync: bool = True
) -> None:
    """Writes arrays by name into an npz file; the same arrays make the same bytes."""
    save = np.savez_compressed if compress else np.savez
    with replacing(path, sync=sync) as file:
        save(file, **arrays)  # type: ignore[arg-type]  # no array is named allow_pickle


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Reads all arrays of an npz file; none if the file does not exist.

    Raises:
        InputError: It exists and is damaged.
    """
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return dict(file)
    except FileNotFoundError:
        return {}
    except Exception as error:  # whatever damage makes zipfile and NumPy raise
        raise InputError(
            f"{path} is damaged ({error}); restore it from a copy, or delete it."
        ) from None


def remove_unfinished(folder: Path, older_than: float) -> None:
    """Removes what killed processes left half-written in a folder.

    Args:
        folder: Of the files that `replacing` has opened.
        older_than: Seconds since the last change; a younger file may still be written to.
    """
    for path in folder.glob(".*.tmp"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > older_than:
                path.unlink()


def read_json(path: Path) -> Any:
    """Reads a JSON object; None if the file does not exist.

    Raises:
        InputError: It exists and is not a JSON object.
    """
    try:
        value = json.loads(path.read_text())
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        return value
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is damaged ({error}); restore it from a copy, or use another --workdir."
        ) from None


def format_json(value: Any) -> str:
    """Formats JSON for people: indented, but with each list of numbers on one line.

    A confusion matrix has a hundred such lists, or more.
    """
    text = json.dumps(value, indent=2)
    # No string holds a line break, so what follows one is never inside a string.
    return re.sub(r'\[\n([^][{}"]*)\]', lambda found: f"[{' '.join(found[1].split())}]", text)
