"""Data sets that outgrow memory: read while training, through Grain, in the order of `in_memory`.

The order of an epoch is the same function of (key, epoch) that the in-memory path evaluates on the
device, so both draw the same batches, and resuming needs a key and a step here, too.
"""

import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from itertools import islice
from multiprocessing import resource_tracker
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import Array
from jax.sharding import Mesh

from alexnet_jax.data.feed import StreamedFeed, dispatches
from alexnet_jax.data.sampling import Batch, epoch_order
from alexnet_jax.data.source import Source
from alexnet_jax.distributed import collectives, sharding
from alexnet_jax.errors import InputError

T = TypeVar("T")

# Workers start again after so many images, in whole epochs: they are told the order of all of them
# beforehand (4 bytes each), and take seconds to start.
STRETCH = 2**21
PADDING = -1  # Stands in a row of indices for no image.
# Batches that wait on the device: one to be taken while the next is copied.
_PLACED_AHEAD = 2


@dataclasses.dataclass(frozen=True)
class Reader:
    """How images are read ahead.

    Attributes:
        workers: Processes that read, taking turns; 0 reads in threads of this one.
        prefetch: Batches that each worker has ready, or threads, each of which reads one.
        mesh: The devices that share each batch.
    """

    workers: int
    prefetch: int
    mesh: Mesh

    @contextmanager
    def open(self, source: Source, rows: np.ndarray) -> Iterator[Iterator[Batch]]:
        """Opens a stream of batches on the devices, of which `rows` is this process's share."""
        place = _placing(self.mesh, jax.process_count())
        # An image that cannot be read is in one process's share, and the others wait for its batch.
        with (
            collectives.fail_alone(),
            prefetched(
                BatchReader(source, rows), place, workers=self.workers, ahead=self.prefetch
            ) as stream,
        ):
            yield stream


