"""Max pooling with a backward pass that runs on every core."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

_NONE = 255  # the winner of a window that is none
_LARGEST = 15  # The side of a window whose pixels a byte can tell apart, and none of them.


def pool(x: Array, window: int = 2, stride: int = 2) -> tuple[Array, Array]:
    """Takes the largest of each window, and says which pixel of it that was, the first of several.

    Args:
        x: float[B, H, W, C]; also in another order, with the pixels in the middle.
        window: Side, in pixels, at most 15.
        stride: From one window to the next, in pixels.

    Returns:
        The largest, float[B, h, w, C], and uint8[B, h, w, C], from 0 to window^2 - 1.
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
    winner: Array,
    gradient: Array,
    window: int = 2,
    stride: int = 2,
    shape: tuple[int, int] | None = None,
) -> Array:
    """Transposes `pool`: each number goes to the pixel that won, and to none if that is no pixel.

    Args:
        winner: uint8[B, h, w, C].
        gradient: Of any dtype, [B, h, w, C].
        window: As that of `pool`.
        stride: As that of `pool`.
        shape: H and W; None is what the windows cover.

    Returns:
        The gradient's dtype, [B, H, W, C].
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
        winner = jnp.pad(winner, around, constant_values=_NONE)
        gradient = jnp.pad(gradient, around)
    row = np.arange(stride).reshape(1, 1, stride, 1, 1, 1)
    column = row.reshape(1, 1, 1, 1, stride, 1)
    parts = []
    for i in reversed(range(before + 1)):  # window by window, as XLA adds them
        for j in reversed(range(before + 1)):
            y, x = row + stride * i, column + stride * j
            pixel = np.where((y < window) & (x < window), y * window + x, _NONE - 1)
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
    window: int, stride: int, kept: tuple[Array, tuple[int, int]], gradient: Array
) -> tuple[Array]:
    winner, shape = kept
    return (spread(winner, gradient, window, stride, shape),)


_max_pool.defvjp(_forward, _backward)


def max_pool(x: Array, window_shape: tuple[int, int], strides: tuple[int, int]) -> Array:
    """As `flax.linen.max_pool`, and by it unless windows are square and leave no pixel between.

    The gradient goes to the first of several largest.

    XLA's CPU backend computes the gradient of a pooling on one core (`select_and_scatter`): 0.5 s
    of a 2 s step of the reference network on 2 cores. This keeps which pixel won, in a byte.

    Args:
        x: float[B, H, W, C].
        window_shape: Height and width of a window, in pixels.
        strides: From one window to the next, in pixels.
    """
    (window, width), (stride, stride_along) = window_shape, strides
    square = window == width and stride == stride_along
    if x.ndim == 4 and square and stride <= window <= _LARGEST:
        return _max_pool(x, window, stride)
    return nn.max_pool(x, window_shape, strides)
