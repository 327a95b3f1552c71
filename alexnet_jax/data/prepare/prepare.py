"""Data sets onto disk, as ArrayRecord files that can be read at random without TensorFlow.

A set comes from one of three places: it is generated here (digits), TFDS downloads it, or the
user hands over an archive or a folder. A preparation that does not end leaves nothing behind
that could be read later.
"""

import contextlib
import dataclasses
import difflib
import fcntl
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import logging
from tqdm import tqdm

from alexnet_jax.data.prepare import tfrecord, trees
from alexnet_jax.data.prepare.downloads import check_downloads
from alexnet_jax.errors import InputError

DIGITS = "digits"

_INFO = "dataset_info.json"
_ANEW = "remove that folder, or choose another --config.data.data_dir, to prepare it anew"
_CIFAR10_ARCHIVE = re.compile(r"cifar-10-(binary|python)\.tar\.gz")
# name, name/config, either with :version. Namespaces ("huggingface:") would need the network.
_TFDS_NAME = re.compile(r"\w+(/[\w.\-]+)?(:[\d*][\d.*]*)?")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What `prepare_path` made, or found.

    Attributes:
        name: The data set's name, for `config.data.name`.
        folder: Where it lies.
        splits: Number of images in each split.
        class_names: By label.
        ignored: Files of the input that were left out: no images, links, or outside the classes.
        is_new: Whether it was prepared now; False if it lay there already.
    """

    name: str
    folder: Path
    splits: Mapping[str, int]
    class_names: tuple[str, ...]
    ignored: int
    is_new: bool


def data_root(data_dir: str) -> Path:
    """Returns the folder of all prepared data sets; "" stands for TFDS's usual one.

    Raises:
        InputError: It cannot be the path of a folder.
    """
    usual = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return _usable_path(data_dir or usual)


def prepare_path(
    path: str | Path,
    *,
    name: str = "",
    data_dir: str = "",
    test_fraction: float = 0.2,
    overwrite: bool = False,
    progress: bool = True,
    cifar10_sha256: Mapping[str, str] | None = None,
) -> Prepared:
    """Prepares a data set from an archive or a folder.

    An official CIFAR-10 archive becomes TFDS's own `cifar10`; anything else is read as class
    folders of images (see `trees.find_layout`).

    Args:
        path: The archive or folder.
        name: What to call the data set; "" derives it from the path. CIFAR-10 keeps its own.
        data_dir: Root of the prepared data sets; "" for TFDS's usual folder.
        test_fraction: Share of each class that goes to test where the tree has no splits.
        overwrite: Whether to prepare again what lies there already. The old set comes back if that
            fails; runs that ask for it meanwhile wait.
        progress: Whether to show bars on a terminal.
        cifar10_sha256: The sum to expect for each official archive's name; None for the real ones.

    Returns:
        What was prepared, or what was there.

    Raises:
        InputError: The path, the name, the fraction or anything in the data is of no use.
    """
    from alexnet_jax.data.prepare import builders

    path = _usable_path(path)
    if not path.exists():
        raise InputError(f"There is no file or folder {path}; check the path.")
    if not 0 < test_fraction < 1:
        raise InputError(f"The test fraction is {test_fraction}; it must lie between 0 and 1.")
    root = data_root(data_dir)
    is_cifar10 = _CIFAR10_ARCHIVE.fullmatch(path.name) is not None
    if is_cifar10:
        if name not in ("", "cifar10"):
            raise InputError(
                f"{path.name} becomes the data set cifar10, not {name!r}; leave the name out."
            )
        name, version = "cifar10", builders.Cifar10Archive.VERSION
    else:
        name, version = name or _name_from(path), builders.ClassFolders.VERSION
        _check_own_name(name)
    folder = root / name / str(version)
    if is_prepared(folder) and not overwrite:
        return _describe(folder, ignored=0, is_new=False)

    ignored = 0
    with _lone_writer(folder):
        if is_prepared(folder) and not overwrite:  # Another process was faster.
            return _describe(folder, ignored=0, is_new=False)
        with _replacing(folder):
            if is_cifar10:
                sums = cifar10_sha256 or builders.CIFAR10_SHA256
                builder: Any = builders.Cifar10Archive(
                    path, data_dir=str(root), sha256=sums, progress=progress
                )
            else:
                layout = trees.find_layout(path, test_fraction, progress=progress)
                ignored = layout.ignored
                builder = builders.ClassFolders(name, layout, data_dir=str(root), progress=progress)
            _run(builder, root, bars=False)
    return _describe(folder, ignored=ignored, is_new=True)


def prepare_digits(data_dir: str) -> None:
    """Prepares scikit-learn's digits unless they are there already.

    Args:
        data_dir: Root of the prepared data sets; "" for TFDS's usual folder.

    Raises:
        InputError: The folder cannot be written.
    """
    from alexnet_jax.data.prepare import builders

    root = data_root(data_dir)
    folder = root / DIGITS / str(builders.Digits.VERSION)
    if is_prepared(folder):
        return
    with _lone_writer(folder):
        if not is_prepared(folder):  # Another process may have been faster.
            _run(builders.Digits(data_dir=str(root), file_format="array_record"), root, bars=False)


def prepare_registered(name: str, data_dir: str, progress: bool = True) -> None:
    """Lets TFDS download and prepare one of its own data sets.

    Args:
        name: Its TFDS name, with a config and version if wanted: "name/config:1.0.0".
        data_dir: Root of the prepared data sets; "" for TFDS's usual folder.
        progress: Whether to show TFDS's bars on a terminal.

    Raises:
        InputError: TFDS does not know the name, the files cannot be downloaded (within seconds
            where there is no network) or TFDS cannot prepare them.
    """
    import tensorflow_datasets as tfds

    root = data_root(data_dir)
    try:
        with quiet_tfds():
            builder = tfds.builder(name, data_dir=str(root))
    except tfds.core.DatasetNotFoundError as error:
        raise InputError(_unknown_name(name, root)) from error
    except Exception as error:  # TFDS names no exceptions for a bad config or version.
        raise InputError(f"TFDS cannot provide {name}: {_first_line(error)}.") from error
    folder = Path(builder.data_dir)
    with _lone_writer(folder):
        if not is_prepared(folder):
            check_downloads(builder, root / "downloads")
            _run(builder, root, bars=progress and sys.stderr.isatty())


def restore_replaced(name: str, data_dir: str) -> bool:
    """Brings back a set that was being replaced, unless its new version is there.

    Where it is being replaced now, this waits for the end.

    Args:
        name: Of the set.
        data_dir: Root of the prepared data sets; "" for TFDS's usual folder.

    Returns:
        Whether there was one.
    """
    asides = list((data_root(data_dir) / name).glob(f"{_ASIDE}*"))
    for aside in asides:
        with _lone_writer(aside.with_name(aside.name.removeprefix(_ASIDE))):
            pass  # It has seen to that.
    return bool(asides)


def is_prepared(folder: Path) -> bool:
    """Tells whether a complete data set lies in `folder`; TFDS writes this file last."""
    return (folder / _INFO).is_file()


def add_array_record(builder: Any, progress: bool = True) -> None:
    """Writes a prepared TFRecord data set a second time, beside it, as ArrayRecord.

    TFRecord is TFDS's default and can only be read from front to back. TFDS's own converter needs
    TensorFlow and Apache Beam; both formats hold the same records, so copying them is enough.

    Args:
        builder: A TFDS builder of the prepared set. It does not see the new files: open it anew.
        progress: Whether to show a bar on a terminal.

    Raises:
        InputError: A file is missing or damaged, the format is another one, or the folder cannot
            be written.
    """
    from tensorflow_datasets.core import file_adapters

    folder = Path(builder.data_dir)
    if builder.info.file_format is not file_adapters.FileFormat.TFRECORD:
        raise InputError(
            f"{folder} is prepared as {builder.info.file_format.value}, which cannot be read at "
            f"random here; {_ANEW}."
        )
    with _lone_writer(folder):
        description = json.loads((folder / _INFO).read_text())
        formats = description.setdefault("alternativeFileFormats", [])
        if "array_record" in formats:  # Another process has just done it.
            return
        splits = builder.info.splits.values()
        total = sum(split.num_examples for split in splits)
        hidden = None if progress else True
        with tqdm(desc=f"Converting {builder.name}", total=total, disable=hidden) as bar:
            for split in splits:
                for source, count in zip(split.filepaths, split.shard_lengths, strict=True):
                    target = file_adapters.convert_path_to_file_format(
                        source, file_adapters.FileFormat.ARRAY_RECORD
                    )
                    try:
                        tfrecord.copy_records(Path(source), Path(target), count, bar)
                    except (OSError, ValueError, RuntimeError) as error:
                        raise InputError(
                            f"{source} cannot be converted ({error}); {_ANEW}."
                        ) from error
        formats.append("array_record")
        # The new files count from here on; an interruption before this costs only time.
        unfinished = folder / f"unfinished.{_INFO}"
        unfinished.write_text(json.dumps(description, indent=2))
        unfinished.replace(folder / _INFO)


def check_name(name: str) -> None:
    """Raises InputError unless `name` has the form of a TFDS name: name/config:version."""
    if not _TFDS_NAME.fullmatch(name):
        raise InputError(
            f"config.data.name is {name!r}; it must be a data set's name, such as 'cifar10', "
            "'imagenet_resized/32x32' or 'mnist:3.0.1'."
        )


def _usable_path(path: str | Path) -> Path:
    try:
        found = Path(path).expanduser().absolute()
        os.stat(found)
    except FileNotFoundError:
        return found
    except (OSError, RuntimeError, ValueError) as error:  # ~name of nobody; a null character.
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{str(path)!r} cannot be used ({reason}); name another path.") from None
    return found


@contextlib.contextmanager
def quiet_tfds(bars: bool = False) -> Iterator[None]:
    """Silences what TFDS says on the way, but for its errors and, if wanted, its bars."""
    import tensorflow_datasets as tfds

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    # TFDS's own sets load TensorFlow, which would talk, and take the GPU memory that JAX needs.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    tfds.display_progress_bar(bars)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.display_progress_bar(True)
        logging.set_verbosity(verbosity)


def _run(builder: Any, root: Path, bars: bool) -> None:
    """Has a builder prepare its data set, and says in a sentence what went wrong."""
    import tensorflow_datasets as tfds

    config = tfds.download.DownloadConfig(
        manual_dir=root / "downloads" / "manual", try_download_gcs=False
    )
    try:
        with quiet_tfds(bars):
            builder.download_and_prepare(download_config=config, file_format="array_record")
    except InputError:
        raise
    except ModuleNotFoundError as error:
        raise InputError(
            f"TFDS needs the package {error.name} to prepare {builder.name}; install it with "
            f"`pip install {error.name}`."
        ) from error
    except Exception as error:  # Every one of TFDS's data sets fails in its own way.
        raise InputError(
            f"TFDS could not prepare {builder.name} in {root}: {_first_line(error)}."
        ) from error


_ASIDE = "replaced."  # What the name of a folder begins with while another takes its place.


@contextlib.contextmanager
def _lone_writer(folder: Path) -> Iterator[None]:
    """Lets one process at a time write a data set, and clears what a killed one left.

    The processes of one training run all want the data at the same moment: one prepares it and
    the others wait. Under the lock, whatever is unfinished has no owner any more.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = (folder.parent / ".lock").open("w")
    except OSError as error:
        raise InputError(
            f"{folder.parent} cannot be written ({error.strerror}); choose another folder with "
            "--config.data.data_dir, or --data_dir of scripts/prepare_data.py."
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        replaced = _aside(folder)
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        for stale in (replaced, *folder.parent.glob("incomplete.*")):
            shutil.rmtree(stale, ignore_errors=True)
        yield


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[None]:
    """Keeps the data set in `folder`, if any, until a new one has taken its place."""
    replaced = _aside(folder)
    if folder.exists():
        folder.rename(replaced)
    try:
        yield
    except BaseException:
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _aside(folder: Path) -> Path:
    return folder.with_name(f"{_ASIDE}{folder.name}")


def _describe(folder: Path, *, ignored: int, is_new: bool) -> Prepared:
    import tensorflow_datasets as tfds

    with quiet_tfds():
        info = tfds.builder_from_directory(folder).info
    splits = {name: split.num_examples for name, split in info.splits.items()}
    names = tuple(info.features["label"].names)
    return Prepared(info.name, folder, splits, names, ignored, is_new)


def _name_from(path: Path) -> str:
    stem = path.name
    while Path(stem).suffix.lower() in trees.ARCHIVE_SUFFIXES:
        stem = Path(stem).stem
    name = re.sub(r"\W+", "_", stem.lower(), flags=re.ASCII).strip("_")
    return name if name[:1].isalpha() else f"images_{name}"


def _check_own_name(name: str) -> None:
    import tensorflow_datasets as tfds

    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise InputError(
            f"The name {name!r} cannot be used; take small letters, digits and underscores, "
            "beginning with a letter."
        )
    if name == DIGITS or name in tfds.list_builders(with_community_datasets=False):
        raise InputError(
            f"The name {name!r} belongs to another data set; choose your own with --name."
        )


def _unknown_name(name: str, root: Path) -> str:
    import tensorflow_datasets as tfds

    # Community data sets are listed on the network, which takes many seconds and TensorFlow.
    known = {DIGITS, *tfds.list_builders(with_community_datasets=False)}
    known |= {info.relative_to(root).parts[0] for info in root.glob(f"*/*/{_INFO}")}
    near = difflib.get_close_matches(name.lower(), sorted(known))
    hint = (
        f"did you mean {', '.join(near)}?" if near else "prepare it with scripts/prepare_data.py."
    )
    return f"There is no data set {name!r} in {root} or in TFDS; {hint}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".:")
