"""Data sets that are on the devices as uint8: nothing is copied while training."""

import dataclasses
import functools
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from alexnet_jax.config import TrainConfig
from alexnet_jax.data.feed import InMemoryFeed, dispatches
from alexnet_jax.data.sampling import Batch, epoch_order, eval_batch_size, padded_batches
from alexnet_jax.distributed import sharding

# A quarter leaves the rest to the network, to copies on the way, and to whoever else computes here.
MEMORY_SHARE = 4
# Enough to hide the cost of a dispatch from an accelerator's steps, which take milliseconds; a
# CPU's take long enough to need one each, and would be compiled one after the other.
ACCELERATOR_STEPS_PER_DISPATCH = 32


@dataclasses.dataclass(frozen=True)
class InMemoryDataset:
    """Training images, on every device."""

    placing: Future[dict[str, Array]]  # image uint8[N, S, S, 3] and label int32[N], once copied
    size: int  # N
    config: TrainConfig
    mesh: Mesh

    @classmethod
    def place(
        cls,
        images: np.ndarray,
        labels: np.ndarray,
        indices: np.ndarray,
        config: TrainConfig,
        mesh: Mesh,
    ) -> "InMemoryDataset":
        """Starts to copy some of the images to the devices, in the background.

        To fill so much new memory can take long (`cache.decoded`).
        """

        def copy() -> dict[str, Array]:
            host = {"image": images[indices], "label": labels[indices]}
            placed: dict[str, Array] = sharding.place(host, sharding.replicated(mesh))
            return placed

        best = 1 if sharding.on_cpu(mesh) else ACCELERATOR_STEPS_PER_DISPATCH
        config = dataclasses.replace(config, steps_per_dispatch=config.steps_per_dispatch or best)
        thread = ThreadPoolExecutor(1)
        placing = thread.submit(copy)
        thread.shutdown(wait=False)
        return cls(placing, len(indices), config, mesh)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Returns some of the images, uint8[n, S, S, 3]."""
        images = self.placing.result()["image"].addressable_data(0)
        return np.asarray(jax.numpy.take(images, rows, axis=0, mode="clip"))

    @contextmanager
    def feeds(self, key: Array, step: int) -> Iterator[Iterator[tuple[int, InMemoryFeed]]]:
        """Opens the feeds from a step on, each with the number of steps taken at its end.

        With keys[R] of replicas their rows are int32[R, K, B].
        """
        yield self._feeds(key, step)

    def _feeds(self, key: Array, step: int) -> Iterator[tuple[int, InMemoryFeed]]:
        batch_size = self.config.batch_size
        steps_per_epoch = self.size // batch_size
        jit = functools.partial(jax.jit, out_shardings=sharding.replicated(self.mesh))
        one = functools.partial(epoch_order, size=self.size)
        order_of = jit(jax.vmap(one, in_axes=(0, None)) if key.ndim else one)
        take = jit(_take, static_argnums=(2, 3))
        last_step, epoch = self.config.epochs * steps_per_epoch, -1
        most = self.config.steps_per_dispatch
        for first, count in dispatches(step, last_step, steps_per_epoch, most):
            if epoch != first // steps_per_epoch:  # to sort 45,000 keys takes a CPU 30 ms
                epoch = first // steps_per_epoch
                order = order_of(key, np.int32(epoch))
            start = np.int32(first % steps_per_epoch * batch_size)
            rows = take(order, start, count, batch_size)
            yield first + count, InMemoryFeed(rows=rows, **self.placing.result())


def _take(order: Array, start: Array, count: int, batch_size: int) -> Array:
    """Cuts order int32[..., N] to rows int32[..., count, batch_size]."""
    rows = jax.lax.dynamic_slice_in_dim(order, start, count * batch_size, axis=-1)
    return rows.reshape(*order.shape[:-1], count, batch_size)


def place_batches(
    images: np.ndarray, labels: np.ndarray, batch_size: int, mesh: Mesh
) -> list[Batch]:
    """Places all images on the devices, in masked batches that these share equally."""
    batches = padded_batches(images, labels, eval_batch_size(batch_size, len(labels), mesh))
    return [sharding.place(batch, sharding.split(mesh)) for batch in batches]


def memory_limit(mesh: Mesh) -> int:
    """Returns how many bytes of images may be on each device, by the memory there is."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # of containers: cgroups 2 and 1
        with suppress(OSError, ValueError):  # not there, or "max"
            memory = min(memory, int(Path("/sys/fs/cgroup", limit).read_text()))
    if sharding.on_cpu(mesh):
        memory //= len(mesh.local_devices)  # each of which has a copy, in the same memory
    else:
        stats = mesh.local_devices[0].memory_stats() or {}
        memory = min(memory, stats.get("bytes_limit") or memory)
    return memory // MEMORY_SHARE
