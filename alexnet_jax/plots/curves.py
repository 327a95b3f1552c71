"""Curves over epochs or time: loss, accuracy, learning rate, throughput, runs compared."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alexnet_jax.plots import style

Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # split to (epochs, values)

# Of each split: label, color, line.
SPLITS = {
    "train": ("train", style.BLUE, "-"),
    "validation": ("validation", style.ORANGE, "-"),
    "validation_ema": ("validation, averaged weights", style.GREEN, "--"),
    "validation_tta": ("validation, TTA", style.TEAL, "-"),
    "validation_tta_ema": ("validation, TTA, averaged weights", style.TEAL, "--"),
    "test": ("test", style.RED, "-"),
    "test_ema": ("test, averaged weights", style.PURPLE, "-"),
    "test_tta": ("test, TTA", style.PINK, "-"),
    "test_tta_ema": ("test, TTA, averaged weights", style.YELLOW, "-"),
}
_MAX_POINTS = 500  # of a curve: more make a page slow and show no more


@style.applied()
def metric_curves(runs: Mapping[str, Sequence[Curves]], title: str = "") -> Figure:
    """Draws "loss" and "accuracy", or one of them, over the epochs.

    Of several runs, which must have the same splits and epochs, the mean and the range are drawn.
    """
    figure, row = style.subplots(5 * len(runs), 4, ncols=len(runs), squeeze=False)
    for axes, (metric, curves) in zip(row[0], runs.items(), strict=True):
        for split, (label, color, line) in SPLITS.items():
            if split in curves[0]:
                epochs = curves[0][split][0]
                values = np.array([each[split][1] for each in curves])
                _plot(axes, epochs, values.mean(0), color=color, linestyle=line, label=label)
                if len(curves) > 1:
                    _band(axes, epochs, values.min(0), values.max(0), color)
        _label(axes, "epoch", "cross-entropy (nats)" if metric == "loss" else metric)
    if title:
        figure.suptitle(title)
    style.legend_below(figure, row[0, 0], len(SPLITS) if len(runs) > 1 else 2)
    return figure


@style.applied()
def learning_rate(epochs: np.ndarray, rates: np.ndarray) -> Figure:
    """Draws the learning rate of each step."""
    figure, axes = style.subplots(5, 3)
    shown = evenly_spaced(len(epochs), _MAX_POINTS)
    axes.plot(epochs[shown], rates[shown], color=style.BLUE, marker="o" if len(shown) == 1 else "")
    _label(axes, "epoch", "learning rate")
    axes.set_ylim(bottom=0)
    return figure


@style.applied()
def throughput(epochs: np.ndarray, images_per_second: np.ndarray) -> Figure:
    """Draws the median of the throughput in 100 stretches of the run, and 80% of its values."""
    figure, axes = style.subplots(5, 3)
    stretches = np.array_split(np.arange(len(epochs)), min(len(epochs), 100))
    centers = [float(epochs[stretch].mean()) for stretch in stretches]
    low, median, high = np.transpose(
        [np.percentile(images_per_second[stretch], (10, 50, 90)) for stretch in stretches]
    )
    if len(epochs) > len(stretches):
        _band(axes, centers, low, high, style.BLUE)
    axes.plot(centers, median, color=style.BLUE, marker="o" if len(centers) == 1 else "")
    _label(axes, "epoch", "images per second")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    return figure


@style.applied()
def compare_runs(runs: Mapping[str, Curves], metric: str) -> Figure:
    """Draws the training loss of several runs, or their validation accuracy.

    A diamond is the accuracy on the test set. Averaged weights count, where a run has them.
    """
    figure, axes = style.subplots(5, 4)
    split = "train" if metric == "loss" else "validation"
    for i, (name, curves) in enumerate(runs.items()):
        line = _series(i)
        curve = curves.get(f"{split}_ema", curves.get(split, ([], [])))
        _plot(axes, *curve, label=name, **line)
        if metric == "accuracy":
            test = curves.get("test_ema", curves.get("test", ([], [])))
            axes.plot(*test, color=line["color"], marker="D", linestyle="")
    _label(axes, "epoch", "training loss (nats)" if metric == "loss" else metric)
    style.legend_below(figure, axes, 2)
    return figure


@style.applied()
def accuracy_over_time(rows: Sequence[tuple[str, np.ndarray, np.ndarray]], split: str) -> Figure:
    """Draws accuracy over the time of training, with its standard deviation over the seeds.

    A row is a name, seconds float[epochs], and accuracies float[seeds, epochs] of 0..1.
    """
    figure, axes = style.subplots(7, 4.5)
    longest = max((seconds[-1] for _, seconds, _ in rows if len(seconds)), default=0.0)
    unit, per = ("h", 3600) if longest >= 3 * 3600 else ("min", 60) if longest >= 180 else ("s", 1)
    for i, (name, seconds, accuracies) in enumerate(rows):
        line = _series(i)
        mean = accuracies.mean(axis=0)
        _plot(axes, seconds / per, mean, label=name, **line)
        if len(accuracies) > 1:
            std = accuracies.std(axis=0, ddof=1)
            _band(axes, seconds / per, mean - std, mean + std, line["color"])
    _label(axes, f"training time of one seed ({unit})", f"{split} accuracy")
    style.legend_below(figure, axes, 2)
    return figure


def evenly_spaced(length: int, most: int) -> np.ndarray:
    """Returns at most so many indices of a sequence, evenly spaced, with its first and last."""
    return np.unique(np.linspace(0, length - 1, min(length, most)).round().astype(int))


def _label(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_xlim(left=0)
    if xlabel == "epoch":
        style.whole_numbers(axes.xaxis)
    if ylabel.endswith("accuracy"):
        style.percent(axes.yaxis)


def _series(index: int) -> dict[str, str]:
    line = ("-", "--", ":", "-.")[index // len(style.SERIES) % 4]
    return {"color": style.SERIES[index % len(style.SERIES)], "linestyle": line}


def _plot(axes: Axes, x: Any, y: Any, **options: Any) -> None:
    # A line of one point would be invisible, and hundreds of points a caterpillar.
    marker = "o" if len(x) == 1 else "." if len(x) <= 40 else ""
    axes.plot(x, y, marker=marker, **options)


def _band(axes: Axes, x: Any, low: Any, high: Any, color: str) -> None:
    axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
