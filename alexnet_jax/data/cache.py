"""What was computed from a prepared data set once, kept beside it for the next run."""

import json
import logging
import math
import mmap
import os
import re
import shutil
import struct
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from alexnet_jax.data.source import Source

log = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]

# Fewer bytes are computed about as fast as a file of them is found and read.
WORTH_KEEPING = 2**24
_STALE_SECONDS = 3600  # No write lasts longer; what is left unfinished is a killed process's.
_FORMAT = 1  # To be raised when images are decoded otherwise, or arrays mean another thing.


def decoded(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Returns every image uint8[N, S, S, 3] and label int32[N] of a source, as `read_all` does.

    A set of more than `WORTH_KEEPING` bytes is decoded once and kept.

    Raises:
        InputError: As `Source.read_all`.
    """

    def compute() -> Arrays:
        images, labels = source.read_all()
        return {"images": images, "labels": labels}

    size = len(source) * int(np.prod(source.image_shape))
    arrays = kept(source, "images", compute) if size > WORTH_KEEPING else compute()
    return arrays["images"], arrays["labels"]


def kept(source: Source, name: str, compute: Callable[[], Arrays], **options: Any) -> Arrays:
    """Returns what `compute` does, from a file beside the prepared set where there is a right one.

    Arrays of a file are mapped into memory, and read-only. A file that is damaged (its checksums
    tell), or was computed from other data files, with other options or by another Pillow is
    computed anew, and written whole or not at all. Where it cannot be written, the run goes on
    without.

    Args:
        source: What is computed from.
        name: Of the kind of result; with the split and the image size it names the file.
        compute: Returns arrays by name.
        options: What else the result depends on; JSON.
    """
    key = json.dumps(
        [_FORMAT, source.fingerprint, source.image_size, PIL.__version__, options], sort_keys=True
    )
    split = re.sub(r"[^A-Za-z0-9.-]", "_", source.name.rpartition(" ")[2])
    path = Path(source.folder, "computed", f"{split}-{source.image_size}-{name}.npz")
    arrays = _read(path, key)
    if arrays is None:
        arrays = compute()
        _write(path, key, arrays)
    return arrays


def _read(path: Path, key: str) -> Arrays | None:
    try:
        arrays = _mapped(path)
    except FileNotFoundError:
        return None
    except Exception as error:  # Whatever damage makes zipfile and NumPy raise.
        log.info("%s is damaged (%s); computing it anew.", path, error)
        return None
    return arrays if arrays.pop("key", None) == key else None


def _mapped(path: Path) -> Arrays:
    """Returns the arrays of a file that `numpy.savez` wrote, after a look at its checksums.

    They stay in the file, of which the system keeps a copy in memory anyway: to copy 150 MB into
    memory that is new to the process took a virtual machine 0.6 s, and the checksums 0.07 s.
    """
    arrays = {}
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        for member in archive.infolist():
            # The header in front of the member repeats its name, and may hold other extras than
            # the directory at the end.
            name, extra = struct.unpack_from("<HH", whole, member.header_offset + 26)
            start = member.header_offset + 30 + name + extra
            if zlib.crc32(whole[start : start + member.file_size]) != member.CRC:
                raise ValueError(f"{member.filename} does not agree with its checksum")
            file.seek(start)
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                raise ValueError(f"{member.filename} is of the unknown format {version}")
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            array = np.frombuffer(whole, dtype, math.prod(shape), file.tell())
            arrays[member.filename.removesuffix(".npy")] = array.reshape(shape)
    return arrays


def _write(path: Path, key: str, arrays: Arrays) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        for left in path.parent.glob(".*.unfinished"):
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                left.unlink(missing_ok=True)
        if shutil.disk_usage(path.parent).free < 2 * sum(a.nbytes for a in arrays.values()):
            raise OSError("the disk is nearly full")
        # A name of its own, as several processes may write at once; the last one's stays.
        handle, unfinished = tempfile.mkstemp(".unfinished", f".{path.name}.", path.parent)
        try:
            with open(handle, "wb") as file:
                np.savez(file, key=np.array(key), **arrays)  # type: ignore[arg-type]  # Its stub is wrong.
            os.chmod(unfinished, 0o644)
            os.replace(unfinished, path)
        finally:
            Path(unfinished).unlink(missing_ok=True)
    except OSError as error:
        log.info("Not kept for the next run: %s cannot be written (%s).", path, error)
