"""The trials of a search for hyperparameters."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from alexnet_jax.plots import style

Trial = tuple[str, float | None, Mapping[str, Any]]  # state, accuracy, options
_STATES = {
    "complete": ("trained to the end", style.BLUE, "o"),
    "pruned": ("pruned, at that epoch", style.ORANGE, "x"),
}


@style.applied()
def search(
    trials: Sequence[Trial], importances: Mapping[str, float], logarithmic: Collection[str] = ()
) -> Figure:
    """Draws accuracy by trial, the importance of each option, and accuracy by each option.

    The state of a trial is "complete", "pruned" or "fail". Importances are shares of the variance.
    """
    names = list(dict.fromkeys(name for *_, options in trials for name in options))
    columns = min(3, max(2, len(names)))
    places = names + ["."] * (-len(names) % columns)
    grid: list[Any] = [["history"] * (columns - 1) + ["importances"]]
    grid += [places[i : i + columns] for i in range(0, len(places), columns)]
    figure = Figure(figsize=(4 * columns, 3 * len(grid)))
    axes = figure.subplot_mosaic(grid)
    _draw_history(axes["history"], trials)
    _draw_importances(axes["importances"], importances)
    for name in names:
        _draw_option(axes[name], trials, name, logarithmic=name in logarithmic)
    return figure


def _draw_history(axes: Axes, trials: Sequence[Trial]) -> None:
    for state, (label, color, marker) in _STATES.items():
        points = [(i, a) for i, (s, a, _) in enumerate(trials, 1) if s == state and a is not None]
        if not points:
            continue
        numbers, accuracies = zip(*points, strict=True)
        if state == "complete":
            best = np.maximum.accumulate([*accuracies, accuracies[-1]])
            axes.step([*numbers, len(trials)], best, where="post", color=color, label="best so far")
        axes.plot(numbers, accuracies, marker, color=color, label=label)
    axes.set(xlabel="trial, in the order they began", ylabel="validation accuracy")
    style.whole_numbers(axes.xaxis)
    style.percent(axes.yaxis)
    style.legend_above(axes, ncols=3)


def _draw_importances(axes: Axes, importances: Mapping[str, float]) -> None:
    axes.set_xlabel("share of the variance explained")
    if not importances:
        axes.text(0.5, 0.5, "too few trials to tell", ha="center", color=style.MUTED)
        axes.set_yticks([])
        axes.grid(False)
        return
    names, shares = zip(*sorted(importances.items(), key=lambda item: item[1]), strict=True)
    axes.barh([style.short(name.rpartition(".")[2]) for name in names], shares, color=style.PURPLE)
    style.percent(axes.xaxis)


def _draw_option(axes: Axes, trials: Sequence[Trial], name: str, *, logarithmic: bool) -> None:
    for state, (_, color, marker) in _STATES.items():
        found = [(options[name], a) for s, a, options in trials if s == state and name in options]
        points = [(value, accuracy) for value, accuracy in found if accuracy is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker, color=color)
    axes.set_xlabel(name)
    axes.margins(x=0.15)
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=7))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    style.percent(axes.yaxis)
