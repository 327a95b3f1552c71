"""Prepares data sets as ArrayRecord files, which can be read at random without TensorFlow.

A set is generated here (digits), downloaded by TFDS, or made from a user's archive or folder. A
preparation that is interrupted leaves nothing behind that could be read later.
"""

import contextlib
import difflib
import fcntl
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging
from tqdm import tqdm

from alexnet_jax.data.prepare import tfrecord, trees
from alexnet_jax.data.prepare.downloads import check_downloads
from alexnet_jax.errors import InputError
from alexnet_jax.run import files

DIGITS = "digits"

_INFO = "dataset_info.json"  # TFDS writes it last.
_REPLACED = "replaced."  # Prefix of a folder's name while a new one takes its place.
# name, name/config, either with :version. Namespaces ("huggingface:") would need the network.
_TFDS_NAME = re.compile(r"\w+(/[\w.\-]+)?(:[\d*][\d.*]*)?")
# TFDS's own sets load TensorFlow, which would talk, and take the GPU memory that JAX needs.
_TENSORFLOW = {"TF_CPP_MIN_LOG_LEVEL": "2", "TF_FORCE_GPU_ALLOW_GROWTH": "true"}


class Prepared(NamedTuple):
    """A prepared data set."""

    name: str
    folder: Path
    splits: Mapping[str, int]  # number of images in each
    class_names: tuple[str, ...]  # by label
    ignored: int  # files of the input that are no images, links, or outside the class folders
    is_new: bool  # whether it was prepared now


def data_root(data_dir: str) -> Path:
    """Returns the folder of all prepared data sets; "" stands for TFDS's default."""
    return _usable_path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")


def check_name(name: str) -> None:
    """Raises an InputError unless `name` has the form name/config:version."""
    if not _TFDS_NAME.fullmatch(name):
        raise InputError(
            f"config.data.name is {name!r}; it must be a data set's name, such as 'cifar10', "
            "'imagenet_resized/32x32' or 'mnist:3.0.1'."
        )


def prepare_path(
    path: str | Path,
    *,
    name: str = "",
    data_dir: str = "",
    test_fraction: float = 0.2,
    overwrite: bool = False,
) -> Prepared:
    """Prepares a data set from an archive or a folder, unless it is prepared already.

    An official CIFAR-10 archive becomes TFDS's own `cifar10`; anything else is read as class
    folders of images (see `trees.label_files`).

    Args:
        path: The archive or folder.
        name: Of the data set; "" derives it from the path.
        data_dir: Root of the prepared data sets; "" for TFDS's default.
        test_fraction: Share of each class that goes to test where the tree has no splits.
        overwrite: Whether to replace a prepared set. The old one comes back if that fails; runs
            that ask for it meanwhile wait.
    """
    import tensorflow_datasets as tfds

    from alexnet_jax.data.prepare import builders

    path = _usable_path(path)
    if not path.exists():
        raise InputError(f"There is no file or folder {path}; check the path.")
    if not 0 < test_fraction < 1:
        raise InputError(f"The test fraction is {test_fraction}; it must be between 0 and 1.")
    builder: Any = builders.ImageBuilder
    if path.name in builders.CIFAR10_SHA256:
        if name not in ("", "cifar10"):
            raise InputError(f"{path.name} becomes cifar10, not {name!r}; leave the name out.")
        name, builder = "cifar10", builders.Cifar10Archive
    else:
        name = name or default_name(path)
        _check_own_name(name)
    root = data_root(data_dir)
    folder = root / name / str(builder.VERSION)
    ignored = 0

    def create_builder() -> Any:
        nonlocal ignored
        if name == "cifar10":
            return builders.Cifar10Archive(path, root)
        labeled = trees.label_files(path, test_fraction)
        ignored = labeled.ignored
        return builders.class_folders(name, labeled, root)

    is_new = _prepare(folder, root, create_builder, overwrite)
    with quiet_tfds():
        info = tfds.builder_from_directory(folder).info
    splits = {split: part.num_examples for split, part in info.splits.items()}
    class_names = tuple(info.features["label"].names)
    return Prepared(info.name, folder, splits, class_names, ignored, is_new)


def prepare_digits(data_dir: str) -> None:
    """Prepares scikit-learn's digits, unless they are prepared already."""
    from alexnet_jax.data.prepare import builders

    root = data_root(data_dir)
    folder = root / DIGITS / str(builders.ImageBuilder.VERSION)
    _prepare(folder, root, lambda: builders.digits(root), overwrite=False)


def prepare_registered(name: str, data_dir: str) -> None:
    """Lets TFDS download and prepare one of its own data sets; fails early without a network."""
    import tensorflow_datasets as tfds

    root = data_root(data_dir)
    try:
        with quiet_tfds():
            builder = tfds.builder(name, data_dir=str(root))
    except tfds.core.DatasetNotFoundError as error:
        raise InputError(_unknown_name(name, root)) from error
    except Exception as error:  # TFDS names no exceptions for a bad config or version.
        raise InputError(f"TFDS cannot provide {name}: {_first_line(error)}.") from error

    def create_builder() -> Any:
        check_downloads(builder, root / "downloads")
        return builder

    folder = Path(builder.data_dir)
    _prepare(folder, root, create_builder, overwrite=False, bars=sys.stderr.isatty())


def restore_replaced(name: str, data_dir: str) -> bool:
    """Restores a set whose replacement was killed, or waits for it; False if there is none."""
    replaced = list((data_root(data_dir) / name).glob(f"{_REPLACED}*"))
    for folder in replaced:
        with _only_writer(folder.with_name(folder.name.removeprefix(_REPLACED))):
            pass  # It has restored it.
    return bool(replaced)


