"""Images with their predictions: many on a contact sheet, or one with its saliency map."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from alexnet_jax.plots.style import BLUE, INK, MUTED

SIDE, LARGE_SIDE = 144, 320  # pixels of an image on a contact sheet, and beside its saliency map
MARGIN = 8
_LINE = 17


class PredictedImage(NamedTuple):
    """An image and its most probable class."""

    name: str
    image: np.ndarray  # uint8[S, S, 3], as the network sees it
    label: str
    probability: float


def contact_sheet(predicted: Sequence[PredictedImage], columns: int = 6) -> Image.Image:
    """Lays out at least one image with its prediction, row by row."""
    columns = min(columns, len(predicted))
    width, height = SIDE + 2 * MARGIN, SIDE + 2 * MARGIN + 2 * _LINE + 4
    size = (columns * width, math.ceil(len(predicted) / columns) * height)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    text = font(12)
    for i, (name, image, label, probability) in enumerate(predicted):
        x, y = i % columns * width + MARGIN, i // columns * height + MARGIN
        sheet.paste(_enlarge(image, SIDE), (x, y))
        y += SIDE + 3
        draw.rectangle((x, y, x + round(probability * (SIDE - 1)), y + 2), fill=BLUE)
        percent = f" {probability:.1%}"
        label = shorten(label, text, SIDE - text.getlength(percent))
        draw.text((x, y + 5), label + percent, fill=INK, font=text)
        draw.text((x, y + _LINE + 3), shorten(name, text, SIDE), fill=MUTED, font=text)
    return sheet


def saliency_image(predicted: PredictedImage, saliency: np.ndarray) -> Image.Image:
    """Shows an image, its saliency map, and both together.

    Args:
        predicted: The image.
        saliency: float[S, S], at least 0, clipped at its 99th percentile, for the few pixels above
            would hide the others.
    """
    from matplotlib import colormaps  # takes a third of a second to import

    scaled = np.clip(saliency / max(float(np.percentile(saliency, 99)), 1e-30), 0, 1)
    heat = (colormaps["inferno"](scaled)[:, :, :3] * 255).round().astype(np.uint8)
    image, map_ = _enlarge(predicted.image, LARGE_SIDE), _enlarge(heat, LARGE_SIDE)
    gray = image.convert("L").convert("RGB")
    both = Image.composite(map_, gray, map_.convert("L").point(lambda v: min(255, 40 + v)))
    width = 3 * LARGE_SIDE + 4 * MARGIN
    picture = Image.new("RGB", (width, LARGE_SIDE + 3 * MARGIN + _LINE), "white")
    for i, part in enumerate((image, map_, both)):
        picture.paste(part, (MARGIN + i * (LARGE_SIDE + MARGIN), MARGIN))
    text = f"{predicted.label} {predicted.probability:.1%}   {predicted.name}"
    ImageDraw.Draw(picture).text(
        (MARGIN, LARGE_SIDE + 3 * MARGIN // 2),
        shorten(text, font(14), width - 2 * MARGIN),
        fill=INK,
        font=font(14),
    )
    return picture


def _enlarge(pixels: np.ndarray, side: int) -> Image.Image:
    # Not interpolated: these are the pixels that the network sees.
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Returns the font of Matplotlib, which has more than the Latin letters of Pillow's own."""
    import matplotlib

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(path, size)


def shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Leaves out the middle of a text that is wider than so many pixels."""
    if font.getlength(text) <= width:
        return text
    for kept in range(len(text) - 1, 0, -1):
        end = kept // 2
        shortened = f"{text[: kept - end]}…{text[len(text) - end :]}"
        if font.getlength(shortened) <= width:
            return shortened
    return "…"
