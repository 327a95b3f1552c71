"""Data sets by name: prepared if need be, then read at random as square RGB images.

Reading needs TFDS but never TensorFlow. TFDS takes half a second to import, so every import of it
stands inside a function, and a set that was opened before is opened without it (`layouts`).
"""

import dataclasses
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from alexnet_jax.data import layouts
from alexnet_jax.data.decode import decode
from alexnet_jax.data.layouts import Layout, Shard
from alexnet_jax.data.prepare import prepare
from alexnet_jax.errors import InputError

# What a checksum reads of a larger set, in blocks spread evenly; 0.1 s where the system has the
# files in memory. Damage between them is left to the checksums in the files.
_CHECKSUM_BYTES = 256 * 2**20
_BLOCK = 2**16

_READ_AT_ONCE = 256  # Records per call; ArrayRecord reads a batch about 5 times as fast as singles.


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a data set: `source[i]` is {"image": uint8[S, S, 3], "label": int}.

    It can be pickled, which opens the files anew in the other process.

    Attributes:
        name: What to call it in messages: the data set and the split.
        class_names: By label.
        image_size: S, the side of every image.
        records: The serialised examples (array_record's data source).
        files: Where these lie.
        image_key: Name of the image in an example.
        label_key: Name of the label in an example.
        folder: Where the set lies prepared.
        fingerprint: Of the split and the files it is read from, by their names, sizes and times;
            another one tells that the images may be others.
    """

    name: str
    class_names: tuple[str, ...]
    image_size: int
    records: Any
    files: tuple[Path, ...]
    image_key: str
    label_key: str
    folder: str
    fingerprint: str

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of every image: (S, S, 3)."""
        return (self.image_size, self.image_size, 3)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} images, no number {index}")
        image, label = self._decode(index, self._read([int(index)])[0])
        return {"image": image, "label": label}

    def read_all(self, progress: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Reads every image into memory.

        It runs in one thread: Pillow holds Python's lock while it decodes.

        Args:
            progress: Whether to show a bar on a terminal.

        Returns:
            Images uint8[N, S, S, 3] and labels int32[N], in the order of the indices.

        Raises:
            InputError: A record is damaged or has no label.
        """
        hidden = None if progress else True
        # A bar is for what lasts: small sets are read before the delay is over.
        with tqdm(
            desc=f"Reading {self.name}", total=len(self), unit="img", disable=hidden, delay=1
        ) as bar:
            return self.read(range(len(self)), bar.update)

    def read(
        self, indices: Sequence[int] | np.ndarray, tell: Callable[[], Any] = lambda: None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Reads some images into memory.

        Args:
            indices: Which, in the wanted order.
            tell: Called after each image.

        Returns:
            Images uint8[n, S, S, 3] and labels int32[n], in the order of the indices.

        Raises:
            InputError: A record is damaged or has no label.
        """
        images = np.empty((len(indices), *self.image_shape), np.uint8)
        labels = np.empty(len(indices), np.int32)
        for row, (index, record) in enumerate(self._records(indices)):
            images[row], labels[row] = self._decode(index, record)
            tell()
        return images, labels

    def checksum(self) -> str:
        """Tells the content of the files, wherever they lie: size, and CRC-32 of sizes and bytes.

        Of more than 256 MiB only as much is read, in blocks spread evenly over all files.
        """
        sizes = [path.stat().st_size for path in self.files]
        checksum = zlib.crc32(repr(sizes).encode())
        stride = max(1, sum(sizes) // _CHECKSUM_BYTES) * _BLOCK
        for path, size in zip(self.files, sizes, strict=True):
            with path.open("rb") as file:
                for start in range(0, size, stride):
                    file.seek(start)
                    checksum = zlib.crc32(file.read(_BLOCK), checksum)
        return f"{sum(sizes):,} bytes with checksum {checksum:08x}"

    def read_labels(self) -> np.ndarray:
        """Reads every label, int32[N], without decoding an image.

        Raises:
            InputError: A record is damaged or has no label.
        """
        return np.fromiter(
            (self._parse(index, record)[1] for index, record in self._records(range(len(self)))),
            np.int32,
            len(self),
        )

    def _records(self, indices: Sequence[int] | np.ndarray) -> Iterator[tuple[int, bytes]]:
        for start in range(0, len(indices), _READ_AT_ONCE):
            some = [int(index) for index in indices[start : start + _READ_AT_ONCE]]
            yield from zip(some, self._read(some), strict=True)

    def _read(self, indices: Sequence[int]) -> Sequence[bytes]:
        try:
            return self.records.__getitems__(indices)
        except RuntimeError as error:  # ArrayRecord's, where a checksum is wrong.
            raise InputError(
                f"The files of {self.name} are damaged ({error}); remove their folder and prepare "
                "the data set again."
            ) from error

    def _parse(self, index: int, record: bytes) -> tuple[bytes, int]:
        """Returns the encoded image and the label of a record."""
        from tensorflow_datasets.proto import tf_example_pb2

        try:
            features = tf_example_pb2.Example.FromString(record).features.feature
            label = features[self.label_key].int64_list.value[0]
            encoded = features[self.image_key].bytes_list.value[0]
        except Exception as error:  # Protobuf's own, or an IndexError where a feature is empty.
            raise self._damaged(index, error) from error
        if not 0 <= label < len(self.class_names):
            raise InputError(
                f"Image {index} of {self.name} has the label {label}, which is none of the "
                f"{len(self.class_names)} classes; choose a split that has labels."
            )
        return encoded, label

    def _decode(self, index: int, record: bytes) -> tuple[np.ndarray, int]:
        encoded, label = self._parse(index, record)
        try:
            return decode(encoded, self.image_size), label
        except Exception as error:  # Pillow raises nearly every kind of exception on bad bytes.
            raise self._damaged(index, error) from error

    def _damaged(self, index: int, error: Exception) -> InputError:
        return InputError(
            f"Image {index} of {self.name} cannot be decoded ({error}); prepare the data set again."
        )


def load_source(config: ConfigDict, split: str, *, progress: bool = True) -> Source:
    """Opens one split of a data set; prepares the set first where that is needed.

    The name is looked up as our own "digits", then among the sets prepared in `data_dir`, then
    among those TFDS can download. Sets prepared as TFRecord are converted, beside the original.

    Args:
        config: The section `config.data`; `name`, `data_dir` and `image_size` are used here.
        split: A TFDS split, such as "train" or "train[:90%]".
        progress: Whether to show bars on a terminal while preparing.

    Returns:
        The split's images as uint8[image_size, image_size, 3].

    Raises:
        InputError: The name or the split is unknown, the data cannot be had or read, or it is no
            image classification.
    """
    if config.image_size < 1:
        raise InputError(f"config.data.image_size is {config.image_size}; it must be at least 1.")
    prepare.check_name(config.name)
    layout = layouts.kept(
        prepare.data_root(config.data_dir),
        config.name,
        split,
        lambda: _ask_tfds(config.name, config.data_dir, split, progress),
    )
    return Source(
        name=f"{layout.name} {split}",
        class_names=layout.class_names,
        image_size=config.image_size,
        records=_open(layout.shards),
        files=tuple(Path(shard.filename) for shard in layout.shards),
        image_key=layout.image_key,
        label_key=layout.label_key,
        folder=layout.folder,
        fingerprint=_fingerprint(layout.shards),
    )


def _ask_tfds(name: str, data_dir: str, split: str, progress: bool) -> Layout:
    """Returns how a split lies in its files, which are prepared first where they are not yet."""
    builder = _builder(name, data_dir, progress)
    image_key, label_key = _image_and_label(builder.info)
    return Layout(
        name=builder.info.name,
        folder=str(builder.data_dir),
        class_names=_class_names(builder, label_key),
        image_key=image_key,
        label_key=label_key,
        shards=_shards(builder, split),
    )


def _builder(name: str, data_dir: str, progress: bool) -> Any:
    """Returns a TFDS builder of the named set that reads it from disk, as ArrayRecord."""
    if name == prepare.DIGITS:
        prepare.prepare_digits(data_dir)
    builder = _open_prepared(name, data_dir)
    if builder is None and prepare.restore_replaced(name, data_dir):
        builder = _open_prepared(name, data_dir)
    if builder is None:
        prepare.prepare_registered(name, data_dir, progress)
        builder = _open_prepared(name, data_dir)
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if "array_record" not in formats:
        prepare.add_array_record(builder, progress)
        builder = _open_prepared(name, data_dir)
    # Otherwise it tells of the files that it was prepared in.
    builder.info.set_file_format("array_record", override=True, override_if_initialized=True)
    return builder


def _open_prepared(name: str, data_dir: str) -> Any:
    """Returns a TFDS builder of the named set, or None if none is prepared."""
    import tensorflow_datasets as tfds

    root = prepare.data_root(data_dir)
    try:
        with prepare.quiet_tfds():
            builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=str(root))
            for split in builder.info.splits.values():
                _ = split.filenames  # A damaged template of these names would raise later.
            return builder
    except tfds.core.DatasetNotFoundError:
        return None
    except Exception as error:  # Whatever parsing damaged JSON raises.
        raise InputError(
            f"The data set {name} in {root} cannot be opened ({error}); remove its folder there "
            "and prepare it again."
        ) from error


def _image_and_label(info: Any) -> tuple[str, str]:
    """Finds the names of the image and the label in a set's examples."""
    import tensorflow_datasets as tfds

    features = sorted(info.features.items())  # They are stored in no fixed order.
    images, labels = (
        [key for key, feature in features if isinstance(feature, kind)]
        for kind in (tfds.features.Image, tfds.features.ClassLabel)
    )
    match info.supervised_keys:
        case (image, label) if image in images and label in labels:
            return image, label
    if not images or not labels:
        found = ", ".join(f"{key} ({type(feature).__name__})" for key, feature in features)
        raise InputError(
            f"{info.name} is no image classification set: it needs an Image and a ClassLabel, "
            f"and has {found}."
        )
    return (
        "image" if "image" in images else images[0],
        "label" if "label" in labels else labels[0],
    )


def _check_count(filename: str, expected: int) -> None:
    """Compares with the file's own count; the records have checksums, TFDS's counts have none."""
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(filename)
        found = reader.num_records()
        reader.close()
    except RuntimeError as error:
        raise InputError(
            f"The file {filename} is damaged ({error}); remove its folder and prepare the data set "
            "again."
        ) from error
    if found != expected:
        raise InputError(
            f"The file {filename} has {found:,} records and its data set counts {expected:,}; "
            "remove its folder and prepare the data set again."
        )


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
        raise InputError(
            f"{file} is damaged ({error}); remove its folder and prepare the data set again."
        ) from error
    return names


def _shards(builder: Any, split: str) -> tuple[Shard, ...]:
    """Returns the files of a split."""
    try:
        with prepare.quiet_tfds():
            instructions = builder.info.splits[split].file_instructions
        if not any(part.take for part in instructions):
            raise ValueError("the split is empty")
    except Exception as error:  # TFDS has its own for a bad name, a bad slice and an empty one.
        known = ", ".join(
            f"{key} ({info.num_examples})" for key, info in builder.info.splits.items()
        )
        raise InputError(
            f"{builder.info.name} has no images for the split {split!r}; it has {known}, and "
            "slices of them such as 'train[:90%]'."
        ) from error
    return tuple(
        Shard(str(part.filename), part.skip, part.take, part.examples_in_shard)
        for part in instructions
    )


def _open(shards: Sequence[Shard]) -> Any:
    """Opens the serialised examples of a split."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    for shard in shards:
        if not Path(shard.filename).is_file():
            raise InputError(
                f"The file {shard.filename} is missing; remove its folder and prepare the data set "
                "again."
            )
        _check_count(shard.filename, shard.examples_in_shard)
    return ArrayRecordDataSource(shards)


def _fingerprint(shards: Sequence[Shard]) -> str:
    """Tells the content of a split by its place in the files, and their names, sizes and times."""
    parts = []
    for shard in shards:
        file = Path(shard.filename)
        status = file.stat()
        parts.append((file.name, status.st_size, status.st_mtime_ns, shard.skip, shard.take))
    return json.dumps(parts)
