"""Batches of a data set that outgrows memory: read while training, in the resident path's order.

The order of an epoch is the same function of (key, epoch) that the resident path evaluates on the
device, so both draw the same batches, and resuming needs a key and a step here, too.
"""

import dataclasses
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from alexnet_jax.data.reading import Batches, in_rows, read_ahead
from alexnet_jax.data.sampling import Batch, epoch_order
from alexnet_jax.data.source import Source
from alexnet_jax.distributed import collectives, sharding

# Workers begin anew after so many images, in whole epochs: they are told the order of all of them
# beforehand (4 bytes each), and take seconds to begin.
STRETCH = 2**21


@dataclasses.dataclass(frozen=True)
class StreamedDataset:
    """Images to train on.

    Attributes:
        source: Where they come from.
        indices: int[N], which of the source's images they are.
        batch_size: B, images in each batch, over all processes.
        epochs: How many there will be.
        mesh: The devices that share each batch.
        config: The section `config.data`; `workers` and `prefetch` are used.
    """

    source: Source
    indices: np.ndarray
    batch_size: int
    epochs: int
    mesh: Mesh
    config: ConfigDict

    @contextmanager
    def stream(self, key: Array, step: int) -> Iterator[Iterator[Batch]]:
        """Opens the batches from a step on, to the end of the last epoch.

        Args:
            key: Of `epoch_order`.
            step: The first batch's; N // B make an epoch.

        Raises:
            InputError: On the way, an image cannot be decoded, or a worker died.
        """
        batches = self._batches(key, step)
        try:
            yield batches
        finally:
            batches.close()

    @contextmanager
    def feed(self, key: Array, step: int) -> Iterator[Callable[[int], Iterator[Batch]]]:
        """Opens what `advance` takes at each step; the steps must be asked for in turn.

        Args:
            key: Of `epoch_order`.
            step: Where the run stands.
        """
        with self.stream(key, step) as batches:
            yield lambda step: batches

    def _batches(self, key: Array, step: int) -> Generator[Batch, None, None]:
        steps_per_epoch = len(self.indices) // self.batch_size
        first = step // steps_per_epoch
        at_once = max(1, STRETCH // len(self.indices))
        for epoch in range(first, self.epochs, at_once):
            epochs = range(epoch, min(epoch + at_once, self.epochs))
            rows = training_rows(
                key, self.indices, self.batch_size, epochs, jax.process_index(), jax.process_count()
            )
            rows = rows[max(0, step - epoch * steps_per_epoch) :]
            with _open(self.source, rows, self.mesh, self.config) as stream:
                yield from stream


@dataclasses.dataclass(frozen=True)
class StreamedBatches:
    """Images to measure on: each iteration reads them all, in order, each once.

    Attributes:
        source: Where they come from.
        indices: int[N], which of the source's images they are.
        batch_size: B, images in each batch, over all processes; the last is filled up.
        mesh: The devices that share each batch.
        config: The section `config.data`; `workers` and `prefetch` are used.
    """

    source: Source
    indices: np.ndarray
    batch_size: int
    mesh: Mesh
    config: ConfigDict

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        rows = process_share(
            in_rows(self.indices, self.batch_size), jax.process_index(), jax.process_count()
        )
        with _open(self.source, rows, self.mesh, self.config) as stream:
            yield from stream


def training_rows(
    key: Array,
    indices: np.ndarray,
    batch_size: int,
    epochs: range,
    process_index: int,
    process_count: int,
) -> np.ndarray:
    """Says which images make the batches of some epochs, and of them one process's share.

    Args:
        key: Of `epoch_order`.
        indices: int[N], the images to train on.
        batch_size: B, over all processes; what is left over of an epoch is left out of it.
        epochs: Which.
        process_index: Whose share.
        process_count: P.

    Returns:
        int32[len(epochs) * (N // B), B / P].
    """
    # As numbers, so that the order is worked out here alone, wherever the key lies.
    key = jax.random.wrap_key_data(jnp.asarray(np.asarray(jax.random.key_data(key))))
    batches = len(indices) // batch_size
    orders = [
        np.asarray(_jitted_order(key, epoch, len(indices)))[: batches * batch_size]
        for epoch in epochs
    ]
    rows = indices.astype(np.int32)[np.concatenate(orders)].reshape(-1, batch_size)
    return process_share(rows, process_index, process_count)


_jitted_order = jax.jit(epoch_order, static_argnums=2)


def process_share(rows: np.ndarray, process_index: int, process_count: int) -> np.ndarray:
    """Cuts [batches, B] to the [batches, B / P] that a process's devices hold of each batch."""
    share = rows.shape[1] // process_count
    return rows[:, process_index * share : (process_index + 1) * share]


@contextmanager
def _open(
    source: Source, rows: np.ndarray, mesh: Mesh, config: ConfigDict
) -> Iterator[Iterator[Batch]]:
    # An image that cannot be read is in one process's share, and the others wait for its batch.
    with (
        collectives.fail_alone(),
        read_ahead(
            Batches(source, rows),
            placement(mesh, jax.process_count()),
            workers=config.workers,
            ahead=config.prefetch,
        ) as stream,
    ):
        yield stream


def placement(mesh: Mesh, process_count: int) -> Callable[[dict[str, np.ndarray]], Batch]:
    """Returns the function that makes one process's rows its part of a batch over all devices."""
    by_rows = sharding.split(mesh)

    def place(rows: dict[str, np.ndarray]) -> Batch:
        return {
            name: jax.make_array_from_process_local_data(
                by_rows, np.array(value), (len(value) * process_count, *value.shape[1:])
            )
            for name, value in rows.items()
        }

    return place


def advance(
    state: Any, stream: Iterator[Batch], *, step_fn: Callable[..., Any], num_steps: int
) -> tuple[Any, Any]:
    """Takes several steps on the next batches of a stream, one dispatch each.

    Args:
        state: Before the steps.
        stream: Of `StreamedDataset.stream`, at the state's step.
        step_fn: Compiled, from a state and a batch to a state and metrics.
        num_steps: How many.

    Returns:
        The state after the steps, and their metrics merged.
    """
    metrics = None
    for _ in range(num_steps):
        before = metrics
        state, more = step_fn(state, next(stream))
        metrics = more if before is None else before.merge(more)
        # The device has a step to do while the next is asked for, and no more than that: else
        # batches would pile up on it where reading is faster than training.
        jax.block_until_ready(before)
    return state, metrics
