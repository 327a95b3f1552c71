"""TFDS builders for data that TFDS cannot prepare itself, none of which needs TensorFlow.

TFDS runs TensorFlow only to encode arrays, so these builders yield images that are encoded
already. Importing this module imports TFDS (half a second): import it inside functions.
"""

import io
import itertools
import pickletools
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.image_classification.cifar import Cifar10
from tqdm import tqdm

from alexnet_jax.data import decode
from alexnet_jax.data.prepare import trees
from alexnet_jax.data.prepare.downloads import check_sha256
from alexnet_jax.errors import InputError

# The two official archives, and the sha256 of each.
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/"
CIFAR10_SHA256 = {
    "cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    "cifar-10-python.tar.gz": "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
}

Examples = Iterator[tuple[int | str, dict[str, Any]]]


class ImageBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """A data set of encoded images, whose splits `examples` returns when it is prepared.

    Its features have an "image" and a "label"; `info` is for `tfds.core.DatasetInfo`.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self,
        name: str,
        data_dir: Path,
        features: dict[str, Any],
        examples: Callable[[], dict[str, Examples]],
        **info: str,
    ) -> None:
        self.name = name
        self._features, self._examples, self._arguments = features, examples, info
        super().__init__(data_dir=str(data_dir), file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        features, keys = tfds.features.FeaturesDict(self._features), ("image", "label")
        return tfds.core.DatasetInfo(
            builder=self, features=features, supervised_keys=keys, **self._arguments
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Examples]:
        return self._examples()

    def _generate_examples(self) -> Examples:
        raise NotImplementedError


def digits(data_dir: Path) -> ImageBuilder:
    """Returns scikit-learn's 1,797 handwritten digits: a real data set that needs no download."""

    def examples() -> dict[str, Examples]:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        data = load_digits()
        train, test = train_test_split(
            np.arange(len(data.target)), test_size=360, stratify=data.target, random_state=0
        )
        pixels = np.round(data.images * (255 / 16)).astype(np.uint8)

        def generate(chosen: np.ndarray) -> Examples:
            for index in chosen.tolist():
                image = io.BytesIO(decode.encode_png(pixels[index]))
                yield index, {"image": image, "label": int(data.target[index])}

        return {"train": generate(train), "test": generate(test)}

    features = {
        "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
        "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
    }
    return ImageBuilder(
        "digits",
        data_dir,
        features,
        examples,
        description=(
            "Handwritten digits of 43 writers, reduced to 8x8 gray values: the part of the "
            "UCI set that ships with scikit-learn, split 4 to 1 with every digit in proportion."
        ),
        homepage="https://archive.ics.uci.edu/dataset/80",
        citation=(
            "E. Alpaydin and C. Kaynak. Optical Recognition of Handwritten Digits. "
            "UCI Machine Learning Repository, 1998."
        ),
    )


def class_folders(name: str, files: trees.LabeledFiles, data_dir: Path) -> ImageBuilder:
    """Returns the images of a folder or an archive, which is read without unpacking it."""

    def generate(split: str, labels: Mapping[str, str]) -> Examples:
        chosen = (entry for entry in trees.walk(files.path) if entry.read and entry.name in labels)
        for entry in bar(chosen, len(labels), split):
            name = entry.name
            with trees.readable(files.path):
                data = entry.read()
            image = io.BytesIO(decode.to_jpeg_or_png(data, name))
            yield name, {"filename": name, "image": image, "label": labels[name]}

    return ImageBuilder(
        name,
        data_dir,
        {
            "filename": tfds.features.Text(),
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(names=list(files.class_names)),
        },
        lambda: {split: generate(split, labels) for split, labels in files.splits.items()},
        description=f"Folders of images, one for each class, from {files.path}.",
    )


