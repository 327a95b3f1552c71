"""What a run leaves for its report, so that this can be drawn without data set or checkpoints.

``predictions.npz`` has what the network answered for each test image; ``report.npz`` pictures,
kernels and histograms of the parameters; ``environment.json`` and ``model.txt`` what ran where.
"""

import contextlib
import importlib.metadata
import io
import logging
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from alexnet_jax.data.augment import Augment, centre
from alexnet_jax.errors import InputError
from alexnet_jax.run.directory import (
    ENVIRONMENT,
    MODEL,
    PREDICTIONS,
    REPORT_DATA,
    write_json,
    write_whole,
)

log = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]

PICTURES = 36  # mistakes that are shown
SAMPLES = 12  # training images that are shown
VERSIONS = 3  # of each, changed at random
FILTERS = 256  # kernels that are shown at most
LONGEST_SIDE = 128  # pixels of a picture that is kept
_HISTOGRAM_BINS = 40
_HISTOGRAM_VALUES = 2**20  # of an array, evenly spaced: more take seconds and tell no more

_PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets"),
    *("clu", "ml_collections", "numpy", "pillow", "scikit-learn", "matplotlib"),
)


class Predictions:
    """Collects the predictions for the test images, batch by batch."""

    def __init__(self) -> None:
        self._rows: list[Arrays] = []
        self._seen = 0
        self._mistakes: list[tuple[float, int, np.ndarray]] = []
        self._pending: Mapping[str, Any] | None = None

    def add(self, judged: Mapping[str, Any]) -> None:
        """Takes what `steps.judge_step` returns of the next batch; waits for the one before."""
        before, self._pending = self._pending, judged
        self._take(before)

    def _take(self, judged: Mapping[str, Any] | None) -> None:
        if judged is None:
            return
        found: dict[str, Any] = jax.device_get(dict(judged))
        mask, rows, pictures = (found.pop(name) for name in ("mask", "mistakes", "pictures"))
        for row, picture in zip(rows, pictures, strict=True):
            if mask[row] and found["classes"][row, 0] != found["label"][row]:
                index = self._seen + int(mask[:row].sum())
                confidence = float(found["probabilities"][row, 0])
                self._mistakes.append((-confidence, index, picture))
        self._mistakes = sorted(self._mistakes, key=lambda mistake: mistake[:2])[:PICTURES]
        self._rows.append({name: values[mask] for name, values in found.items()})
        self._seen += int(mask.sum())

    def arrays(self) -> Arrays:
        """Returns what ``predictions.npz`` holds of N images, in the order of their set.

        `label` int32[N]; `classes` int32[N, K], the likeliest, likeliest first; their
        `probabilities` float32[N, K]; and `label_probability` float32[N], of the label.
        """
        self._take(self._pending)
        self._pending = None
        return {name: np.concatenate([rows[name] for rows in self._rows]) for name in self._rows[0]}

    def misclassified(self) -> Arrays:
        """Returns index int32[M] and pictures uint8[M, H, W, C] of the most confident mistakes."""
        self._take(self._pending)
        self._pending = None
        if not self._mistakes:
            return {"mistake_index": np.zeros(0, np.int32)}
        return {
            "mistake_index": np.array([index for _, index, _ in self._mistakes], np.int32),
            "mistake_pictures": np.stack([shrunk(picture) for *_, picture in self._mistakes]),
        }


def shrunk(picture: np.ndarray) -> np.ndarray:
    """Makes a picture uint8[H, W, C] no larger than a report shows it."""
    longest = max(picture.shape[:2])
    if longest <= LONGEST_SIDE:
        return picture
    height, width = (max(1, side * LONGEST_SIDE // longest) for side in picture.shape[:2])
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS))


def augmented(images: np.ndarray, augment: Augment, seed: int) -> Arrays:
    """Returns training images as they are, and changed at random as in training.

    Args:
        images: uint8[n, H, W, C].
        augment: From key and images to images.
        seed: Of the random changes.

    Returns:
        `samples` uint8[1 + VERSIONS, n, h, w, C], the first as they are, or their middle.
    """
    keys = jax.random.split(jax.random.key(seed), VERSIONS)
    changed = jax.device_get(jax.jit(jax.vmap(augment, in_axes=(0, None)))(keys, images))
    changed = np.clip(np.round(changed), 0, 255).astype(np.uint8)  # colours may leave the scale
    plain = images
    if plain.shape != changed.shape[1:]:  # windows of the images
        plain = np.asarray(centre(jnp.asarray(images), changed.shape[2]))
    rows = [plain, *changed]
    return {"samples": np.stack([np.stack([shrunk(image) for image in row]) for row in rows])}


def first_filters(variables: Any, channels: int) -> Arrays:
    """Returns the kernels of the first convolution, if there is one.

    Args:
        variables: Of a network, also those that are measured and not trained.
        channels: Of its images; the first kernel with as many inputs counts.

    Returns:
        `filters` float32[n, height, width, channels], or nothing.
    """
    for leaf in jax.tree.leaves(variables):
        if leaf.ndim == 4 and leaf.shape[2] == channels:
            kernel = np.asarray(leaf, np.float32)[..., :FILTERS]
            return {"filters": np.moveaxis(kernel, -1, 0)}
    return {}


def histograms(params: Any) -> Arrays:
    """Counts the values of each parameter array, in the way of TensorBoard.

    Returns:
        "histograms/" and its path, to float64[bins, 3] of (left edge, right edge, count).
    """
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        values = np.asarray(leaf, np.float32).ravel()
        some = values[:: max(1, len(values) // _HISTOGRAM_VALUES)]
        counts, edges = np.histogram(some, _HISTOGRAM_BINS)
        counts = counts * (len(values) / len(some))
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found[f"histograms/{name}"] = np.stack([edges[:-1], edges[1:], counts], axis=1)
    return found


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Writes arrays into an npz file, whole or not at all; the same arrays make the same bytes."""
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)  # type: ignore[arg-type]  # none is named allow_pickle
    write_whole(path, content.getvalue())


def read_arrays(path: Path) -> Arrays:
    """Reads what `write_arrays` wrote; nothing if the file is not there.

    Raises:
        InputError: It is there and is damaged.
    """
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        return {}
    except Exception as error:  # Whatever damage makes zipfile and NumPy raise.
        raise InputError(f"{path} is damaged ({error}); put back a copy, or remove it.") from None


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

    Args:
        folder: The run folder.
        predictions: For the whole test set.
        samples: uint8[n, H, W, C], some training images.
        augment: As training changes them.
        variables: Of the network that was tested.
        seed: Of the random changes.
    """
    write_arrays(folder / PREDICTIONS, predictions.arrays())
    write_arrays(
        folder / REPORT_DATA,
        predictions.misclassified()
        | augmented(samples, augment, seed)
        | first_filters(variables, samples.shape[-1])
        | histograms(variables["params"]),
    )


def write_environment(folder: Path, model: str, devices: str, processes: int) -> None:
    """Writes ``environment.json`` and ``model.txt``: what runs, where, by what command.

    Args:
        folder: The run folder.
        model: What `models.describe` says of the network.
        devices: Their number and kind.
        processes: How many train.
    """
    write_json(
        folder / ENVIRONMENT,
        {
            # The command of this process; python's own path says nothing elsewhere.
            "command": shlex.join(["python", *sys.orig_argv[1:]]),
            "devices": devices,
            "processes": processes,
            "platform": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "versions": versions(_PACKAGES),
        },
    )
    write_whole(folder / MODEL, (model + "\n").encode())


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Returns the versions of those packages that are installed."""
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
