"""How a prepared data set lies in its files: what TFDS says of it, kept for the next start.

To import TFDS and to let it open a set takes half a second, most of it before anything is read.
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alexnet_jax import environment

log = logging.getLogger(__name__)

_FORMAT = 1  # To be raised when TFDS is asked otherwise, or another version of digits is prepared.


@dataclass(frozen=True)
class Shard:
    """A file of serialised examples, and which of them are meant; as ArrayRecord asks for it.

    Attributes:
        filename: Its path.
        skip: Index of the first example that is meant.
        take: How many.
        examples_in_shard: How many the file has.
    """

    filename: str
    skip: int
    take: int
    examples_in_shard: int


@dataclass(frozen=True)
class Layout:
    """One split of a prepared data set.

    Attributes:
        name: Of the set.
        folder: Where it lies prepared.
        class_names: By label.
        image_key: Name of the image in an example.
        label_key: Name of the label in an example.
        shards: What the split is read from, in this order.
    """

    name: str
    folder: str
    class_names: tuple[str, ...]
    image_key: str
    label_key: str
    shards: tuple[Shard, ...]


def kept(root: Path, name: str, split: str, ask: Callable[[], Layout]) -> Layout:
    """Returns what `ask` does, from the user's cache where nothing has changed since.

    Whatever changes a set's folder, or adds a version of the set, makes `ask` be called again;
    so does a damaged file of the cache. Where none can be written, the run goes on without.

    Args:
        root: Folder of all prepared data sets.
        name: As the user gave it, with config and version or without.
        split: A TFDS split.
        ask: Asks TFDS.
    """
    which = hashlib.sha256(json.dumps([str(root), name, split]).encode()).hexdigest()[:32]
    path = environment.cache_folder() / "layouts" / f"{which}.json"
    layout = _read(path, root)
    if layout is None:
        layout = ask()
        _write(path, root, layout)
    return layout


def _read(path: Path, root: Path) -> Layout | None:
    try:
        content = json.loads(path.read_text())
        found = content["layout"]
        if content["state"] != _state(root, Path(found["folder"])):
            return None
        shards = tuple(Shard(**shard) for shard in found["shards"])
        return Layout(**found | {"class_names": tuple(found["class_names"]), "shards": shards})
    except (OSError, ValueError, TypeError, KeyError):  # not there, damaged, or of other versions
        return None


def _write(path: Path, root: Path, layout: Layout) -> None:
    try:
        content = {"layout": asdict(layout), "state": _state(root, Path(layout.folder))}
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own, as several processes may write at once.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            whole = Path(folder, path.name)
            whole.write_text(json.dumps(content))
            whole.replace(path)
    except (OSError, ValueError) as error:  # ValueError: the set lies elsewhere
        log.debug("Not kept for the next start: %s (%s).", path, error)


def _state(root: Path, folder: Path) -> list[Any]:
    """Returns what tells that TFDS would find another set by the name, or other files in it.

    Raises:
        OSError: The folder is gone.
        ValueError: It does not lie below `root`.
    """
    # Configs and versions are folders in these; what is computed lies in a folder of the set's.
    above = folder.parents[: len(folder.relative_to(root).parts) - 1]
    state: list[Any] = [_FORMAT, *(parent.stat().st_mtime_ns for parent in above)]
    for file in sorted(folder.iterdir()):
        status = file.stat()
        if file.is_file():
            state.append([file.name, status.st_size, status.st_mtime_ns])
    return state
