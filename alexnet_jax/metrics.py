"""Metrics as sums and counts over masked examples, so that they merge exactly."""

# No `from __future__ import annotations` here: CLU reads the annotations as classes.

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics
from jax import Array
from jaxtyping import Bool, Float, Int


@flax.struct.dataclass
class ConfusionMatrix(metrics.Metric):
    """Counts of (true class, predicted class).

    Attributes:
        counts: int32[classes, classes]; rows are true classes.
    """

    counts: Array

    @classmethod
    def from_model_output(
        cls,
        *,
        logits: Float[Array, "batch classes"],
        labels: Int[Array, " batch"],
        mask: Bool[Array, " batch"],
        **_: Array,
    ) -> "ConfusionMatrix":
        """Counts the predictions of one batch."""
        classes = logits.shape[-1]
        cells = labels * classes + logits.argmax(axis=-1).astype(jnp.int32)
        counts = jnp.zeros(classes * classes, jnp.int32).at[cells].add(mask.astype(jnp.int32))
        return cls(counts=counts.reshape(classes, classes))

    def merge(self, other: "ConfusionMatrix") -> "ConfusionMatrix":
        """Adds the counts of two disjoint sets of examples."""
        return ConfusionMatrix(counts=self.counts + other.counts)

    def compute(self) -> Array:
        """Returns the counts."""
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


def compute(collection: metrics.Collection) -> dict[str, np.ndarray]:
    """Computes metrics on the host; of R replicas each with a first dimension R."""
    collection = jax.device_get(collection)
    shape = np.shape(collection.loss.total)
    if not shape:
        values: dict[str, np.ndarray] = collection.compute()
        return values
    each = [jax.tree.map(lambda x, i=i: x[i], collection).compute() for i in range(shape[0])]
    return {name: np.stack([values[name] for values in each]) for name in each[0]}


def summarize(values: dict[str, Any]) -> dict[str, Any]:
    """Turns float[] into numbers of JSON.

    Of replicas, float[R], the number is the mean; "NAME_deviation" is the standard deviation of a
    sample (over R - 1), "NAME_each" the list.
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        array = np.asarray(value, np.float64)
        found[name] = float(array.mean())
        if array.ndim:
            found[f"{name}_deviation"] = float(array.std(ddof=1))
            found[f"{name}_each"] = array.tolist()
    return found


def format_accuracy(values: dict[str, Any]) -> str:
    """Formats the accuracy of a `summarize`: "85.10%", of replicas "85.10% (std 0.31)"."""
    text = f"{100 * values['accuracy']:.2f}%"
    if "accuracy_deviation" not in values:
        return text
    return f"{text} (std {100 * values['accuracy_deviation']:.2f})"
