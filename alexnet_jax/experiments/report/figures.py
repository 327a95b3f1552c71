"""The figures of a report, by Matplotlib: each is drawn once, for a page and for a PNG file.

In the page a figure is SVG whose colours are variables of the page's style, so that it follows a
light or a dark one. Figures are made as objects, without pyplot: no window, no global state.
"""

import base64
import io
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from alexnet_jax.experiments.report import statistics
from alexnet_jax.run.directory import SPLITS

if TYPE_CHECKING:  # 0.5 s to import, at the end of a run soon enough
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# As a PNG file has them, to the names of the page's variables (see base.html.jinja).
INK, MUTED, LINE = "#1f2328", "#59636e", "#d1d9e0"
BLUE, ORANGE, GREEN, RED, PURPLE = "#0969da", "#bc4c00", "#1a7f37", "#cf222e", "#8250df"
TEAL, PINK, YELLOW = "#1b7c83", "#bf3989", "#7d4e00"
SERIES = (BLUE, ORANGE, GREEN, RED, PURPLE, TEAL, PINK, YELLOW)
_VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line"} | {
    colour: f"series-{i}" for i, colour in enumerate(SERIES)
}
_STYLES = {
    "train": ("train", BLUE, "-"),
    "validation": (SPLITS["validation"], ORANGE, "-"),
    "validation_ema": (SPLITS["validation_ema"], GREEN, "--"),
    "validation_tta": (SPLITS["validation_tta"], TEAL, "-"),
    "validation_tta_ema": (SPLITS["validation_tta_ema"], TEAL, "--"),
    "test": (SPLITS["test"], RED, "-"),
    "test_ema": (SPLITS["test_ema"], PURPLE, "-"),
    "test_tta": (SPLITS["test_tta"], PINK, "-"),
    "test_tta_ema": (SPLITS["test_tta_ema"], YELLOW, "-"),
}
_MOST_POINTS = 500  # of a curve: more make a page slow and show no more
_WITH_NUMBERS, _WITH_NAMES = 12, 40  # classes whose cells, or rows, are written out
_MOST_CELLS = 200  # in a row of a confusion matrix
_LONGEST_NAME = 18
_DPI = 120


def _figure(width: float, height: float, title: str = "") -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    if title:
        figure.suptitle(title, color=INK, parse_math=False)
    return figure


def _style(axes: "Axes", xlabel: str, ylabel: str, *, grid: bool = True) -> None:
    axes.set_xlabel(xlabel, color=MUTED)
    axes.set_ylabel(ylabel, color=MUTED)
    axes.tick_params(colors=MUTED)
    for side, spine in axes.spines.items():
        spine.set_color(LINE)
        spine.set_visible(side in ("left", "bottom"))
    if grid:
        axes.grid(color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)


def _over_epochs(axes: "Axes", ylabel: str) -> None:
    _style(axes, "epoch", ylabel)
    axes.set_xlim(left=0)
    _whole_numbers(axes)


