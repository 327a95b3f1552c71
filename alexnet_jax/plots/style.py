"""One style for all figures, and figures as PNG and as SVG that follows a page's theme.

They are made as objects, without pyplot: no window opens, and the user's settings stay.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

# As in figures.mplstyle. In an SVG each becomes a CSS variable of the page (base.html.jinja).
INK, MUTED, LINE = "#1f2328", "#59636e", "#d1d9e0"
BLUE, ORANGE, GREEN, RED, PURPLE = "#0969da", "#bc4c00", "#1a7f37", "#cf222e", "#8250df"
TEAL, PINK, YELLOW = "#1b7c83", "#bf3989", "#7d4e00"
SERIES = (BLUE, ORANGE, GREEN, RED, PURPLE, TEAL, PINK, YELLOW)
_VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line"} | {
    color: f"series-{i}" for i, color in enumerate(SERIES)
}


@contextmanager
def applied() -> Iterator[None]:
    """Applies the style while a figure is drawn or saved."""
    with matplotlib.style.context("alexnet_jax.plots.figures"), warnings.catch_warnings():
        # Else there is one for each letter of a class name that the font lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        warnings.filterwarnings("ignore", "Matplotlib currently does not support", UserWarning)
        yield


def subplots(width: float, height: float, **grid: Any) -> tuple[Figure, Any]:
    """Creates a figure of that size in inches; returns it and what `Figure.subplots` returns."""
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(**grid)


def percent(axis: Axis) -> None:
    """Labels an axis of shares in percent."""
    axis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")


def whole_numbers(axis: Axis) -> None:
    """Labels an axis at whole numbers only."""
    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def legend_above(axes: Axes, **options: Any) -> None:
    """Adds a legend where no data can be."""
    entries = axes.get_legend_handles_labels()
    axes.legend(*entries, loc="lower left", bbox_to_anchor=(0, 1), **options)


def legend_below(figure: Figure, axes: Axes, columns: int) -> None:
    """Adds one legend for all axes of a figure."""
    entries = axes.get_legend_handles_labels()
    figure.legend(*entries, loc="outside lower center", ncols=columns)


def short(name: str, length: int = 18) -> str:
    """Cuts a class name to what a figure has room for."""
    return name if len(name) <= length else name[: length - 1] + "…"


@applied()
def png(figure: Figure) -> bytes:
    """Returns a figure as a PNG file, on white."""
    content = io.BytesIO()
    figure.savefig(content, format="png", facecolor="white")
    figure.set_layout_engine("none")  # the layout is done: an SVG of it takes half the time
    return content.getvalue()


def pixels(figure: Figure) -> np.ndarray:
    """Returns a figure as an image uint8[H, W, 3], on white."""
    return np.asarray(Image.open(io.BytesIO(png(figure))).convert("RGB"))


def image_png(image: np.ndarray) -> bytes:
    """Returns an image uint8[H, W, 3 or 4] as a PNG file."""
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG", optimize=True)
    return content.getvalue()


@applied()
def svg(figure: Figure, name: str, label: str) -> Markup:
    """Returns a figure as an SVG element whose colors follow the page.

    Its name is unique in the page; the label says what it shows, for screen readers.
    """

    def restyle(tag: re.Match[str]) -> str:
        text = re.sub(r'\b(id="|url\(#|xlink:href="#)', rf"\g<1>{name}-", tag[0])
        for color, variable in _VARIABLES.items():
            text = text.replace(color, f"var(--{variable})")
        return text

    content = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(content, format="svg", transparent=True, metadata=metadata)
    text = re.sub(r"<[^>]*>", restyle, "<svg" + content.getvalue().partition("<svg")[2])
    width = figure.get_figwidth() * 96
    head = f'<svg role="img" aria-label="{escape(label)}" style="max-width: {width:.0f}px"'
    return Markup(text.replace("<svg", head, 1))
