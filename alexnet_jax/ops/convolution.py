"""Convolution in float32 on a CPU, by the fastest algorithm for each.

XLA's CPU backend has no fast backward pass of a convolution outside of a program's top level, and
only a moderate one there. As matrix products, which it does well, the same convolutions take half
the time; `docs/performance.md` has the figures.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from alexnet_jax.ops import patches, winograd

# Below so many channels the transforms around Winograd's products take longer than these save.
_WINOGRAD_CHANNELS = 16
# Of the patches of one convolution; a step has about three such arrays at once.
MAX_PATCH_BYTES = 2**30
_NHWC = lax.conv_dimension_numbers((0,) * 4, (0,) * 4, ("NHWC", "HWIO", "NHWC"))

# (images, kernel, strides, padding of rows and columns) -> result, or None if not covered.
Algorithm = Callable[[Array, Array, tuple[int, int], Sequence[tuple[int, int]]], Array | None]


def drop_in(algorithm: Algorithm) -> Callable[..., Array]:
    """Makes a replacement of `jax.lax.conv_general_dilated` of an algorithm.

    The algorithm is called for NHWC images of the kernel's dtype, without dilation or options,
    one group of channels at a time; XLA computes the rest, and what the algorithm does not cover.
    """

    def convolve(
        lhs: Array,
        rhs: Array,
        window_strides: Sequence[int],
        padding: str | Sequence[tuple[int, int]],
        *,
        dimension_numbers: Any = None,
        feature_group_count: int = 1,
        **options: Any,
    ) -> Array:
        ordinary = (
            lhs.ndim == 4
            and lhs.dtype == rhs.dtype
            and lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers) == _NHWC
            and all(option in (None, 1, (1, 1)) for option in options.values())
        )
        if ordinary and feature_group_count > 1:
            # One by one: two groups of AlexNet's second convolution, forward and backward, take a
            # quarter of the time that XLA needs (16 images: 1.2 s, not 4.6, on a busy machine).
            groups = (jnp.split(array, feature_group_count, axis=-1) for array in (lhs, rhs))
            results = [
                convolve(x, kernel, window_strides, padding, dimension_numbers=dimension_numbers)
                for x, kernel in zip(*groups, strict=True)
            ]
            return jnp.concatenate(results, axis=-1)
        if ordinary:
            pads = padding
            if isinstance(pads, str):
                pads = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], window_strides, pads)
            result = algorithm(lhs, rhs, (window_strides[0], window_strides[1]), pads)
            if result is not None:
                return result
        options |= {"dimension_numbers": dimension_numbers}
        options |= {"feature_group_count": feature_group_count}
        return lax.conv_general_dilated(lhs, rhs, window_strides, padding, **options)

    return convolve


def _suits_winograd(kernel: Array, strides: tuple[int, int], rows: int, columns: int) -> bool:
    """Whether Winograd's tiles, which may extend beyond the result, have fewer products."""
    tiles = -(-rows // winograd.TILE) * -(-columns // winograd.TILE)
    return (
        strides == (1, 1)
        and kernel.shape[:2] == (3, 3)
        and min(kernel.shape[2:]) >= _WINOGRAD_CHANNELS
        and tiles * (winograd.TILE + 2) ** 2 < rows * columns * 9
    )


def _as_products(
    images: Array,
    kernel: Array,
    strides: tuple[int, int],
    padding: Sequence[tuple[int, int]],
    *,
    in_chunks: bool,
) -> Array | None:
    """Covers float32: 3x3 kernels of stride 1 by `winograd`, others by `patches`.

    Winograd's algorithm is not used for few channels or pixels, where it is the slower one, and
    XLA takes over where patches would need too much memory. Both can be differentiated in reverse
    mode only.
    """
    (top, bottom), (left, right) = padding
    shape = images.shape[1] + top + bottom, images.shape[2] + left + right
    rows, columns = (
        (size - window) // stride + 1
        for size, window, stride in zip(shape, kernel.shape[:2], strides, strict=True)
    )
    if images.dtype != jnp.float32 or min(rows, columns) <= 0 or min(top, bottom, left, right) < 0:
        return None
    if _suits_winograd(kernel, strides, rows, columns):
        bottom, right = bottom + -rows % winograd.TILE, right + -columns % winograd.TILE
        padded = jnp.pad(images, ((0, 0), (top, bottom), (left, right), (0, 0)))
        return winograd.convolve(padded, kernel, in_chunks)[:, :rows, :columns]
    if 4 * images.shape[0] * rows * columns * kernel[..., 0].size > MAX_PATCH_BYTES:
        return None
    return patches.convolve(jnp.pad(images, ((0, 0), *padding, (0, 0))), kernel, strides)


conv_general_dilated = drop_in(functools.partial(_as_products, in_chunks=False))
# A few images of a large batch at a time: for few cores, and not for a batch that devices share,
# for the chunks of one device would be followed by those of the next.
conv_in_chunks = drop_in(functools.partial(_as_products, in_chunks=True))
