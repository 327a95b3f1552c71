"""What a run saves for its report, which needs neither the data set nor the checkpoints.

``predictions.npz`` holds the predictions for the test images; ``report.npz`` images, filters and
histograms of the parameters; ``environment.json`` and ``model.txt`` what ran where.
"""

import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from alexnet_jax.data.augment import Augment, Keys, center_crop
from alexnet_jax.environment import package_versions
from alexnet_jax.run import directory, files

Arrays = dict[str, np.ndarray]

SAMPLES = 12  # training images in the report
_AUGMENTED = 3  # random versions of each
_MISCLASSIFIED = 36  # images in the report
_FILTERS = 256
_LONGEST_SIDE = 128  # pixels of an image in the report
_HISTOGRAM_BINS = 40
_HISTOGRAM_VALUES = 2**20  # of an array, evenly spaced: more take seconds and tell no more

_PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets"),
    *("clu", "ml_collections", "numpy", "pillow", "scikit-learn", "matplotlib"),
)


class Predictions:
    """Collects the predictions for the test images, batch by batch."""

    def __init__(self) -> None:
        self._batches: list[Arrays] = []
        self._misclassified: list[tuple[float, int, np.ndarray]] = []
        self._images = 0
        self._pending: Mapping[str, Any] | None = None

    def add(self, batch: Mapping[str, Any]) -> None:
        """Adds what `steps.eval_step_with_predictions` returns; waits only for the batch before."""
        self._fetch()
        self._pending = batch

    def _fetch(self) -> None:
        if self._pending is None:
            return
        batch: dict[str, Any] = jax.device_get(dict(self._pending))
        self._pending = None
        mask, rows, images = (batch.pop(name) for name in ("mask", "mistakes", "pictures"))
        for row, image in zip(rows, images, strict=True):
            if mask[row] and batch["classes"][row, 0] != batch["label"][row]:
                index = self._images + int(mask[:row].sum())
                self._misclassified.append((-batch["probabilities"][row, 0], index, image))
        self._misclassified = sorted(self._misclassified, key=lambda x: x[:2])[:_MISCLASSIFIED]
        self._batches.append({name: values[mask] for name, values in batch.items()})
        self._images += int(mask.sum())

    def arrays(self) -> Arrays:
        """Returns the content of ``predictions.npz``, of N images in the order of their set.

        `label` int32[N]; `classes` int32[N, K], the top K, most probable first; their
        `probabilities` float32[N, K]; and `label_probability` float32[N], of the label.
        """
        self._fetch()
        names = self._batches[0]
        return {name: np.concatenate([batch[name] for batch in self._batches]) for name in names}

    def misclassified(self) -> Arrays:
        """Returns index int32[M] and images uint8[M, H, W, C] of the most confident errors."""
        self._fetch()
        found = {"misclassified_index": np.array([i for _, i, _ in self._misclassified], np.int32)}
        if images := [_shrink(image) for *_, image in self._misclassified]:
            found["misclassified_images"] = np.stack(images)
        return found


def _shrink(image: np.ndarray) -> np.ndarray:
    """Resizes an image uint8[H, W, C] that is larger than the report shows it."""
    picture = Image.fromarray(image)
    picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def augmented(images: np.ndarray, augment: Augment, seed: int) -> Arrays:
    """Returns `samples` uint8[versions, n, h, w, C]: the images, then their augmentations."""
    epoch, labels = jnp.int32(0), jnp.zeros(len(images), jnp.int32)

    def change(key: jax.Array) -> jax.Array:
        return augment(Keys(step=key, run=key), epoch, jnp.asarray(images), labels)[0]

    keys = jax.random.split(jax.random.key(seed), _AUGMENTED)
    changed = jax.device_get(jax.jit(jax.vmap(change))(keys))
    changed = np.clip(np.round(changed), 0, 255).astype(np.uint8)  # colors may leave the range
    if images.shape != changed.shape[1:]:  # augmentation crops
        images = np.asarray(center_crop(jnp.asarray(images), changed.shape[2]))
    rows = [images, *changed]
    return {"samples": np.stack([[_shrink(image) for image in row] for row in rows])}


def first_filters(variables: Any, channels: int) -> Arrays:
    """Returns `filters` float32[n, h, w, channels] of the first convolution of images, if any."""
    for leaf in jax.tree.leaves(variables):
        if leaf.ndim == 4 and leaf.shape[2] == channels:
            return {"filters": np.moveaxis(np.asarray(leaf, np.float32)[..., :_FILTERS], -1, 0)}
    return {}


def histograms(params: Any) -> Arrays:
    """Returns histograms as TensorBoard has them, float64[bins, 3] of left edge, right, count."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        values = np.asarray(leaf, np.float32).ravel()
        some = values[:: max(1, len(values) // _HISTOGRAM_VALUES)]
        counts, edges = np.histogram(some, _HISTOGRAM_BINS)
        counts = counts * (len(values) / len(some))
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found[f"histograms/{name}"] = np.stack([edges[:-1], edges[1:], counts], axis=1)
    return found


def write_inputs(
    folder: Path,
    predictions: Predictions,
    *,
    samples: np.ndarray,
    augment: Augment,
    variables: Mapping[str, Any],
    seed: int,
) -> None:
    """Writes ``predictions.npz`` and ``report.npz``.

    `samples` are some training images uint8[n, H, W, C]; `variables` made the predictions.
    """
    files.write_npz(folder / directory.PREDICTIONS, predictions.arrays())
    files.write_npz(
        folder / directory.REPORT_DATA,
        predictions.misclassified()
        | augmented(samples, augment, seed)
        | first_filters(variables, samples.shape[-1])
        | histograms(variables["params"]),
    )


def write_environment(folder: Path, model: str, devices: str, processes: int) -> None:
    """Writes ``environment.json``, and into ``model.txt`` what `models.describe` returns."""
    environment = {
        # The command of this process; python's own path says nothing elsewhere.
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "devices": devices,
        "processes": processes,
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": package_versions(_PACKAGES),
    }
    files.write_json(folder / directory.ENVIRONMENT, environment)
    files.write_text(folder / directory.MODEL, model + "\n")
