"""TFDS builders for data that TFDS cannot prepare itself, none of which needs TensorFlow.

TFDS runs TensorFlow only to encode arrays, so these builders yield images that are encoded
already. Importing this module imports TFDS (half a second): import it inside functions.
"""

import dataclasses
import hashlib
import io
import pickletools
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.image_classification.cifar import Cifar10
from tqdm import tqdm

from alexnet_jax.data import decode
from alexnet_jax.data.prepare import trees
from alexnet_jax.errors import InputError

# The two official archives, and the sha256 of each.
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/"
CIFAR10_SHA256 = {
    "cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    "cifar-10-python.tar.gz": "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
}

Examples = Iterator[tuple[int | str, dict[str, Any]]]


class Digits(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """scikit-learn's 1,797 handwritten digits: a real data set that needs no download."""

    name = "digits"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=(
                "Handwritten digits of 43 writers, reduced to 8x8 grey values: the part of the "
                "UCI set that ships with scikit-learn, split 4 to 1 with every digit in proportion."
            ),
            homepage="https://archive.ics.uci.edu/dataset/80",
            citation=(
                "E. Alpaydin and C. Kaynak. Optical Recognition of Handwritten Digits. "
                "UCI Machine Learning Repository, 1998."
            ),
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Examples]:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        train, test = train_test_split(
            np.arange(len(digits.target)), test_size=360, stratify=digits.target, random_state=0
        )
        pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
        return {
            "train": self._generate_examples(train, pixels, digits.target),
            "test": self._generate_examples(test, pixels, digits.target),
        }

    def _generate_examples(
        self, chosen: np.ndarray, pixels: np.ndarray, labels: np.ndarray
    ) -> Examples:
        for index in chosen.tolist():
            image = io.BytesIO(decode.encode_png(pixels[index]))
            yield index, {"image": image, "label": int(labels[index])}


class Cifar10Archive(Cifar10, skip_registration=True):  # type: ignore[call-arg]
    """An official CIFAR-10 archive as TFDS's own `cifar10`: the same folder, records and order.

    Args:
        archive: The binary or the python archive, under its official name.
        data_dir: Root of the prepared data sets; None for TFDS's usual folder.
        sha256: The sum to expect for each official name.
        progress: Whether to show a bar on a terminal.

    Raises:
        InputError: The archive is not the official file.
    """

    name = "cifar10"

    def __init__(
        self,
        archive: Path,
        *,
        data_dir: str | None = None,
        sha256: Mapping[str, str] = CIFAR10_SHA256,
        progress: bool = True,
    ) -> None:
        self._archive = archive
        self._progress = progress
        check_sha256(archive, sha256[archive.name], f"download it again from {CIFAR10_URL}")
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Examples]:
        data = read_cifar10(self._archive)
        self.info.features["label"].names = list(data.class_names)
        return {
            "train": self._generate_examples("train", *data.train),
            "test": self._generate_examples("test", *data.test),
        }

    def _generate_examples(self, split: str, labels: np.ndarray, pixels: np.ndarray) -> Examples:
        # The keys are TFDS's: it orders the records by a hash of the key and the split's name.
        pairs = zip(labels.tolist(), pixels, strict=True)
        for index, (label, image) in enumerate(bar(pairs, len(labels), split, self._progress)):
            yield (
                index,
                {
                    "id": f"{split}_{index:05d}",
                    "image": io.BytesIO(decode.encode_png(image)),
                    "label": label,
                },
            )


