import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

from alexnet_jax.metrics import ConfusionMatrix, EvalMetrics, TrainMetrics, over_devices

CLASSES = 4


@pytest.fixture
def outputs():
    """What a step hands to the metrics for 24 examples, of which some do not count."""
    rng = np.random.default_rng(0)
    return {
        "logits": rng.normal(size=(24, CLASSES)).astype(np.float32),
        "labels": rng.integers(CLASSES, size=24, dtype=np.int32),
        "loss": rng.exponential(size=24).astype(np.float32),
        "mask": rng.random(24) < 0.7,
    }


def measure(kind, outputs, chosen=slice(None)):
    chosen = {name: jnp.asarray(value[chosen]) for name, value in outputs.items()}
    return kind.single_from_model_output(**chosen)


def expected(outputs):
    mask, labels = outputs["mask"], outputs["labels"]
    predicted = outputs["logits"].argmax(1)
    return {
        "loss": outputs["loss"][mask].mean(),
        "accuracy": (predicted == labels)[mask].mean(),
        "confusion": confusion_matrix(labels[mask], predicted[mask], labels=range(CLASSES)),
    }


def check(collection, outputs):
    ours, theirs = jax.device_get(collection).compute(), expected(outputs)
    if isinstance(collection, TrainMetrics):
        del theirs["confusion"]
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", [TrainMetrics, EvalMetrics])
def test_only_unmasked_examples_count(kind, outputs):
    assert 0 < outputs["mask"].sum() < 24
    check(measure(kind, outputs), outputs)


@pytest.mark.parametrize("kind", [TrainMetrics, EvalMetrics])
def test_parts_merge_to_the_whole(kind, outputs):
    outputs["mask"][5:7] = False  # a part without any
    parts = [measure(kind, outputs, slice(*ends)) for ends in ((0, 5), (5, 7), (7, 24))]
    check(parts[0].merge(parts[1]).merge(parts[2]), outputs)
    check(parts[2].merge(parts[0].merge(parts[1])), outputs)


@pytest.mark.parametrize("kind", [TrainMetrics, EvalMetrics])
def test_stacked_metrics_reduce_to_the_whole(kind, outputs):
    parts = [measure(kind, outputs, slice(start, start + 6)) for start in range(0, 24, 6)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    check(stacked.reduce(), outputs)


def test_devices_merge_to_the_whole(outputs):
    def of_one_device(outputs):
        return over_devices(EvalMetrics.single_from_model_output(**outputs), "data")

    parts = {name: value.reshape(8, 3, *value.shape[1:]) for name, value in outputs.items()}
    merged = jax.pmap(of_one_device, axis_name="data")(parts)
    for device in range(8):
        check(jax.tree.map(lambda leaf, i=device: leaf[i], merged), outputs)


def test_confusion_has_true_classes_in_rows():
    logits = jax.nn.one_hot(jnp.array([1, 1, 3, 0]), CLASSES)
    labels = jnp.array([0, 0, 3, 2])
    counts = ConfusionMatrix.from_model_output(
        logits=logits, labels=labels, mask=jnp.array([True, True, True, False])
    ).compute()
    right = np.zeros((CLASSES, CLASSES))
    right[0, 1], right[3, 3] = 2, 1
    np.testing.assert_array_equal(counts, right)
    assert counts.dtype == jnp.int32
