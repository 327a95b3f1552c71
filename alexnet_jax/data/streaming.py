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
from contextlib import closing, contextmanager
from itertools import islice
from multiprocessing import resource_tracker
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import Array
from jax.sharding import Mesh

from alexnet_jax.config import TrainConfig
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
_PLACED_AHEAD = 2  # Batches on the device: one to be taken while the next is copied.


@dataclasses.dataclass(frozen=True)
class Reader:
    """How images are read ahead."""

    workers: int  # processes that read, taking turns; 0 reads in threads of this one
    prefetch: int  # batches that each worker has ready, or threads, each of which reads one
    mesh: Mesh  # the devices that share each batch

    @contextmanager
    def open(self, source: Source, rows: np.ndarray) -> Iterator[Iterator[Batch]]:
        """Opens a stream of batches on the devices, of which this process reads its share."""
        processes, by_rows = jax.process_count(), sharding.split(self.mesh)
        share = process_share(rows, jax.process_index(), processes)

        def place(batch: dict[str, np.ndarray]) -> Batch:
            return {
                name: jax.make_array_from_process_local_data(
                    by_rows, np.array(value), (len(value) * processes, *value.shape[1:])
                )
                for name, value in batch.items()
            }

        # An image that cannot be read is in one process's share, and the others wait for its batch.
        with collectives.fail_alone(), self.stream(source, share, place) as batches:
            yield batches

    @contextmanager
    def stream(
        self, source: Source, rows: np.ndarray, place: Callable[[dict[str, np.ndarray]], T]
    ) -> Iterator[Iterator[T]]:
        """Opens a stream of what `place` makes of the batches of `rows`, in order.

        `place` runs in a thread of this process, two batches ahead of its use. The stream raises
        an InputError where an image cannot be decoded or a worker died.
        """
        import grain  # Half a second, and only for data that is streamed.

        workers = min(self.workers, len(rows))
        threads = 0 if workers else self.prefetch
        dataset = grain.MapDataset.source(BatchReader(source, rows)).to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        )
        if workers:
            options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=self.prefetch)
            dataset = dataset.mp_prefetch(options, worker_init_fn=_exit_with_parent)
        dataset = grain.experimental.ThreadPrefetchIterDataset(
            dataset.map(place), prefetch_buffer_size=_PLACED_AHEAD
        )
        with _absl_flags_parsed():
            with _signals_blocked():
                batches = iter(dataset)
                batches.start_prefetch()  # The threads and processes started here inherit the mask.
            with closing(batches):
                yield _with_messages(batches)


@dataclasses.dataclass(frozen=True)
class StreamedDataset:
    """Training images."""

    source: Source
    indices: np.ndarray  # int[N], which of the source's images
    config: TrainConfig
    reader: Reader

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Returns some of the images, uint8[n, S, S, 3]."""
        return self.source.read(self.indices[rows])[0]

    @contextmanager
    def feeds(self, key: Array, step: int) -> Iterator[Iterator[tuple[int, StreamedFeed]]]:
        """Opens the feeds from a step on, each with the number of steps taken at its end."""
        steps_per_epoch = len(self.indices) // self.config.batch_size
        last_step = self.config.epochs * steps_per_epoch
        # To read takes longer than to dispatch, so that a step each is as fast as several.
        calls = dispatches(step, last_step, steps_per_epoch, self.config.steps_per_dispatch or 1)
        with closing(self._batches(key, step)) as batches:
            yield (
                (first + count, StreamedFeed(tuple(islice(batches, count))))
                for first, count in calls
            )

    def _batches(self, key: Array, step: int) -> Generator[Batch]:
        batch_size, last = self.config.batch_size, self.config.epochs
        steps_per_epoch = len(self.indices) // batch_size
        at_once = max(1, STRETCH // len(self.indices))
        for epoch in range(step // steps_per_epoch, last, at_once):
            epochs = range(epoch, min(epoch + at_once, last))
            rows = training_rows(key, self.indices, batch_size, epochs)
            taken = max(0, step - epoch * steps_per_epoch)
            with self.reader.open(self.source, rows[taken:]) as stream:
                yield from stream


@dataclasses.dataclass(frozen=True)
class StreamedBatches:
    """Images to evaluate on: each iteration reads them all, in order, each once."""

    source: Source
    indices: np.ndarray  # int[N], which of the source's images
    batch_size: int  # B, over all processes; the last batch is padded under a mask
    reader: Reader

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        with self.reader.open(self.source, in_rows(self.indices, self.batch_size)) as stream:
            yield from stream


def training_rows(key: Array, indices: np.ndarray, batch_size: int, epochs: range) -> np.ndarray:
    """Returns the batches of some epochs, as indices of images: int32[epochs * (N // B), B]."""
    # As numbers, so that the order is computed here alone, wherever the key is.
    key = jax.random.wrap_key_data(jnp.asarray(np.asarray(jax.random.key_data(key))))
    size = len(indices) // batch_size * batch_size  # what is left over is left out of the epoch
    orders = [np.asarray(_jitted_order(key, epoch, len(indices)))[:size] for epoch in epochs]
    return indices.astype(np.int32)[np.concatenate(orders)].reshape(-1, batch_size)


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
    """Batches at random: `reader[i]` reads and decodes the i-th. Runs in the workers, too."""

    source: Source
    rows: np.ndarray  # int[batches, B], indices of images in the source, or `PADDING`

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
def _absl_flags_parsed() -> Iterator[None]:
    """Lets Grain read its own flags, which nobody has parsed in a notebook."""
    was_parsed = flags.FLAGS.is_parsed()
    flags.FLAGS.mark_as_parsed()
    try:
        yield
    finally:
        if not was_parsed:
            flags.FLAGS.unparse_flags()


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
    """Keeps Ctrl-C and SIGTERM, which go to the whole group, from workers that start in here."""
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