def add_array_record(builder: Any) -> None:
    """Writes a prepared TFRecord data set a second time, beside it, as ArrayRecord.

    TFDS's own converter needs TensorFlow and Apache Beam. The builder does not see the new files:
    open the set again.
    """
    from tensorflow_datasets.core.file_adapters import FileFormat, convert_path_to_file_format

    folder = Path(builder.data_dir)
    remedy = "remove its folder, or choose another --config.data.data_dir, to prepare it again"
    if builder.info.file_format is not FileFormat.TFRECORD:
        found = builder.info.file_format.value
        raise InputError(f"{folder} is prepared as {found}, which is not read at random; {remedy}.")
    with _only_writer(folder):
        description = json.loads((folder / _INFO).read_text())
        formats = description.setdefault("alternativeFileFormats", [])
        if "array_record" in formats:  # Another process was faster.
            return
        shards = [
            (Path(file), count)
            for split in builder.info.splits.values()
            for file, count in zip(split.filepaths, split.shard_lengths, strict=True)
        ]
        total = sum(count for _, count in shards)
        with tqdm(desc=f"Converting {builder.name}", total=total, disable=None) as bar:
            for file, count in shards:
                target = convert_path_to_file_format(file, FileFormat.ARRAY_RECORD)
                try:
                    tfrecord.copy_records(file, Path(target), count, bar)
                except (OSError, ValueError, RuntimeError) as error:
                    raise InputError(f"{file} cannot be converted ({error}); {remedy}.") from error
        formats.append("array_record")
        # The new files count from here on; an interruption before this costs only time.
        files.write_json(folder / _INFO, description)


def run_builder(builder: Any, root: Path, bars: bool = False) -> None:
    """Has a TFDS builder prepare its data set, with errors in one sentence."""
    import tensorflow_datasets as tfds

    manual = root / "downloads" / "manual"
    config = tfds.download.DownloadConfig(manual_dir=manual, try_download_gcs=False)
    name = builder.name
    try:
        with quiet_tfds(bars):
            builder.download_and_prepare(download_config=config, file_format="array_record")
    except InputError:
        raise
    except ModuleNotFoundError as error:
        raise InputError(
            f"TFDS needs the package {error.name} to prepare {name}; install it with "
            f"`pip install {error.name}`."
        ) from error
    except Exception as error:  # Every one of TFDS's data sets fails in its own way.
        problem = _first_line(error)
        raise InputError(f"TFDS could not prepare {name} in {root}: {problem}.") from error


@contextlib.contextmanager
def quiet_tfds(bars: bool = False) -> Iterator[None]:
    """Silences TFDS and TensorFlow, except for errors and, if wanted, progress bars."""
    import tensorflow_datasets as tfds

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    changed = {name: value for name, value in _TENSORFLOW.items() if name not in os.environ}
    os.environ.update(changed)
    tfds.display_progress_bar(bars)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.display_progress_bar(True)
        for name in changed:
            os.environ.pop(name, None)
        logging.set_verbosity(verbosity)


def _prepare(
    folder: Path, root: Path, create_builder: Callable[[], Any], overwrite: bool, bars: bool = False
) -> bool:
    """Prepares `folder` unless it is prepared already; returns whether it did."""

    def is_done() -> bool:
        return not overwrite and (folder / _INFO).is_file()

    if is_done():
        return False
    with _only_writer(folder):
        if is_done():  # Another process was faster.
            return False
        replaced = folder.with_name(_REPLACED + folder.name)
        if folder.exists():
            folder.rename(replaced)
        try:
            run_builder(create_builder(), root, bars)
        finally:
            _restore(folder)
    return True


@contextlib.contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Lets one process at a time write a data set, and removes what a killed one left."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = (folder.parent / ".lock").open("w")
    except OSError as error:
        raise InputError(
            f"{folder.parent} cannot be written ({error.strerror}); choose another folder with "
            "--config.data.data_dir, or --data_dir of `alexnet-jax prepare`."
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _restore(folder)
        for unfinished in folder.parent.glob("incomplete.*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        yield


def _restore(folder: Path) -> None:
    """Moves a set that was to be replaced back, or removes it where the new one is complete."""
    replaced = folder.with_name(_REPLACED + folder.name)
    if replaced.exists() and not folder.exists():
        replaced.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


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


def default_name(path: Path) -> str:
    """Derives the name of a data set from the path of its archive or folder."""
    stem = path.name
    while Path(stem).suffix.lower() in trees.ARCHIVE_SUFFIXES:
        stem = Path(stem).stem
    name = re.sub(r"\W+", "_", stem.lower(), flags=re.ASCII).strip("_")
    return name if name[:1].isalpha() else f"images_{name}"


def _check_own_name(name: str) -> None:
    import tensorflow_datasets as tfds

    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise InputError(
            f"The name {name!r} cannot be used; take lowercase letters, digits and underscores, "
            "beginning with a letter."
        )
    if name == DIGITS or name in tfds.list_builders(with_community_datasets=False):
        raise InputError(f"The name {name!r} is another data set's; choose your own with --name.")


def _unknown_name(name: str, root: Path) -> str:
    import tensorflow_datasets as tfds

    # Community data sets are listed on the network, which takes many seconds and TensorFlow.
    known = {DIGITS, *tfds.list_builders(with_community_datasets=False)}
    known |= {info.relative_to(root).parts[0] for info in root.glob(f"*/*/{_INFO}")}
    near = difflib.get_close_matches(name.lower(), sorted(known))
    hint = f"did you mean {', '.join(near)}?" if near else "prepare it with `alexnet-jax prepare`."
    return f"There is no data set {name!r} in {root} or in TFDS; {hint}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".:")
