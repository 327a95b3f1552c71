"""What one compiled call of K training steps takes: batches from memory, or from a stream.

Both kinds answer `batch(i)` inside of jit, so that `steps.train_steps` needs to know only one.
"""

from collections.abc import Iterator

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from alexnet_jax.data.sampling import Batch


class InMemoryFeed(flax.struct.PyTreeNode):
    """Batches gathered from a data set that is on the device."""

    image: Array  # uint8[N, H, W, C]
    label: Array  # int32[N]
    rows: Array  # int32[K, B], which images make each batch; int32[R, K, B] for R replicas

    @property
    def num_steps(self) -> int:
        """K."""
        return self.rows.shape[-2]

    def batch(self, i: Array | int) -> Batch:
        """Gathers the i-th batch."""
        rows = self.rows[i]
        mask = jnp.ones(rows.shape, bool)
        return {"image": self.image[rows], "label": self.label[rows], "mask": mask}


class StreamedFeed(flax.struct.PyTreeNode):
    """Batches that were read while the device computed."""

    batches: tuple[Batch, ...]  # K

    @property
    def num_steps(self) -> int:
        """K."""
        return len(self.batches)

    def batch(self, i: Array | int) -> Batch:
        """Returns the i-th batch."""
        if isinstance(i, int):
            return self.batches[i]
        return jax.tree.map(lambda *x: jnp.stack(x)[i], *self.batches)


Feed = InMemoryFeed | StreamedFeed


def dispatches(
    step: int, last_step: int, steps_per_epoch: int, steps_per_dispatch: int
) -> Iterator[tuple[int, int]]:
    """Yields the first step of each compiled call and the number of its steps.

    A call never reaches into the next epoch, and calls end at the same steps whether or not the run
    was interrupted.
    """
    while step < last_step:
        position = step % steps_per_epoch
        to_boundary = steps_per_dispatch - position % steps_per_dispatch
        count = min(to_boundary, steps_per_epoch - position)
        yield step, count
        step += count
