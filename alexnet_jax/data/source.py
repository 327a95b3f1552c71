"""Data sets by name: prepared if need be, then read at random as square RGB images.

Reading needs TFDS but never TensorFlow. Importing TFDS and letting it open a set takes half a
second, so it is imported inside functions, and what it says of a split is cached for the next run.
"""

import hashlib
import json
import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from alexnet_jax import environment
from alexnet_jax.data.decode import decode
from alexnet_jax.data.options import DataConfig
from alexnet_jax.data.prepare import prepare
from alexnet_jax.errors import InputError
from alexnet_jax.run import files

log = logging.getLogger(__name__)

_CACHE_FORMAT = 3  # To be raised when TFDS is asked differently, or digits has another version.
# What a checksum reads of a larger set, in blocks spread evenly; 0.1 s where the system has the
# files in memory. Damage between them is left to the checksums in the files.
_CHECKSUM_BYTES = 256 * 2**20
_BLOCK = 2**16
_READ_AT_ONCE = 256  # Records per call; ArrayRecord reads a batch about 5 times as fast as singles.


class Shard(NamedTuple):
    """A file of serialized examples, and which of them are in a split; as ArrayRecord takes it."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


@dataclass(frozen=True)
class SplitInfo:
    """One split of a prepared data set."""

    name: str  # of the data set and the split
    class_names: tuple[str, ...]  # by label
    folder: str  # where the set is prepared
    image_key: str  # names of the two features of an example
    label_key: str
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Source(SplitInfo):
    """An open split: `source[i]` is {"image": uint8[S, S, 3], "label": int}.

    It can be pickled: the other process opens the files itself.
    """

    image_size: int  # S
    records: Any  # the serialized examples, an ArrayRecordDataSource

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(S, S, 3)."""
        return (self.image_size, self.image_size, 3)

    @property
    def fingerprint(self) -> str:
        """Names, sizes and times of the files; where they differ, the images may, too."""
        parts = []
        for filename, skip, take, _ in self.shards:
            status = Path(filename).stat()
            parts.append((Path(filename).name, status.st_size, status.st_mtime_ns, skip, take))
        return json.dumps(parts)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} images, no number {index}")
        images, labels = self.read([index])
        return {"image": images[0], "label": int(labels[0])}

    def read_all(self) -> tuple[np.ndarray, np.ndarray]:
        """Reads every image as `read` does, with a progress bar on a terminal."""
        # In one thread: Pillow holds Python's lock while it decodes. The delay hides short bars.
        title = f"Reading {self.name}"
        with tqdm(desc=title, total=len(self), unit="img", disable=None, delay=1) as bar:
            return self.read(range(len(self)), bar.update)

    def read(
        self, indices: Sequence[int] | np.ndarray, update: Callable[[], Any] = lambda: None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns images uint8[n, S, S, 3] and labels int32[n]; calls `update` after each."""
        images = np.empty((len(indices), *self.image_shape), np.uint8)
        labels = np.empty(len(indices), np.int32)
        read_image = partial(decode, size=self.image_size)
        for row, (image, label) in enumerate(self._examples(indices, read_image)):
            images[row], labels[row] = image, label
            update()
        return images, labels

    def read_labels(self) -> np.ndarray:
        """Returns every label, int32[N], without decoding an image."""
        examples = self._examples(range(len(self)), lambda encoded: None)
        return np.fromiter((label for _, label in examples), np.int32, len(self))

    def checksum(self) -> str:
        """Identifies the content of the files, wherever they are, by size and CRC-32."""
        paths = [Path(shard.filename) for shard in self.shards]
        sizes = [path.stat().st_size for path in paths]
        checksum = zlib.crc32(repr(sizes).encode())
        stride = max(1, sum(sizes) // _CHECKSUM_BYTES) * _BLOCK
        for path, size in zip(paths, sizes, strict=True):
            with path.open("rb") as file:
                for start in range(0, size, stride):
                    file.seek(start)
                    checksum = zlib.crc32(file.read(_BLOCK), checksum)
        return f"{sum(sizes):,} bytes with checksum {checksum:08x}"

    def _examples(
        self, indices: Sequence[int] | np.ndarray, read_image: Callable[[bytes], Any]
    ) -> Iterator[tuple[Any, int]]:
        """Yields images, as `read_image` returns them, and labels."""
        from tensorflow_datasets.proto import tf_example_pb2

        for start in range(0, len(indices), _READ_AT_ONCE):
            some = [int(index) for index in indices[start : start + _READ_AT_ONCE]]
            try:
                records = self.records.__getitems__(some)
            except RuntimeError as error:  # ArrayRecord's, where a checksum is wrong.
                problem = f"The files of {self.name} are damaged ({error})"
                raise _broken(problem, self.folder) from error
            for index, record in zip(some, records, strict=True):
                try:
                    features = tf_example_pb2.Example.FromString(record).features.feature
                    label = features[self.label_key].int64_list.value[0]
                    image = read_image(features[self.image_key].bytes_list.value[0])
                except Exception as error:  # On bad bytes Pillow raises nearly every kind.
                    problem = f"Image {index} of {self.name} cannot be decoded ({error})"
                    raise _broken(problem, self.folder) from error
                if not 0 <= label < len(self.class_names):
                    raise InputError(
                        f"Image {index} of {self.name} has the label {label}, which is none of "
                        f"the {len(self.class_names)} classes; choose a split that has labels."
                    )
                yield image, label


def load_source(config: DataConfig, split: str) -> Source:
    """Opens one split of a data set; prepares the set first where that is needed.

    The name is looked up as "digits", then among the sets prepared in `data_dir`, then among those
    that TFDS can download. Sets prepared as TFRecord are converted, beside the original.

    Args:
        config: `name`, `data_dir` and `image_size` are used here.
        split: A TFDS split, such as "train" or "train[:90%]".
    """
    if config.image_size < 1:
        raise InputError(f"config.data.image_size is {config.image_size}; it must be at least 1.")
    prepare.check_name(config.name)
    info = _cached_split(config.name, config.data_dir, split)
    return Source(**vars(info), image_size=config.image_size, records=_open(info.shards))


def _cached_split(name: str, data_dir: str, split: str) -> SplitInfo:
    """Returns what `find_split` does, from the user's cache where nothing has changed since."""
    root = prepare.data_root(data_dir)
    digest = hashlib.sha256(json.dumps([str(root), name, split]).encode()).hexdigest()
    path = environment.cache_folder() / "splits" / f"{digest[:32]}.json"
    try:
        content = json.loads(path.read_text())
        found = content["split"]
        found["class_names"] = tuple(found["class_names"])
        found["shards"] = tuple(Shard(*shard) for shard in found["shards"])
        info = SplitInfo(**found)
        if content["state"] == _state(root, info.folder):
            return info
    except (OSError, ValueError, TypeError, KeyError):  # Missing, damaged, or of other versions.
        pass
    info = find_split(name, data_dir, split)
    try:
        files.write_json(path, {"split": asdict(info), "state": _state(root, info.folder)})
    except (OSError, ValueError) as error:  # ValueError: the set is outside the root.
        log.debug("Not cached: %s (%s).", path, error)
    return info


def _state(root: Path, set_folder: str) -> list[Any]:
    """Changes when TFDS would find another set by the name, or other files in it."""
    folder = Path(set_folder)
    # Configs and versions are folders in these; what is computed has a folder in the set's.
    above = folder.parents[: len(folder.relative_to(root).parts) - 1]
    state: list[Any] = [_CACHE_FORMAT, *(parent.stat().st_mtime_ns for parent in above)]
    for file in sorted(folder.iterdir()):
        status = file.stat()
        if file.is_file():
            state.append([file.name, status.st_size, status.st_mtime_ns])
    return state


def find_split(name: str, data_dir: str, split: str) -> SplitInfo:
    """Asks TFDS for a split, whose data set is prepared first where it is not yet."""
    builder = _builder(name, data_dir)
    image_key, label_key = _image_and_label(builder.info)
    return SplitInfo(
        name=f"{builder.info.name} {split}",
        class_names=_class_names(builder, label_key),
        folder=str(builder.data_dir),
        image_key=image_key,
        label_key=label_key,
        shards=_shards(builder.info, split),
    )


def _builder(name: str, data_dir: str) -> Any:
    """Returns a TFDS builder of the named set that reads it from disk, as ArrayRecord."""
    if name == prepare.DIGITS:
        prepare.prepare_digits(data_dir)
    builder = _open_prepared(name, data_dir)
    if builder is None and prepare.restore_replaced(name, data_dir):
        builder = _open_prepared(name, data_dir)
    if builder is None:
        prepare.prepare_registered(name, data_dir)
        builder = _open_prepared(name, data_dir)
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if "array_record" not in formats:
        prepare.add_array_record(builder)
        builder = _open_prepared(name, data_dir)
    # Otherwise it names the files that it was prepared in.
    builder.info.set_file_format("array_record", override=True, override_if_initialized=True)
    return builder


def _open_prepared(name: str, data_dir: str) -> Any:
    import tensorflow_datasets as tfds

    root = str(prepare.data_root(data_dir))
    try:
        with prepare.quiet_tfds():
            builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=root)
            for split in builder.info.splits.values():
                _ = split.filenames  # A damaged template of these names would raise later.
            return builder
    except tfds.core.DatasetNotFoundError:
        return None
    except Exception as error:  # Whatever parsing damaged JSON raises.
        problem = f"The data set {name} in {root} cannot be opened ({error})"
        raise _broken(problem, "its folder") from error


