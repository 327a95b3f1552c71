"""The sections `config.data` and `config.augment`."""

from dataclasses import dataclass
from typing import Literal

from alexnet_jax.errors import InputError
from alexnet_jax.options import Section, fraction, option

_NAME = (bool, "a name")


@dataclass(frozen=True)
class DataConfig(Section, section="data"):
    """Which images, and how they are read."""

    name: str = option("cifar10", 'A TFDS data set, a prepared one, or "digits".', check=_NAME)
    data_dir: str = option("", 'TFDS folder; "" is ~/tensorflow_datasets.', resumable=True)
    train_split: str = option("train", "TFDS split to train on.", check=_NAME)
    test_split: str = option("test", "TFDS split to test on.", check=_NAME)
    validation_fraction: float = fraction(
        0.1, "Fraction of the training images of each class held out for validation."
    )
    image_size: int = option(
        32, "Side in pixels that images are resized to.", at_least=8, at_most=1024
    )
    crop_size: int = option(
        0,
        "Side in pixels of the crop that the network sees, random in training and centered in "
        "evaluation: at least 8, or 0 for the whole image.",
        check=(lambda size: size == 0 or 8 <= size <= 1024, "0, or between 8 and 1024"),
    )
    normalization: Literal["standardize", "subtract_mean"] = option(
        "standardize",
        "Subtract the mean of each channel, on the scale 0..255, or also divide by its standard "
        "deviation.",
    )
    in_memory: Literal["auto", "on", "off"] = option(
        "auto",
        'Hold all images in device memory, or stream them ("off"); "auto" decides by their size.',
        resumable=True,
    )
    workers: int = option(
        2, "Processes that decode streamed images; 0 uses threads.", at_least=0, resumable=True
    )
    prefetch: int = option(
        2, "Batches that each worker prepares in advance.", at_least=1, resumable=True
    )

    def check(self) -> None:
        """Rejects crops larger than the images."""
        if self.crop_size > self.image_size:
            raise InputError(
                f"config.data.crop_size is {self.crop_size}; it must be at most "
                f"config.data.image_size, {self.image_size}."
            )


@dataclass(frozen=True)
class AugmentConfig(Section, section="augment"):
    """Random changes of the training images."""

    crop_padding: int = option(4, "Pixels of padding before a random crop; 0 is off.", at_least=0)
    pad_mode: Literal["reflect", "constant"] = option(
        "reflect", 'Pad with the reflected image, or with zeros ("constant").'
    )
    flip: bool = option(True, "Flip images horizontally with probability 1/2.")
    alternating_flip: bool = option(
        False, "Flip each image in every other epoch instead (Jordan, 2024)."
    )
    cutout: int = option(
        0,
        "Side in pixels of a random square that is masked out (DeVries and Taylor, 2017); 0 is "
        "off.",
        at_least=0,
    )
    pca_jitter: float = option(
        0.0,
        "Strength of PCA color augmentation, 0.1 in Krizhevsky et al. (2012); 0 is off.",
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
