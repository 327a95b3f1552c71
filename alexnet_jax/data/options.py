"""The sections `config.data` and `config.augment`."""

from dataclasses import dataclass
from typing import Literal

from alexnet_jax.errors import InputError
from alexnet_jax.options import Section, option

_SPLIT = (bool, "the name of a split")


@dataclass(frozen=True)
class DataConfig(Section):
    """Which images, and how they are read."""

    section = "data"

    name: str = option(
        "cifar10",
        'Data set: a TFDS name, a prepared data set, or "digits".',
        check=(bool, "the name of a data set"),
    )
    data_dir: str = option(
        "", 'Folder of the TFDS data sets; "" is ~/tensorflow_datasets.', resumable=True
    )
    train_split: str = option("train", "TFDS split to train on.", check=_SPLIT)
    test_split: str = option("test", "TFDS split to test on.", check=_SPLIT)
    validation_fraction: float = option(
        0.1,
        "Fraction of the training images of each class held out for validation; 0 trains on all.",
        at_least=0,
        below=1,
    )
    image_size: int = option(
        32, "Side of the images in pixels; others are resized.", at_least=8, at_most=1024
    )
    crop_size: int = option(
        0,
        "Side in pixels of the crop that the network sees, random in training and else centered; "
        "0 is the whole image.",
        check=(lambda size: size == 0 or 8 <= size <= 1024, "0, or between 8 and 1024"),
    )
    normalization: Literal["standardize", "subtract_mean"] = option(
        "standardize",
        '"standardize" subtracts the mean of each channel and divides by its standard deviation; '
        '"subtract_mean" subtracts the mean on the scale 0..255.',
    )
    in_memory: Literal["auto", "on", "off"] = option(
        "auto",
        'Hold the images in device memory ("on") or stream them ("off"); "auto": by their size.',
        resumable=True,
    )
    workers: int = option(
        2, "Processes that decode streamed images; 0 uses threads.", at_least=0, resumable=True
    )
    prefetch: int = option(
        2, "Batches that each worker, or the threads, read ahead.", at_least=1, resumable=True
    )

    def check(self) -> None:
        """Rejects crops larger than the images."""
        if self.crop_size > self.image_size:
            raise InputError(
                f"config.data.crop_size is {self.crop_size}; it must be at most "
                f"config.data.image_size, {self.image_size}."
            )


@dataclass(frozen=True)
class AugmentConfig(Section):
    """Random changes of the training images."""

    section = "augment"

    crop_padding: int = option(
        4, "Pixels of padding on each side before a random crop; 0 is off.", at_least=0
    )
    pad_mode: Literal["reflect", "constant"] = option(
        "reflect", 'Padding: the reflected image, or zeros ("constant").'
    )
    flip: bool = option(True, "Flip images horizontally with probability 1/2.")
    alternating_flip: bool = option(
        False,
        "Flip each image in every other epoch instead, a random half in the first (Jordan, 2024).",
    )
    cutout: int = option(
        0,
        "Side in pixels of a random square that is masked (DeVries and Taylor, 2017); 0 is off.",
        at_least=0,
    )
    pca_jitter: float = option(
        0.0,
        "Standard deviation of PCA color augmentation, in standard deviations of the data set's "
        "colors (Krizhevsky et al., 2012, have 0.1); 0 is off.",
        at_least=0,
    )

    def check(self) -> None:
        """Rejects an alternating flip of images that are not flipped."""
        if self.alternating_flip and not self.flip:
            raise InputError(
                "config.augment.alternating_flip is True and config.augment.flip is False; set "
                "config.augment.flip to True."
            )


def input_size(data: DataConfig) -> int:
    """Returns the side, in pixels, of the images that the network sees."""
    return data.crop_size or data.image_size
