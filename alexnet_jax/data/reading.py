"""Batches read ahead of their use, by worker processes or threads, through Grain.

Knows nothing of JAX's devices: what is here runs in the workers, too.
"""

import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import TypeVar

import numpy as np
from absl import flags

from alexnet_jax.data.source import Source
from alexnet_jax.errors import InputError

T = TypeVar("T")

PADDING = -1  # Stands in a row of indices for no image.
# Batches that wait on the device: one to be taken while the next is copied.
_PLACED_AHEAD = 2


@dataclasses.dataclass(frozen=True)
class Batches:
    """Random access to batches: `batches[i]` reads and decodes the i-th.

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
def read_ahead(
    batches: Batches, place: Callable[[dict[str, np.ndarray]], T], *, workers: int, ahead: int
) -> Iterator[Iterator[T]]:
    """Opens a stream of all batches in order, and closes its workers at the end.

    Args:
        batches: What to read.
        place: Is given each batch, in a thread of this process, two batches ahead of its use.
        workers: Processes that read, taking turns; 0 reads in threads of this one.
        ahead: Batches that each worker has ready, or threads, each of which reads one.

    Raises:
        InputError: On the way, an image cannot be decoded, or a worker died.
    """
    import grain  # Half a second, and only for data that is streamed.

    if not flags.FLAGS.is_parsed():  # Grain asks for flags of its own even in a notebook.
        flags.FLAGS.mark_as_parsed()
    workers = min(workers, len(batches))
    threads = 0 if workers else ahead
    dataset = grain.MapDataset.source(batches).to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    )
    if workers:
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead),
            worker_init_fn=_leave_with_parent,
        )
    dataset = grain.experimental.ThreadPrefetchIterDataset(
        dataset.map(place), prefetch_buffer_size=_PLACED_AHEAD
    )
    with _signals_held_back():
        stream = iter(dataset)
        stream.start_prefetch()  # The threads and processes begun from here on inherit the mask.
    try:
        yield _with_sentences(stream)
    finally:
        stream.close()


def _leave_with_parent(index: int, count: int) -> None:
    """Runs first in each worker: it shall not outlive the run, even one that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Keeps Ctrl-C and SIGTERM, which go to the whole group, from workers that begin in here.

    The run itself answers them: it saves what it has, and then closes its workers.
    """
    resource_tracker.ensure_running()  # It would lift the mask when it is begun under it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _with_sentences(stream: Iterator[T]) -> Iterator[T]:
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


def in_rows(indices: np.ndarray, batch_size: int) -> np.ndarray:
    """Lays indices [N] into rows [batches, batch_size], the last one filled up with `PADDING`."""
    missing = -len(indices) % batch_size
    return np.pad(indices, (0, missing), constant_values=PADDING).reshape(-1, batch_size)