class Cifar10Archive(Cifar10, skip_registration=True):  # type: ignore[call-arg]
    """An official CIFAR-10 archive as TFDS's own `cifar10`: the same folder, records and order."""

    name = "cifar10"

    def __init__(self, archive: Path, data_dir: Path) -> None:
        self._archive = archive
        remedy = f"download it again from {CIFAR10_URL}"
        check_sha256(archive, CIFAR10_SHA256[archive.name], remedy)
        super().__init__(data_dir=str(data_dir), file_format="array_record")

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Examples]:
        self.info.features["label"].names, splits = read_cifar10(self._archive)
        return {split: self._generate_examples(split, *part) for split, part in splits.items()}

    def _generate_examples(self, split: str, labels: np.ndarray, pixels: np.ndarray) -> Examples:
        # The keys are TFDS's: it orders the records by a hash of the key and the split's name.
        pairs = zip(labels.tolist(), pixels, strict=True)
        for index, (label, image) in enumerate(bar(pairs, len(labels), split)):
            png = io.BytesIO(decode.encode_png(image))
            yield index, {"id": f"{split}_{index:05d}", "image": png, "label": label}


def bar(items: Iterable[Any], total: int, split: str) -> Iterable[Any]:
    """Wraps `items` in a progress bar with the time left, which shows on a terminal only."""
    return tqdm(items, f"Preparing {split}", total, disable=None, unit="img")


Batch = tuple[np.ndarray, np.ndarray]  # labels uint8[N], pixels uint8[N, 32, 32, 3]


def read_cifar10(archive: Path) -> tuple[list[str], dict[str, Batch]]:
    """Reads the class names and the splits of a CIFAR-10 archive, without unpickling anything."""
    files = {}
    with trees.readable(archive), tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            if member.isfile() and (content := tar.extractfile(member)) is not None:
                files[PurePosixPath(member.name).name] = content.read()
    try:
        if "batches.meta.txt" in files:
            suffix, read_batch = ".bin", _read_binary_batch
            names = files["batches.meta.txt"].decode().split()
        else:
            suffix, read_batch = "", _read_python_batch
            names = _pickled_list(files["batches.meta"], "label_names")
        train = [read_batch(files[f"data_batch_{part}{suffix}"]) for part in range(1, 6)]
        test = read_batch(files[f"test_batch{suffix}"])
    except KeyError as error:
        raise InputError(f"{archive} has no member {error}; it is no CIFAR-10 archive.") from error
    except ValueError as error:
        raise InputError(f"{archive} is no valid CIFAR-10 archive: {error}.") from error
    labels, pixels = (np.concatenate(parts) for parts in zip(*train, strict=True))
    return names, {"train": (labels, pixels), "test": test}


def _read_binary_batch(data: bytes) -> Batch:
    records = np.frombuffer(data, np.uint8).reshape(-1, 1 + 3072)  # a label byte, then pixels
    return records[:, 0], _channels_last(records[:, 1:])


def _read_python_batch(data: bytes) -> Batch:
    """Finds labels and pixels in a pickle by reading its opcodes, which executes nothing."""
    strings = (item for _, item, _ in pickletools.genops(data) if isinstance(item, str | bytes))
    pixels = max(strings, key=len)
    if isinstance(pixels, str):  # pickletools shows Python 2's as Latin-1, which maps every byte.
        pixels = pixels.encode("latin-1")
    labels = np.array(_pickled_list(data, "labels"), np.uint8)
    return labels, _channels_last(np.frombuffer(pixels, np.uint8))


def _pickled_list(data: bytes, key: str) -> list[Any]:
    """Finds the numbers or strings of the list that follows the string `key` in a pickle."""
    items: list[Any] = []
    inside = False
    opcodes = itertools.dropwhile(lambda item: item[1] != key, pickletools.genops(data))
    for opcode, argument, _ in itertools.islice(opcodes, 1, None):
        if opcode.name in ("MARK", "APPENDS"):  # They enclose each thousand items.
            inside = opcode.name == "MARK"
        elif inside and (isinstance(argument, str | bytes) or opcode.name.startswith("BININT")):
            items.append(argument)
        elif isinstance(argument, str | bytes):  # The next key.
            break
    return items


def _channels_last(pixels: np.ndarray) -> np.ndarray:
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
