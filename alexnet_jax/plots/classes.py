"""What a classifier gets right: confusion matrix, scores by class, reliability diagram."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from alexnet_jax.plots import style

_MAX_NUMBERED, _MAX_NAMED = 12, 40  # classes whose cells have numbers, whose rows have names
_MAX_CELLS = 200  # in a row of a confusion matrix


@style.applied()
def confusion_matrix(counts: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Draws counts int[true class, predicted class] as shares of the true classes."""
    classes = len(counts)
    side = 4.2 + 2.2 * min(classes, _MAX_NAMED) / _MAX_NAMED + 0.8 * (classes > 5)
    figure, axes = style.subplots(side + 0.8, side)
    images = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, images, out=np.zeros(counts.shape), where=images > 0)
    # Of more cells than can be seen, the largest of each block.
    starts = np.arange(0, classes, -(-classes // _MAX_CELLS))
    cells = np.maximum.reduceat(np.maximum.reduceat(shares, starts, 0), starts, 1)
    # One color, more opaque for a larger share, reads on light and on dark. The square root shows
    # the few errors of a good network.
    colors = np.full((*cells.shape, 4), to_rgba(style.BLUE))
    colors[..., 3] = np.sqrt(cells)
    edge = classes - 0.5
    axes.imshow(colors, interpolation="none", extent=(-0.5, edge, edge, -0.5))
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.grid(False)
    axes.spines[:].set_visible(True)
    if classes <= _MAX_NAMED:
        names = [style.short(name) for name in class_names]
        size = 9 if classes <= 20 else 6
        rotation = 90 if max(map(len, names)) * classes > 60 else 0
        axes.set_xticks(np.arange(classes), names, rotation=rotation, fontsize=size)
        axes.set_yticks(np.arange(classes), names, fontsize=size)
        axes.tick_params(length=0)
    if classes <= _MAX_NUMBERED:
        for (i, j), count in np.ndenumerate(counts):
            if count:
                color = "white" if shares[i, j] > 0.3 else style.INK
                axes.text(j, i, f"{count:,}", color=color, ha="center", va="center", fontsize=9)
    return figure


@style.applied()
def class_scores(scores: Mapping[str, np.ndarray], class_names: Sequence[str]) -> Figure:
    """Draws scores float[classes] of 0..1, such as precision; of many classes they are sorted."""
    classes = len(class_names)
    if classes > _MAX_NAMED:
        figure, axes = style.subplots(5, 3.6)
        for (label, values), color in zip(scores.items(), style.SERIES, strict=False):
            axes.plot(np.arange(1, classes + 1), np.sort(values), color=color, label=label)
        axes.set(xlabel="classes, worst first", ylim=(-0.02, 1.02))
        style.percent(axes.yaxis)
        axes.legend()
        return figure
    figure, axes = style.subplots(5, 1.3 + 0.27 * classes)
    rows = np.arange(classes)
    for (label, values), color, marker in zip(scores.items(), style.SERIES, "<>o", strict=False):
        axes.plot(values, rows, color=color, label=label, marker=marker, linestyle="")
    axes.set_yticks(rows, [style.short(name) for name in class_names], fontsize=9)
    lowest = min(0.9, *(np.nanmin(np.append(values, 1)) for values in scores.values()))
    margin = 0.03 * (1 - lowest)
    axes.set(xlim=(lowest - margin, 1 + margin), ylim=(classes - 0.5, -0.5))
    axes.set_xticks([tick for tick in axes.get_xticks() if lowest - 1e-9 <= tick <= 1 + 1e-9])
    style.percent(axes.xaxis)
    style.legend_above(axes, ncols=3)
    return figure


@style.applied()
def reliability_diagram(counts: np.ndarray, confidence: np.ndarray, accuracy: np.ndarray) -> Figure:
    """Draws accuracy by confidence, and the share of predictions, in bins of equal width over 0..1.

    Accuracy and mean confidence are NaN in an empty bin.
    """
    figure, (upper, lower) = style.subplots(5, 4.4, nrows=2, sharex=True, height_ratios=(3, 1))
    bins = len(counts)
    left = np.arange(bins) / bins
    bars: dict[str, Any] = {"width": 1 / bins, "align": "edge", "linewidth": 0}
    upper.bar(left, np.nan_to_num(accuracy), color=style.BLUE, alpha=0.75, **bars)
    upper.plot([0, 1], [0, 1], color=style.MUTED, linestyle="--", label="perfectly calibrated")
    dots: dict[str, Any] = {"marker": "o", "markersize": 4, "linestyle": ""}
    upper.plot(confidence, accuracy, color=style.ORANGE, label="at the mean confidence", **dots)
    upper.set(ylabel="accuracy", ylim=(0, 1.02))
    style.legend_above(upper, ncols=2, fontsize=8)
    lower.bar(left, counts / max(counts.sum(), 1), color=style.MUTED, **bars)
    lower.set(xlabel="confidence", ylabel="share", xlim=(0, 1))
    for axis in (upper.yaxis, lower.xaxis, lower.yaxis):
        style.percent(axis)
    return figure
