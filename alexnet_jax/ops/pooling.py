"""Max pooling with a backward pass that runs on every core."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jaxtyping import Float, Shaped, UInt8

_PADDING = 255  # the argmax of a window outside of the image
_MAX_WINDOW = 15  # whose pixels a byte can index, beside the two values that index none


def pool(
    x: Float[Array, "outer height width inner"], window: int = 2, stride: int = 2
) -> tuple[
    Float[Array, "outer pooled_height pooled_width inner"],
    UInt8[Array, "outer pooled_height pooled_width inner"],
]:
    """Returns the maximum of each window of at most 15x15 pixels, and its argmax in the window.

    The argmax is that of the first of equal pixels, from 0 to window^2 - 1.
    """
    height, width = ((side - window) // stride + 1 for side in x.shape[1:3])
    rows = [slice(i, i + stride * (height - 1) + 1, stride) for i in range(window)]
    columns = [slice(j, j + stride * (width - 1) + 1, stride) for j in range(window)]
    first, *others = (x[:, row, column] for row in rows for column in columns)
    largest, winner = first, jnp.zeros(first.shape, jnp.uint8)
    for number, pixel in enumerate(others, start=1):
        winner = jnp.where(pixel > largest, jnp.uint8(number), winner)
        largest = jnp.maximum(largest, pixel)
    return largest, winner


def spread(
    winner: UInt8[Array, "outer pooled_height pooled_width inner"],
    gradient: Shaped[Array, "outer pooled_height pooled_width inner"],
    window: int = 2,
    stride: int = 2,
    shape: tuple[int, int] | None = None,
) -> Shaped[Array, "outer height width inner"]:
    """Transposes `pool`: each value goes to the pixel that `winner` indexes, if it does index one.

    `shape` is the height and width of the result; None is what the windows cover.
    """
    batch, *windows, channels = gradient.shape
    height, width = shape or [stride * (number - 1) + window for number in windows]
    # The pixels in cells of stride x stride: those of cell n belong to window n, and the further
    # ones of as many windows before it as overlap.
    before = -(-window // stride) - 1
    cells = [-(-side // stride) for side in (height, width)]
    around = [(before, cell - number) for cell, number in zip(cells, windows, strict=True)]
    if any(map(any, around)):
        around = [(0, 0), *around, (0, 0)]
        winner = jnp.pad(winner, around, constant_values=_PADDING)
        gradient = jnp.pad(gradient, around)
    row = np.arange(stride).reshape(1, 1, stride, 1, 1, 1)
    column = row.reshape(1, 1, 1, 1, stride, 1)
    parts = []
    for i in reversed(range(before + 1)):  # window by window, as XLA adds them
        for j in reversed(range(before + 1)):
            y, x = row + stride * i, column + stride * j
            pixel = np.where((y < window) & (x < window), y * window + x, _PADDING - 1)
            rows = slice(before - i, before - i + cells[0])
            columns = slice(before - j, before - j + cells[1])
            of_windows = np.s_[:, rows, None, columns, None]
            won = winner[of_windows] == pixel.astype(np.uint8)
            parts.append(jnp.where(won, gradient[of_windows], jnp.zeros((), gradient.dtype)))
    pixels = functools.reduce(jnp.add, parts)
    pixels = pixels.reshape(batch, stride * cells[0], stride * cells[1], channels)
    return pixels[:, :height, :width]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _max_pool(x: Array, window: int, stride: int) -> Array:
    return pool(x, window, stride)[0]


def _forward(x: Array, window: int, stride: int) -> tuple[Array, tuple[Array, tuple[int, int]]]:
    largest, winner = pool(x, window, stride)
    return largest, (winner, (x.shape[1], x.shape[2]))


def _backward(
    window: int, stride: int, residuals: tuple[Array, tuple[int, int]], gradient: Array
) -> tuple[Array]:
    winner, shape = residuals
    return (spread(winner, gradient, window, stride, shape),)


_max_pool.defvjp(_forward, _backward)


def max_pool(
    x: Float[Array, "*batch height width channels"],
    window_shape: tuple[int, int],
    strides: tuple[int, int],
) -> Float[Array, "*batch pooled_height pooled_width channels"]:
    """As `flax.linen.max_pool`, which pools where windows are not square or skip pixels.

    XLA's CPU backend computes the gradient of a pooling on one core (`select_and_scatter`): 0.5 s
    of a 2 s step of the reference network on 2 cores. This keeps the argmax of each window, in a
    byte. The gradient goes to the first of several largest pixels.
    """
    (window, width), (stride, stride_along) = window_shape, strides
    square = window == width and stride == stride_along
    if x.ndim == 4 and square and stride <= window <= _MAX_WINDOW:
        return _max_pool(x, window, stride)
    return nn.max_pool(x, window_shape, strides)
