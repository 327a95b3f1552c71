"""The data of a run, read once and placed on the devices as uint8."""

import logging
import time
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from alexnet_jax import parallel
from alexnet_jax.data import augment, batches
from alexnet_jax.data.sources import Source, load_source
from alexnet_jax.errors import InputError

log = logging.getLogger(__name__)


class ResidentData(NamedTuple):
    """The images of a run; the test set is open and not yet read.

    Attributes:
        train: image uint8[N, S, S, 3] and label int32[N], on every device.
        train_size: N.
        steps_per_epoch: Whole batches in N images.
        validation: Batches that are split over the devices; [] if none are held out.
        test: For the end of the run.
        info: What ``dataset.json`` holds: names of the classes, shape, mean and deviation.
    """

    train: batches.Dataset
    train_size: int
    steps_per_epoch: int
    validation: list[batches.Batch]
    test: Source
    info: dict[str, Any]


def load_data(config: ConfigDict, mesh: Mesh) -> ResidentData:
    """Reads the training images, holds the validation images out of them, and places both.

    Args:
        config: The whole config; the data, the batch sizes and the validation share are used.
        mesh: The devices.

    Raises:
        InputError: The data cannot be had, or are fewer than a batch.
    """
    started = time.monotonic()
    source = load_source(config.data, config.data.train_split)
    test = load_source(config.data, config.data.test_split)  # opened now, to know that it is there
    images, labels = source.read_all()
    first, second = batches.stratified_split(labels, config.data.validation_fraction)
    if len(first) < config.train.batch_size:
        raise InputError(
            f"config.train.batch_size is {config.train.batch_size}; {config.data.name} has "
            f"{len(first):,} images to train on, so it must be at most that."
        )
    train = {"image": images[first], "label": labels[first]}
    mean, deviation = augment.channel_statistics(train["image"])
    log.info(
        "Read %s: %s images to train on, %s to validate, %s to test, %d classes (%.1f s).",
        config.data.name,
        f"{len(first):,}",
        f"{len(second):,}",
        f"{len(test):,}",
        len(source.class_names),
        time.monotonic() - started,
    )
    return ResidentData(
        train=parallel.place(train, parallel.replicated(mesh)),
        train_size=len(first),
        steps_per_epoch=len(first) // config.train.batch_size,
        validation=place_batches(
            images[second], labels[second], config.train.eval_batch_size, mesh
        ),
        test=test,
        info={
            "name": config.data.name,
            "class_names": list(source.class_names),
            "image_shape": list(source.image_shape),
            "mean": mean,
            "deviation": deviation,
            "images": {"train": len(first), "validation": len(second), "test": len(test)},
        },
    )


def place_batches(
    images: np.ndarray, labels: np.ndarray, batch_size: int, mesh: Mesh
) -> list[batches.Batch]:
    """Places all images on the devices, as batches that these can share equally."""
    batch_size = -(-min(batch_size, max(1, len(labels))) // mesh.size) * mesh.size
    return [
        parallel.place(batch, parallel.split(mesh))
        for batch in batches.padded_batches(images, labels, batch_size)
    ]