class ClassFolders(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Images in one folder for each class, read from a folder or straight from an archive.

    Args:
        name: What the data set will be called.
        layout: Which image goes where (`trees.find_layout`).
        data_dir: Root of the prepared data sets; None for TFDS's usual folder.
        progress: Whether to show a bar on a terminal.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self,
        name: str,
        layout: trees.Layout,
        *,
        data_dir: str | None = None,
        progress: bool = True,
    ) -> None:
        self.name = name
        self._layout = layout
        self._progress = progress
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Folders of images, one for each class, taken from {self._layout.path}.",
            features=tfds.features.FeaturesDict(
                {
                    "filename": tfds.features.Text(),
                    "image": tfds.features.Image(),
                    "label": tfds.features.ClassLabel(names=list(self._layout.class_names)),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Examples]:
        return {
            split: self._generate_examples(split, labels)
            for split, labels in self._layout.splits.items()
        }

    def _generate_examples(self, split: str, labels: Mapping[str, str]) -> Examples:
        entries = trees.walk(self._layout.path)
        chosen = (entry for entry in entries if entry.read and entry.name in labels)
        for entry in bar(chosen, len(labels), split, self._progress):
            with trees.readable(self._layout.path):
                data = entry.read()
            encoded = decode.normalize_encoded(data, entry.name)
            yield (
                entry.name,
                {
                    "filename": entry.name,
                    "image": io.BytesIO(encoded),
                    "label": labels[entry.name],
                },
            )


def bar(items: Iterable[Any], total: int, split: str, progress: bool) -> Iterable[Any]:
    """Wraps `items` in a progress bar with the time left, which shows on a terminal only."""
    return tqdm(items, f"Preparing {split}", total, disable=None if progress else True, unit="img")


def check_sha256(path: Path, expected: str, remedy: str) -> None:
    """Raises InputError, which ends in `remedy`, unless the file has the expected sha256."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise InputError(
            f"{path} is damaged or another file: its sha256 is {found}, expected {expected}; "
            f"{remedy}."
        )


@dataclasses.dataclass(frozen=True)
class Cifar10Data:
    """CIFAR-10 in memory.

    Attributes:
        class_names: The ten names, by label.
        train: labels uint8[N] and pixels uint8[N, 32, 32, 3], in the official order.
        test: The same of the test images.
    """

    class_names: tuple[str, ...]
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


def read_cifar10(archive: Path) -> Cifar10Data:
    """Reads an official CIFAR-10 archive, binary or python, without unpickling anything.

    Args:
        archive: A tar.gz whose members have the official names.

    Raises:
        InputError: The archive cannot be read, or lacks a part or holds a malformed one.
    """
    files = {}
    with trees.readable(archive), tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            if member.isfile() and (content := tar.extractfile(member)) is not None:
                files[PurePosixPath(member.name).name] = content.read()
    binary = "batches.meta.txt" in files
    suffix, read_batch = (".bin", _read_binary_batch) if binary else ("", _read_python_batch)
    try:
        if binary:
            names = files["batches.meta.txt"].decode().split()
        else:
            names = _pickled_list(files["batches.meta"], "label_names")
        train = [read_batch(files[f"data_batch_{part}{suffix}"]) for part in range(1, 6)]
        test = read_batch(files[f"test_batch{suffix}"])
    except KeyError as error:
        raise InputError(f"{archive} has no member {error}; it is no CIFAR-10 archive.") from error
    except ValueError as error:
        raise InputError(f"{archive} is no valid CIFAR-10 archive: {error}.") from error
    labels, pixels = zip(*train, strict=True)
    return Cifar10Data(tuple(names), (np.concatenate(labels), np.concatenate(pixels)), test)


def _read_binary_batch(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Splits records of one label byte and 3,072 bytes of pixels, channel by channel."""
    records = np.frombuffer(data, np.uint8).reshape(-1, 1 + 3072)
    return records[:, 0], _channels_last(records[:, 1:])


def _read_python_batch(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Finds labels and pixels in a pickle by reading its opcodes, which executes nothing."""
    strings = (argument for _, argument, _ in pickletools.genops(data))
    pixels = [item for item in strings if _is_text(item) and item and len(item) % 3072 == 0]
    if len(pixels) != 1:
        raise ValueError(f"a batch has {len(pixels)} blocks of pixels, not one")
    # pickletools shows the strings of a Python 2 pickle as Latin-1, which maps every byte.
    content = pixels[0].encode("latin-1") if isinstance(pixels[0], str) else pixels[0]
    labels = np.array(_pickled_list(data, "labels"), np.uint8)
    images_chw = np.frombuffer(content, np.uint8).reshape(-1, 3072)
    if len(labels) != len(images_chw):
        raise ValueError(f"a batch has {len(images_chw)} images but {len(labels)} labels")
    return labels, _channels_last(images_chw)


def _pickled_list(data: bytes, key: str) -> list[Any]:
    """Finds the numbers or strings of the list that follows the string `key` in a pickle."""
    items: list[Any] = []
    found = inside = False
    for opcode, argument, _ in pickletools.genops(data):
        if not found:
            found = argument == key
        elif opcode.name in ("MARK", "APPENDS"):  # They enclose each thousand items.
            inside = opcode.name == "MARK"
        elif inside and (_is_text(argument) or opcode.name.startswith("BININT")):
            items.append(argument)
        elif _is_text(argument):  # The next key.
            break
    return items


def _is_text(argument: object) -> bool:
    return isinstance(argument, str | bytes)


def _channels_last(rows: np.ndarray) -> np.ndarray:
    return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