def _image_and_label(info: Any) -> list[str]:
    """Finds the names of these two among the features of a set."""
    import tensorflow_datasets as tfds

    features = sorted(info.features.items())  # They are stored in no fixed order.
    preferred = [*(info.supervised_keys or ()), "image", "label"]
    found = []
    for kind in (tfds.features.Image, tfds.features.ClassLabel):
        keys = [key for key, feature in features if isinstance(feature, kind)]
        if not keys:
            has = ", ".join(f"{key} ({type(feature).__name__})" for key, feature in features)
            raise InputError(
                f"{info.name} is not for image classification: it needs an Image and a "
                f"ClassLabel, and has {has}."
            )
        found.append(next((key for key in preferred if key in keys), keys[0]))
    return found


def _class_names(builder: Any, label_key: str) -> tuple[str, ...]:
    """Returns the names by label; a damaged file would shift them, or TFDS replace them."""
    label = builder.info.features[label_key]
    names = tuple(label.names)
    file = Path(label.get_names_filepath(builder.data_dir, label_key))
    try:
        if len(names) != label.num_classes or len(set(names)) != len(names):
            raise ValueError(f"{len(set(names))} different names for {label.num_classes} classes")
        if file.is_file():
            file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise _broken(f"{file} is damaged ({error})", file.parent) from error
    return names


