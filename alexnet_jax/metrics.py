"""Metrics as sums and counts over masked examples, so that they merge exactly."""

# No `from __future__ import annotations` here: CLU reads the annotations as classes.

import flax.struct
import jax
import jax.numpy as jnp
from clu import metrics
from jax import Array


@flax.struct.dataclass
class ConfusionMatrix(metrics.Metric):
    """Counts of (true class, predicted class).

    Attributes:
        counts: int32[classes, classes]; rows are true classes.
    """

    counts: Array

    @classmethod
    def from_model_output(
        cls, *, logits: Array, labels: Array, mask: Array, **_: Array
    ) -> "ConfusionMatrix":
        """Counts one batch of logits float32[B, classes], labels int32[B], mask bool[B]."""
        classes = logits.shape[-1]
        cells = labels * classes + logits.argmax(axis=-1).astype(jnp.int32)
        counts = jnp.zeros(classes * classes, jnp.int32).at[cells].add(mask.astype(jnp.int32))
        return cls(counts=counts.reshape(classes, classes))

    def merge(self, other: "ConfusionMatrix") -> "ConfusionMatrix":
        """Adds the counts of two disjoint sets of examples."""
        return ConfusionMatrix(counts=self.counts + other.counts)

    def compute(self) -> Array:
        """Returns int32[classes, classes]."""
        return self.counts


@flax.struct.dataclass
class TrainMetrics(metrics.Collection):
    """What a training step reports: means over the images of its batch."""

    loss: metrics.Average.from_output("loss")  # type: ignore[valid-type]
    accuracy: metrics.Accuracy


@flax.struct.dataclass
class EvalMetrics(metrics.Collection):
    """What an evaluation reports: means over all images, and the confusion matrix."""

    loss: metrics.Average.from_output("loss")  # type: ignore[valid-type]
    accuracy: metrics.Accuracy
    confusion: ConfusionMatrix


def over_devices(collection: metrics.Collection, axis_name: str | None) -> metrics.Collection:
    """Merges the metrics of all devices on a mapped axis; without one, returns them as they are.

    Every metric here is a sum or a count, so that adding them up merges them.
    """
    if axis_name is None:
        return collection
    return jax.lax.psum(collection, axis_name)
