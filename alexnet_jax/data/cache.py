"""Results computed from a prepared data set, cached beside it for the next run."""

import json
import logging
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from alexnet_jax.data.source import Source
from alexnet_jax.run import files

log = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]

# Fewer bytes are computed about as fast as a file of them is found and read.
MIN_BYTES = 2**24
_STALE_SECONDS = 3600  # No write takes longer; what is left unfinished is a killed process's.
_FORMAT = 2  # To be raised when images are decoded differently, or arrays change their meaning.


def decoded(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Returns what `Source.read_all` does, cached."""

    def read() -> Arrays:
        return dict(zip(("images", "labels"), source.read_all(), strict=True))

    arrays = load_or_compute(source, "images", read)
    return arrays["images"], arrays["labels"]


def load_or_compute(
    source: Source, name: str, compute: Callable[[], Arrays], **options: Any
) -> Arrays:
    """Returns the arrays of `compute`, from a folder beside the prepared set where it is valid.

    Cached arrays are read-only and mapped into memory: to copy 150 MB into memory that is new to
    the process took a virtual machine 0.6 s, and to check them 0.07 s. They are computed again
    where they are damaged (by their checksums), or were computed from other data files, with
    other `options` or by another version of Pillow. A folder that cannot be written is done
    without, and so is a cache of at most `MIN_BYTES` of images.
    """
    if len(source) * int(np.prod(source.image_shape)) <= MIN_BYTES:
        return compute()
    depends = [_FORMAT, source.fingerprint, source.image_size, PIL.__version__, options]
    key = json.dumps(depends, sort_keys=True)
    split = re.sub(r"[^A-Za-z0-9.-]", "_", source.name.rpartition(" ")[2])
    folder = Path(source.folder, "computed", f"{split}-{source.image_size}-{name}")
    arrays = _load(folder, key)
    if arrays is None:
        arrays = compute()
        _save(folder, key, arrays)
    return arrays


def _load(folder: Path, key: str) -> Arrays | None:
    try:
        content = json.loads((folder / "checksums.json").read_text())
        if content["key"] != key:
            return None
        arrays = {}
        for name, checksum in content["crc32"].items():
            arrays[name] = np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r"))
            if _checksum(arrays[name]) != checksum:
                raise ValueError(f"{name}.npy does not match its checksum")
        return arrays
    except FileNotFoundError:
        return None
    except Exception as error:  # Whatever damage makes JSON and NumPy raise.
        log.info("%s is damaged (%s); computing it again.", folder, error)
        return None


def _save(folder: Path, key: str, arrays: Arrays) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.remove_unfinished(folder, _STALE_SECONDS)
        Path(f"{folder}.npz").unlink(missing_ok=True)  # Where older versions cached the same.
        if shutil.disk_usage(folder).free < 2 * sum(a.nbytes for a in arrays.values()):
            raise OSError("the disk is nearly full")
        for name, array in arrays.items():
            with files.replacing(folder / f"{name}.npy", sync=False) as file:
                np.save(file, array)
        # Comes last, and tells arrays that another process, or a killed one, has written.
        checksums = {name: _checksum(array) for name, array in arrays.items()}
        files.write_json(folder / "checksums.json", {"key": key, "crc32": checksums})
    except OSError as error:
        log.info("Not cached for the next run: %s cannot be written (%s).", folder, error)


def _checksum(array: np.ndarray) -> int:
    kind = repr((array.shape, array.dtype.str))
    return zlib.crc32(array.data, zlib.crc32(kind.encode()))