def _shards(info: Any, split: str) -> tuple[Shard, ...]:
    try:
        with prepare.quiet_tfds():
            parts = info.splits[split].file_instructions
        if not any(part.take for part in parts):
            raise ValueError("the split is empty")
    except Exception as error:  # TFDS has its own for a bad name, a bad slice and an empty one.
        known = ", ".join(f"{key} ({part.num_examples})" for key, part in info.splits.items())
        raise InputError(
            f"{info.name} has no images for the split {split!r}; it has {known}, and slices of "
            "them such as 'train[:90%]'."
        ) from error
    return tuple(Shard(str(p.filename), p.skip, p.take, p.examples_in_shard) for p in parts)


def _open(shards: Sequence[Shard]) -> Any:
    from array_record.python.array_record_data_source import ArrayRecordDataSource
    from array_record.python.array_record_module import ArrayRecordReader

    for shard in shards:
        file = Path(shard.filename)
        try:  # The records have checksums; TFDS's counts of them have none.
            reader = ArrayRecordReader(shard.filename)
            found = reader.num_records()
            reader.close()
        except RuntimeError as error:
            state = f"damaged ({error})" if file.is_file() else "missing"
            raise _broken(f"The file {file} is {state}", file.parent) from error
        if found != (expected := shard.examples_in_shard):
            raise _broken(f"The file {file} has {found:,} records, not {expected:,}", file.parent)
    return ArrayRecordDataSource(shards)


def _broken(problem: str, folder: str | Path) -> InputError:
    return InputError(f"{problem}; remove {folder} and prepare the data set again.")
