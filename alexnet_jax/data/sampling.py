"""Batches from a data set that lives on the device: nothing is copied while training.

An epoch is a permutation that depends on (key, epoch) alone, and a batch a gather; so where a run
stands in its data is a function of its key and step, and resuming needs nothing else.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Batch = dict[str, Array]  # image uint8[B, H, W, C], label int32[B], mask bool[B]
Dataset = dict[str, Array]  # image uint8[N, H, W, C], label int32[N]


def epoch_order(key: Array, epoch: Array, size: int) -> Array:
    """Returns int32[size], the order of the examples in one epoch."""
    return jax.random.permutation(jax.random.fold_in(key, epoch), size)


def take_batch(dataset: Dataset, order: Array, position: Array, batch_size: int) -> Batch:
    """Gathers the `position`-th batch of an epoch.

    Args:
        dataset: Images and labels on the device.
        order: int32[N] of `epoch_order`.
        position: int32[], from 0; (position + 1) * batch_size is at most N.
        batch_size: Images in the batch.
    """
    chosen = jax.lax.dynamic_slice(order, (position * batch_size,), (batch_size,))
    return {
        "image": dataset["image"][chosen],
        "label": dataset["label"][chosen],
        "mask": jnp.ones(batch_size, bool),
    }


def padded_batches(
    images: np.ndarray, labels: np.ndarray, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yields all examples in order, in batches of one size, the last filled up under a mask.

    Args:
        images: uint8[N, H, W, C].
        labels: int32[N].
        batch_size: B, images in each batch.

    Yields:
        image uint8[B, H, W, C], label int32[B], mask bool[B]; N masks are true in all.
    """
    for start in range(0, len(labels), batch_size):
        image = images[start : start + batch_size]
        missing = batch_size - len(image)
        yield {
            "image": np.pad(image, [(0, missing), (0, 0), (0, 0), (0, 0)]),
            "label": np.pad(labels[start : start + batch_size], (0, missing)),
            "mask": np.arange(batch_size) < len(image),
        }


def stratified_split(labels: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Splits examples in two, each class in the same proportion; the same split every time.

    Args:
        labels: int32[N].
        fraction: Share of each class in the second part, rounded; at least one example of a class
            stays in the first.

    Returns:
        Sorted indices of the two parts.
    """
    # A fixed seed: runs with different seeds are to be judged on the same validation images.
    shuffled = np.random.default_rng(0).permutation(len(labels))
    held_out = []
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        held_out.append(members[: min(round(fraction * len(members)), len(members) - 1)])
    second = np.sort(np.concatenate(held_out))
    first = np.setdiff1d(np.arange(len(labels)), second)
    return first, second
