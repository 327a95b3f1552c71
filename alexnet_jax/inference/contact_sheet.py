"""Pictures of what a network answers: many images on one sheet, and where it looked in one."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_SIDE = 144  # Of an image on the sheet, in pixels.
_MARGIN = 8
_LINE = 17
_LARGE_SIDE = 320
_INK, _FAINT, _BAR, _PAPER = "#222222", "#777777", "#4c78a8", "white"


class Answer(NamedTuple):
    """What there is to show of an image.

    Attributes:
        name: Of the image.
        image: uint8[S, S, 3], as the network saw it.
        label: Its most probable class.
        probability: Of this class.
    """

    name: str
    image: np.ndarray
    label: str
    probability: float


def contact_sheet(answers: Sequence[Answer], columns: int = 6) -> Image.Image:
    """Lays out images with their answers, row by row.

    Args:
        answers: At least one.
        columns: The most in a row.
    """
    columns = min(columns, len(answers))
    rows = math.ceil(len(answers) / columns)
    width, height = _SIDE + 2 * _MARGIN, _SIDE + 2 * _MARGIN + 2 * _LINE + 4
    sheet = Image.new("RGB", (columns * width, rows * height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = _font(12)
    for i, answer in enumerate(answers):
        x, y = i % columns * width + _MARGIN, i // columns * height + _MARGIN
        sheet.paste(_enlarged(answer.image, _SIDE), (x, y))
        y += _SIDE + 3
        draw.rectangle((x, y, x + round(answer.probability * (_SIDE - 1)), y + 2), fill=_BAR)
        y += 5
        share = f" {answer.probability:.1%}"
        room = _SIDE - font.getlength(share)
        draw.text((x, y), _cut(answer.label, font, room) + share, fill=_INK, font=font)
        draw.text((x, y + _LINE - 2), _cut(answer.name, font, _SIDE), fill=_FAINT, font=font)
    return sheet


def explanation(answer: Answer, saliency: np.ndarray) -> Image.Image:
    """Shows an image beside what its answer depends on.

    Args:
        answer: The image and its class.
        saliency: float[S, S], at least 0; what is above its 99th percentile is shown as that, as
            a few pixels would hide the others.
    """
    from matplotlib import colormaps  # a third of a second, of those who want a picture

    image = _enlarged(answer.image, _LARGE_SIDE)
    scale = max(float(np.percentile(saliency, 99)), 1e-30)
    share = np.clip(saliency / scale, 0, 1)
    heat = colormaps["inferno"](share)[:, :, :3]
    map_ = _enlarged((heat * 255).round().astype(np.uint8), _LARGE_SIDE)
    grey = image.convert("L").convert("RGB")
    over = Image.composite(map_, grey, map_.convert("L").point(lambda v: min(255, 40 + v)))
    width = 3 * _LARGE_SIDE + 4 * _MARGIN
    picture = Image.new("RGB", (width, _LARGE_SIDE + 3 * _MARGIN + _LINE), _PAPER)
    for i, part in enumerate((image, map_, over)):
        picture.paste(part, (_MARGIN + i * (_LARGE_SIDE + _MARGIN), _MARGIN))
    font = _font(14)
    text = f"{answer.label} {answer.probability:.1%}   {answer.name}"
    place = (_MARGIN, _LARGE_SIDE + round(1.5 * _MARGIN))
    text = _cut(text, font, width - 2 * _MARGIN)
    ImageDraw.Draw(picture).text(place, text, fill=_INK, font=font)
    return picture


def _enlarged(pixels: np.ndarray, side: int) -> Image.Image:
    # The nearest pixel: what the network saw is to be seen, not what it might have been.
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)


def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    # It brings one that knows more than Latin letters; Pillow's own does not.
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(path, size)


def _cut(text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    """Leaves out the middle of a text that is too long."""
    if font.getlength(text) <= room:
        return text
    for kept in range(len(text) - 1, 0, -1):
        end = kept // 2
        short = text[: kept - end] + "…" + (text[-end:] if end else "")
        if font.getlength(short) <= room:
            return short
    return "…"
