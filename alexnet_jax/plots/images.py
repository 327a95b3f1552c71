"""Grids of images and of filters."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from alexnet_jax.plots import style


def tile(images: np.ndarray, gap: int = 1) -> np.ndarray:
    """Lays out images uint8[rows, columns, H, W, 3 or 4] in one, with transparent gaps."""
    if images.shape[-1] == 3:
        images = np.pad(images, [(0, 0)] * 4 + [(0, 1)], constant_values=255)
    images = np.pad(images, [(0, 0), (0, 0), (0, gap), (0, gap), (0, 0)])
    rows, _, height, *_ = images.shape
    grid = images.transpose(0, 2, 1, 3, 4).reshape(rows * height, -1, 4)
    return grid[: len(grid) - gap, : grid.shape[1] - gap]


def filter_grid(filters: np.ndarray, columns: int = 16) -> np.ndarray:
    """Shows kernels float[n, h, w, channels] as a grid, each scaled to its own range.

    The first three channels are red, green and blue; with fewer, the first is gray.
    """
    low = filters.min(axis=(1, 2, 3), keepdims=True)
    span = filters.max(axis=(1, 2, 3), keepdims=True) - low
    scaled = np.divide(filters - low, span, out=np.zeros_like(filters), where=span > 0)
    channels = [0, 1, 2] if filters.shape[-1] >= 3 else [0, 0, 0]
    images = np.rint(255 * scaled[..., channels]).astype(np.uint8)
    images = np.pad(images, [(0, 0)] * 3 + [(0, 1)], constant_values=255)
    columns = min(columns, len(images))
    images = np.pad(images, [(0, -len(images) % columns)] + [(0, 0)] * 3)  # transparent
    return tile(images.reshape(-1, columns, *images.shape[1:]))


def enlarge(image: np.ndarray, min_width: int = 640) -> np.ndarray:
    """Repeats the pixels of an image [H, W, C] until it is that wide."""
    times = -(-min_width // image.shape[1])
    return image.repeat(times, axis=0).repeat(times, axis=1)


@style.applied()
def captioned_images(images: np.ndarray, captions: Sequence[str]) -> Figure:
    """Lays out images uint8[M, H, W, C] with a caption of two lines below each."""
    columns = min(6, len(images))
    rows = -(-len(images) // columns)
    height, width = images.shape[1:3]
    figure, axes = style.subplots(1.5 * columns, (1.5 * height / width + 0.45) * rows)
    axes.set_axis_off()
    step = height + 0.32 * width
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = (i % columns) * 1.08 * width, (i // columns) * step
        axes.imshow(image, extent=(x, x + width, y + height, y), interpolation="none")
        axes.text(x, y + height + 0.03 * width, caption, va="top", fontsize=6.5)
    axes.set(xlim=(0, (1.08 * columns - 0.08) * width), ylim=(rows * step, 0))
    return figure