def _whole_numbers(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _percent(axis: "Axis") -> None:
    axis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")


def _legend(axes: "Axes", **options: Any) -> None:
    if axes.get_legend_handles_labels()[0]:  # else Matplotlib warns of an empty legend
        legend = axes.legend(frameon=False, labelcolor=INK, **options)
        for text in legend.get_texts():
            text.set_parse_math(False)


def _plot_epochs(axes: "Axes", epochs: Any, values: Any, **options: Any) -> None:
    # A line of one point would be invisible, and hundreds of points a caterpillar.
    marker = "o" if len(epochs) == 1 else "." if len(epochs) <= 40 else ""
    axes.plot(epochs, values, marker=marker, **options)


def _legend_below(figure: "Figure", axes: "Axes", columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        legend = figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            labelcolor=INK,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)


def _draw_curve(axes: "Axes", runs: Sequence[list[dict[str, Any]]], name: str) -> None:
    """Draws the mean of runs of the same length, and the range that they all lie in."""
    found = [statistics.epoch_curves(records, name) for records in runs]
    for split, (label, colour, style) in _STYLES.items():
        if split in found[0]:
            epochs = found[0][split][0]
            values = np.array([one[split][1] for one in found])
            _plot_epochs(axes, epochs, values.mean(0), color=colour, linestyle=style, label=label)
            if len(runs) > 1:
                axes.fill_between(
                    epochs, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0
                )
    _over_epochs(axes, "cross-entropy (nats)" if name == "loss" else name)
    if name == "accuracy":
        _percent(axes.yaxis)


def curves(runs: Sequence[list[dict[str, Any]]], title: str) -> "Figure":
    """Draws loss and accuracy over the epochs, side by side.

    Args:
        runs: The records of each; of several, which must have the same splits and epochs, the mean
            is drawn, and the range around it.
        title: Of the figure.
    """
    figure = _figure(10, 4, title)
    left, right = figure.subplots(1, 2)
    _draw_curve(left, runs, "loss")
    _draw_curve(right, runs, "accuracy")
    _legend_below(figure, left, len(_STYLES))
    return figure


def curve(records: list[dict[str, Any]], name: str) -> "Figure":
    """Draws "loss" or "accuracy" over the epochs."""
    figure = _figure(5, 4)
    axes = figure.subplots()
    _draw_curve(axes, [records], name)
    _legend_below(figure, axes, 2)
    return figure


def learning_rate(records: list[dict[str, Any]]) -> "Figure":
    """Draws the learning rate over the epochs."""
    figure = _figure(5, 3)
    axes = figure.subplots()
    epochs, rates = statistics.step_curve(records, "learning_rate")
    chosen = statistics.thinned(epochs, _MOST_POINTS)
    axes.plot(epochs[chosen], rates[chosen], color=BLUE, marker="o" if len(chosen) == 1 else "")
    _over_epochs(axes, "learning rate")
    axes.set_ylim(bottom=0)
    return figure


def throughput(records: list[dict[str, Any]]) -> "Figure":
    """Draws images per second over the epochs: the median, and where most of them lie."""
    figure = _figure(5, 3)
    axes = figure.subplots()
    epochs, pace = statistics.step_curve(records, "images_per_second")
    stretches = np.array_split(np.arange(len(epochs)), min(len(epochs), 100))
    middle = [float(epochs[stretch].mean()) for stretch in stretches]
    low, median, high = np.array(
        [np.percentile(pace[stretch], (10, 50, 90)) for stretch in stretches]
    ).T
    if len(pace) > len(stretches):
        axes.fill_between(middle, low, high, color=BLUE, alpha=0.2, linewidth=0)
    axes.plot(middle, median, color=BLUE, marker="o" if len(middle) == 1 else "")
    _over_epochs(axes, "images per second")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    return figure


def short(name: str) -> str:
    """Cuts a class name to what a figure has room for."""
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"


def _pooled(shares: np.ndarray) -> np.ndarray:
    """Takes the largest of each block of cells, where there are too many to see one."""
    side = -(-len(shares) // _MOST_CELLS)
    missing = -len(shares) % side
    padded = np.pad(shares, (0, missing))
    blocks = padded.reshape(len(padded) // side, side, -1, side)
    pooled: np.ndarray = blocks.max(axis=(1, 3))
    return pooled


def confusion(counts: np.ndarray, class_names: Sequence[str]) -> "Figure":
    """Draws a confusion matrix; the darker a cell, the larger its share of the true class.

    Args:
        counts: int[classes, classes]; rows are true classes.
        class_names: Of the rows.
    """
    classes = len(counts)
    side = 4.2 + 2.2 * min(classes, _WITH_NAMES) / _WITH_NAMES + 0.8 * (classes > 5)
    figure = _figure(side + 0.8, side)
    axes = figure.subplots()
    images = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, images, out=np.zeros(counts.shape), where=images > 0)
    cells = _pooled(shares)
    # One colour, the more of it the larger the share, so that it reads on light and on dark. The
    # root shows the few mistakes of a good network.
    colours = np.empty((*cells.shape, 4))
    colours[...] = (*(int(BLUE[i : i + 2], 16) / 255 for i in (1, 3, 5)), 1.0)
    colours[..., 3] = np.sqrt(cells)
    edge = classes - 0.5
    axes.imshow(colours, interpolation="none", extent=(-0.5, edge, edge, -0.5))
    _style(axes, "predicted class", "true class", grid=False)
    for spine in axes.spines.values():
        spine.set_visible(True)
    if classes <= _WITH_NAMES:
        names = [short(name) for name in class_names]
        ticks = np.arange(classes)
        size = 9 if classes <= 20 else 6
        turned = 90 if max(map(len, names)) * classes > 60 else 0
        axes.set_xticks(ticks, names, parse_math=False, rotation=turned, fontsize=size)
        axes.set_yticks(ticks, names, parse_math=False, fontsize=size)
        axes.tick_params(length=0)
    if classes <= _WITH_NUMBERS:
        for (i, j), count in np.ndenumerate(counts):
            if count:
                colour = "white" if shares[i, j] > 0.3 else INK
                axes.text(j, i, f"{count:,}", color=colour, ha="center", va="center", fontsize=9)
    return figure


def scores(found: statistics.ClassScores, class_names: Sequence[str]) -> "Figure":
    """Draws precision, recall and F1 of each class; of many classes, in order of size."""
    kinds = ("precision", "recall", "f1")
    labels = ("precision", "recall", "F1")
    classes = len(class_names)
    if classes > _WITH_NAMES:
        figure = _figure(5, 3.6)
        axes = figure.subplots()
        for kind, label, colour in zip(kinds, labels, SERIES, strict=False):
            values = np.sort(getattr(found, kind))  # NaN comes last, and is not drawn
            axes.plot(np.arange(1, classes + 1), values, color=colour, label=label)
        _style(axes, "classes, worst first", "")
        _percent(axes.yaxis)
        axes.set_ylim(-0.02, 1.02)
        _legend(axes)
        return figure
    figure = _figure(5, 1.3 + 0.27 * classes)
    axes = figure.subplots()
    rows = np.arange(classes)
    for kind, label, colour, marker in zip(kinds, labels, SERIES, "<>o", strict=False):
        axes.plot(
            getattr(found, kind), rows, color=colour, label=label, marker=marker, linestyle=""
        )
    _style(axes, "", "")
    names = [short(name) for name in class_names]
    axes.set_yticks(rows, names, parse_math=False, fontsize=9)
    axes.set_ylim(classes - 0.5, -0.5)
    lowest = min(0.9, *(np.nanmin(np.append(getattr(found, kind), 1)) for kind in kinds))
    margin = 0.03 * (1 - lowest)
    axes.set_xlim(lowest - margin, 1 + margin)
    axes.set_xticks([tick for tick in axes.get_xticks() if lowest - 1e-9 <= tick <= 1 + 1e-9])
    _percent(axes.xaxis)
    _legend(axes, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    return figure


def calibration(found: statistics.Calibration) -> "Figure":
    """Draws the reliability diagram: accuracy by confidence, and how many answers have it."""
    figure = _figure(5, 4.4)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    bins = len(found.counts)
    left = np.arange(bins) / bins
    bars: dict[str, Any] = {"width": 1 / bins, "align": "edge", "linewidth": 0}
    upper.bar(left, np.nan_to_num(found.accuracy), color=BLUE, alpha=0.75, **bars)
    upper.plot([0, 1], [0, 1], color=MUTED, linestyle="--", label="perfectly calibrated")
    upper.plot(
        found.confidence, found.accuracy, color=ORANGE, marker="o", markersize=4, linestyle="",
        label="at the mean confidence",
    )  # fmt: skip
    _style(upper, "", "accuracy")
    upper.set_ylim(0, 1.02)
    _percent(upper.yaxis)
    _legend(upper, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=8)
    share = found.counts / max(found.counts.sum(), 1)
    lower.bar(left, share, color=MUTED, **bars)
    _style(lower, "confidence", "share")
    lower.set_xlim(0, 1)
    for axis in (lower.xaxis, lower.yaxis):
        _percent(axis)
    return figure


def mistakes(pictures: np.ndarray, captions: Sequence[str]) -> "Figure":
    """Lays out pictures uint8[M, H, W, C] with what is written below each."""
    columns = min(6, len(pictures))
    rows = -(-len(pictures) // columns)
    height, width = pictures.shape[1:3]
    figure = _figure(1.5 * columns, (1.5 * height / width + 0.45) * rows)
    axes = figure.subplots()
    axes.set_axis_off()
    step = height + 0.32 * width
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = (i % columns) * 1.08 * width, (i // columns) * step
        axes.imshow(picture, extent=(x, x + width, y + height, y), interpolation="none")
        axes.text(
            x, y + height + 0.03 * width, caption, va="top", color=INK, fontsize=6.5,
            parse_math=False,
        )  # fmt: skip
    axes.set_xlim(0, (1.08 * columns - 0.08) * width)
    axes.set_ylim(rows * step, 0)
    return figure


def tiled(pictures: np.ndarray, gap: int = 1) -> np.ndarray:
    """Lays pictures out in rows.

    Args:
        pictures: uint8[rows, columns, H, W, 3].
        gap: Pixels between them, transparent.

    Returns:
        uint8[rows * (H + gap) - gap, columns * (W + gap) - gap, 4].
    """
    rows, columns, height, width, _ = pictures.shape
    sheet = np.zeros((rows, height + gap, columns, width + gap, 4), np.uint8)
    sheet[:, :height, :, :width, :3] = pictures.transpose(0, 2, 1, 3, 4)
    sheet[:, :height, :, :width, 3] = 255
    whole = sheet.reshape(rows * (height + gap), columns * (width + gap), 4)
    return whole[: whole.shape[0] - gap, : whole.shape[1] - gap]


def filter_sheet(filters: np.ndarray) -> np.ndarray:
    """Shows kernels float[n, h, w, channels] as `tiled` pictures, each from black to its largest.

    The first three channels are red, green and blue; of fewer, the first is grey.
    """
    low = filters.min(axis=(1, 2, 3), keepdims=True)
    span = filters.max(axis=(1, 2, 3), keepdims=True) - low
    scaled = np.divide(filters - low, span, out=np.zeros_like(filters), where=span > 0)
    pictures = np.rint(255 * scaled).astype(np.uint8)
    pictures = pictures[..., :3] if pictures.shape[-1] >= 3 else pictures[..., [0, 0, 0]]
    columns = next(n for n in (16, len(pictures)) if n <= len(pictures))
    missing = -len(pictures) % columns
    sheet = tiled(
        np.concatenate([pictures, pictures[:missing]]).reshape(-1, columns, *pictures.shape[1:])
    )
    if missing:  # what only fills the last row is not shown
        height, width = pictures.shape[1:3]
        sheet[-height:, (columns - missing) * (width + 1) :, 3] = 0
    return sheet


def enlarged(picture: np.ndarray, least: int = 640) -> np.ndarray:
    """Repeats the pixels of [H, W, C] until it is at least so wide."""
    times = -(-least // picture.shape[1])
    return picture.repeat(times, axis=0).repeat(times, axis=1)


def comparison(runs: Sequence[tuple[str, list[dict[str, Any]]]], name: str) -> "Figure":
    """Draws a curve of several runs over each other.

    Args:
        runs: Name, and records of ``metrics.jsonl``, of each.
        name: "loss", of training, or "accuracy": of validation, with that of test as a diamond at
            the end, and both of the averaged weights where they are kept.
    """
    figure = _figure(5, 4)
    axes = figure.subplots()
    for i, (run, records) in enumerate(runs):
        options: dict[str, Any] = {
            "color": SERIES[i % len(SERIES)],
            "linestyle": ("-", "--", ":", "-.")[i // len(SERIES) % 4],
        }
        found = statistics.epoch_curves(records, name)
        split = "train" if name == "loss" else "validation"
        _plot_epochs(
            axes, *found.get(f"{split}_ema", found.get(split, ([], []))), label=run, **options
        )
        if name == "accuracy":
            tested = found.get("test_ema", found.get("test", ([], [])))
            axes.plot(*tested, color=options["color"], marker="D", linestyle="")
    _over_epochs(axes, "training loss (nats)" if name == "loss" else "accuracy")
    if name == "accuracy":
        _percent(axes.yaxis)
    _legend_below(figure, axes, 2)
    return figure


def search(
    trials: Sequence[tuple[str, float | None, Mapping[str, Any]]],
    importances: Mapping[str, float],
    logarithmic: Collection[str] = (),
) -> "Figure":
    """Draws the trials of a sweep: how far it has come, what matters, and each option by itself.

    Args:
        trials: State ("complete", "pruned" or "fail"), accuracy and options of each, in order.
        importances: Share of the variation that each option explains; may be empty.
        logarithmic: Options whose axes are.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    names = list(dict.fromkeys(name for *_, options in trials for name in options))
    columns = min(3, max(2, len(names)))
    below = -(-len(names) // columns)
    figure = _figure(4 * columns, 3 * (1 + below))
    grid = figure.add_gridspec(1 + below, columns)
    history = figure.add_subplot(grid[0, : columns - 1])
    measured = [(i, *trial) for i, trial in enumerate(trials, 1) if trial[1] is not None]
    complete = [(i, accuracy) for i, state, accuracy, _ in measured if state == "complete"]
    pruned = [(i, accuracy) for i, state, accuracy, _ in measured if state == "pruned"]
    if complete:
        numbers, values = zip(*complete, strict=True)
        history.step(
            [*numbers, len(trials)],
            np.maximum.accumulate([*values, values[-1]]),
            where="post",
            color=BLUE,
            label="best so far",
        )
        history.plot(*zip(*complete, strict=True), "o", color=BLUE, label="trained to the end")
    if pruned:
        history.plot(*zip(*pruned, strict=True), "x", color=ORANGE, label="pruned, at that epoch")
    _style(history, "trial, in the order they began", "validation accuracy")
    _whole_numbers(history)
    _percent(history.yaxis)
    _legend(history, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)  # where no trial can be

    importance = figure.add_subplot(grid[0, columns - 1])
    shown = sorted(importances.items(), key=lambda item: item[1])
    if shown:
        labels = [short(name.rpartition(".")[2]) for name, _ in shown]
        importance.barh(labels, [share for _, share in shown], color=PURPLE)
        importance.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
    else:
        importance.text(0.5, 0.5, "too few trials to tell", ha="center", color=MUTED)
        importance.set_yticks([])
    _style(importance, "explains of the variation", "", grid=bool(shown))

    for place, name in enumerate(names):
        axes = figure.add_subplot(grid[1 + place // columns, place % columns])
        for state, colour, marker in (("complete", BLUE, "o"), ("pruned", ORANGE, "x")):
            points = [(o[name], a) for _, s, a, o in measured if s == state and name in o]
            if points:
                axes.plot(*zip(*points, strict=True), marker, color=colour)
        _style(axes, name, "")
        axes.margins(x=0.15)
        if name in logarithmic:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=7))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        _percent(axes.yaxis)
    return figure


def accuracy_over_time(rows: Sequence[tuple[str, np.ndarray, np.ndarray]], split: str) -> "Figure":
    """Draws how accuracy grows with the time of training, with its deviation over seeds.

    Args:
        rows: Name; seconds float[epochs]; accuracies float[seeds, epochs], 0..1.
        split: What the accuracy is of.
    """
    figure = _figure(7, 4.5)
    axes = figure.subplots()
    longest = max((seconds[-1] for _, seconds, _ in rows if len(seconds)), default=0.0)
    unit, per = ("h", 3600) if longest >= 3 * 3600 else ("min", 60) if longest >= 180 else ("s", 1)
    for i, (name, seconds, accuracies) in enumerate(rows):
        colour = SERIES[i % len(SERIES)]
        style = ("-", "--", ":", "-.")[i // len(SERIES) % 4]
        mean = accuracies.mean(axis=0)
        _plot_epochs(axes, seconds / per, mean, color=colour, linestyle=style, label=name)
        if len(accuracies) > 1:
            deviation = accuracies.std(axis=0, ddof=1)
            axes.fill_between(
                seconds / per, mean - deviation, mean + deviation, color=colour, alpha=0.2, lw=0
            )
    _style(axes, f"training time of one seed ({unit})", f"{split} accuracy")
    axes.set_xlim(left=0)
    _percent(axes.yaxis)
    _legend_below(figure, axes, 2)
    return figure


@contextmanager
def _quietly() -> Iterator[None]:
    """Without a warning for each letter of a class name that the font lacks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        warnings.filterwarnings("ignore", "Matplotlib currently does not support", UserWarning)
        yield


def png(figure: "Figure") -> bytes:
    """Returns a figure as a PNG file, on white."""
    content = io.BytesIO()
    with _quietly():
        figure.savefig(content, format="png", facecolor="white")
        figure.set_layout_engine("none")  # as it is, for what else is made of it: half the time
    return content.getvalue()


def pixels(figure: "Figure") -> np.ndarray:
    """Returns a figure as a picture uint8[H, W, 3], on white."""
    with Image.open(io.BytesIO(png(figure))) as image:
        return np.asarray(image.convert("RGB"))


def picture_png(picture: np.ndarray) -> bytes:
    """Returns a picture uint8[H, W, 3 or 4] as a PNG file."""
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "PNG", optimize=True)
    return content.getvalue()


def data_uri(content: bytes) -> str:
    """Returns a PNG file as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _restyled(tag: str, name: str) -> str:
    """Makes the colours of an SVG tag variables, and its names those of one figure alone."""
    tag = re.sub(r'\b(id="|url\(#|xlink:href="#)', rf"\g<1>{name}-", tag)
    for colour, variable in _VARIABLES.items():
        tag = tag.replace(colour, f"var(--{variable})")
    return tag


def svg(figure: "Figure", name: str, says: str) -> Markup:
    """Returns a figure as an SVG element whose colours follow the page.

    Args:
        figure: The figure.
        name: Unlike those of other figures in the page; letters.
        says: What it shows, for who cannot see it.
    """
    import matplotlib

    content = io.StringIO()
    # The only way to tell the SVG writer that text is text; it lasts as long as the writing.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), _quietly():
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    text = content.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r"<[^>]*>", lambda tag: _restyled(tag[0], name), text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    width = figure.get_figwidth() * 96
    head = f'<svg role="img" aria-label="{escape(says)}" style="max-width: {width:.0f}px"'
    return Markup(text.replace("<svg", head, 1))