@dataclasses.dataclass(frozen=True)
class StreamedDataset:
    """Training images.

    Attributes:
        source: Where they come from.
        indices: int[N], which of the source's images they are.
        batch_size: B, images in each batch, over all processes.
        epochs: Length of the run.
        steps_per_dispatch: Most steps in a feed.
        reader: Reads them.
    """

    source: Source
    indices: np.ndarray
    batch_size: int
    epochs: int
    steps_per_dispatch: int
    reader: Reader

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Returns some of the images, uint8[n, S, S, 3]."""
        return self.source.read(self.indices[rows])[0]

    @contextmanager
    def feeds(self, key: Array, step: int) -> Iterator[Iterator[tuple[int, StreamedFeed]]]:
        """Opens the feeds from a step on, each with the number of steps taken at its end.

        Args:
            key: Of `epoch_order`.
            step: Steps taken so far.

        Raises:
            InputError: On the way, an image cannot be decoded, or a worker died.
        """
        batches = self._batches(key, step)
        try:
            yield self._feeds(batches, step)
        finally:
            batches.close()

    def _feeds(self, batches: Iterator[Batch], step: int) -> Iterator[tuple[int, StreamedFeed]]:
        steps_per_epoch = len(self.indices) // self.batch_size
        last_step = self.epochs * steps_per_epoch
        for first, count in dispatches(step, last_step, steps_per_epoch, self.steps_per_dispatch):
            yield first + count, StreamedFeed(tuple(islice(batches, count)))

    def _batches(self, key: Array, step: int) -> Generator[Batch]:
        steps_per_epoch = len(self.indices) // self.batch_size
        at_once = max(1, STRETCH // len(self.indices))
        for epoch in range(step // steps_per_epoch, self.epochs, at_once):
            epochs = range(epoch, min(epoch + at_once, self.epochs))
            rows = training_rows(
                key, self.indices, self.batch_size, epochs, jax.process_index(), jax.process_count()
            )
            rows = rows[max(0, step - epoch * steps_per_epoch) :]
            with self.reader.open(self.source, rows) as stream:
                yield from stream


@dataclasses.dataclass(frozen=True)
class StreamedBatches:
    """Images to evaluate on: each iteration reads them all, in order, each once.

    Attributes:
        source: Where they come from.
        indices: int[N], which of the source's images they are.
        batch_size: B, over all processes; the last batch is padded under a mask.
        reader: Reads them.
    """

    source: Source
    indices: np.ndarray
    batch_size: int
    reader: Reader

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        rows = process_share(
            in_rows(self.indices, self.batch_size), jax.process_index(), jax.process_count()
        )
        with self.reader.open(self.source, rows) as stream:
            yield from stream


def training_rows(
    key: Array,
    indices: np.ndarray,
    batch_size: int,
    epochs: range,
    process_index: int,
    process_count: int,
) -> np.ndarray:
    """Returns one process's share of the batches of some epochs, as indices of images.

    Args:
        key: Of `epoch_order`.
        indices: int[N], the training images.
        batch_size: B, over all processes; what is left over of an epoch is left out of it.
        epochs: Which.
        process_index: Whose share.
        process_count: P.

    Returns:
        int32[len(epochs) * (N // B), B / P].
    """
    # As numbers, so that the order is computed here alone, wherever the key is.
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


def in_rows(indices: np.ndarray, batch_size: int) -> np.ndarray:
    """Reshapes indices [N] to rows [batches, batch_size], the last one filled with `PADDING`."""
    missing = -len(indices) % batch_size
    return np.pad(indices, (0, missing), constant_values=PADDING).reshape(-1, batch_size)


@dataclasses.dataclass(frozen=True)
class BatchReader:
    """Random access to batches: `reader[i]` reads and decodes the i-th. Runs in the workers, too.

    Attributes:
        source: Where the images come from.
        rows: int[batches, B], indices of images in the source, or `PADDING`.
    """

    source: Source
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> dict[str, np.ndarray]:
        """Returns image uint8[B, S, S, 3], label int32[B] and mask bool[B]; padding is 0."""
        row = self.rows[position]
        mask = row != PADDING
        images = np.zeros((len(row), *self.source.image_shape), np.uint8)
        labels = np.zeros(len(row), np.int32)
        images[mask], labels[mask] = self.source.read(row[mask])
        return {"image": images, "label": labels, "mask": mask}


@contextmanager
def prefetched(
    reader: BatchReader, place: Callable[[dict[str, np.ndarray]], T], *, workers: int, ahead: int
) -> Iterator[Iterator[T]]:
    """Opens a stream of all batches in order, and stops its workers at the end.

    Args:
        reader: Of the batches.
        place: Is given each batch, in a thread of this process, two batches ahead of its use.
        workers: As `Reader.workers`.
        ahead: As `Reader.prefetch`.

    Raises:
        InputError: On the way, an image cannot be decoded, or a worker died.
    """
    import grain  # Half a second, and only for data that is streamed.

    workers = min(workers, len(reader))
    threads = 0 if workers else ahead
    dataset = grain.MapDataset.source(reader).to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    )
    if workers:
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead),
            worker_init_fn=_exit_with_parent,
        )
    dataset = grain.experimental.ThreadPrefetchIterDataset(
        dataset.map(place), prefetch_buffer_size=_PLACED_AHEAD
    )
    with _absl_flags_parsed():
        with _signals_blocked():
            stream = iter(dataset)
            stream.start_prefetch()  # The threads and processes started here inherit the mask.
        try:
            yield _with_messages(stream)
        finally:
            stream.close()


@contextmanager
def _absl_flags_parsed() -> Iterator[None]:
    """Lets Grain read its own flags, which nobody has parsed in a notebook."""
    if flags.FLAGS.is_parsed():
        yield
        return
    flags.FLAGS.mark_as_parsed()
    try:
        yield
    finally:
        flags.FLAGS.unparse_flags()


def _placing(mesh: Mesh, process_count: int) -> Callable[[dict[str, np.ndarray]], Batch]:
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


def _exit_with_parent(index: int, count: int) -> None:
    """Runs first in each worker, which must not outlive the run, even one that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_after_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_after_parent, daemon=True).start()


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Keeps Ctrl-C and SIGTERM, which go to the whole group, from workers that start in here.

    The run itself handles them: it saves, and then stops its workers.
    """
    resource_tracker.ensure_running()  # It would lift the mask when it is started under it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _with_messages(stream: Iterator[T]) -> Iterator[T]:
    try:
        yield from stream
    except RuntimeError as error:
        if "Worker process was terminated" not in str(error):
            raise
        raise InputError(
            "A process that reads images died: most likely it ran out of memory, or of shared "
            "memory (/dev/shm; --shm-size in Docker); lower config.data.workers or "
            "config.data.prefetch. A program of your own must also start its run under "
            "'if __name__ == \"__main__\":'."
        ) from error
