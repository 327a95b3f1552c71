"""Which images make which batch.

The order of an epoch is a function of (key, epoch) alone; so where a run stands in its data is a
function of its key and step, and resuming needs nothing else.
"""

from collections.abc import Iterator

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

Batch = dict[str, Array]  # image uint8[B, H, W, C], label int32[B], mask bool[B]


def epoch_order(key: Array, epoch: Array | int, size: int) -> Array:
    """Returns int32[size], the order of the examples in one epoch."""
    return jax.random.permutation(jax.random.fold_in(key, epoch), size)


def padded_batches(
    images: np.ndarray, labels: np.ndarray, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yields all examples in order, in batches of one size, the last padded under a mask."""
    for start in range(0, len(labels), batch_size):
        image = images[start : start + batch_size]
        missing = batch_size - len(image)
        yield {
            "image": np.pad(image, [(0, missing), (0, 0), (0, 0), (0, 0)]),
            "label": np.pad(labels[start : start + batch_size], (0, missing)),
            "mask": np.arange(batch_size) < len(image),
        }


def stratified_split(labels: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns sorted indices of two parts, which are the same every time.

    The second has a `fraction` of each class, rounded; one of a class at least stays in the first.
    """
    # A fixed seed: runs with different seeds are compared on the same validation images.
    shuffled = np.random.default_rng(0).permutation(len(labels))
    held_out = []
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        held_out.append(members[: min(round(fraction * len(members)), len(members) - 1)])
    second = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(labels)), second), second


def evenly_spaced(size: int, most: int) -> np.ndarray:
    """Returns at most `most` of the indices below `size`, evenly spaced, and at least one."""
    return np.unique(np.linspace(0, size - 1, min(size, max(most, 1))).astype(int))


def eval_batch_size(batch_size: int, images: int, mesh: Mesh) -> int:
    """Returns the size of batches that devices can share equally, no larger than needed."""
    return -(-min(batch_size, max(1, images)) // mesh.size) * mesh.size
