"""Which algorithm a CPU computes a convolution with.

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
_PATCHES_BYTES = 2**30
_NHWC = lax.conv_dimension_numbers((0,) * 4, (0,) * 4, ("NHWC", "HWIO", "NHWC"))


# From images, kernel, strides, and pixels to pad with before and after rows and columns, to the
# result; None where it does not cover these.
Algorithm = Callable[[Array, Array, tuple[int, int], Sequence[tuple[int, int]]], Array | None]


def drop_in(algorithm: Algorithm) -> Callable[..., Array]:
    """Makes a replacement of `jax.lax.conv_general_dilated` of an algorithm.

    Args:
        algorithm: Asked for what it may cover: images in NHWC order of the kernel's dtype, without
            dilation or options, one group of channels at a time. XLA computes the rest.
    """

    def conv_general_dilated(
        lhs: Array,
        rhs: Array,
        window_strides: Sequence[int],
        padding: str | Sequence[tuple[int, int]],
        lhs_dilation: Sequence[int] | None = None,
        rhs_dilation: Sequence[int] | None = None,
        dimension_numbers: Any = None,
        feature_group_count: int = 1,
        batch_group_count: int = 1,
        **options: Any,
    ) -> Array:
        dilations = lhs_dilation, rhs_dilation
        others = dimension_numbers, 1, batch_group_count, *options.values()
        if feature_group_count > 1 and _is_ordinary(lhs, rhs, *dilations, *others):
            # One by one: two groups of AlexNet's second convolution, forward and backward, take a
            # quarter of the time that XLA needs (16 images: 1.2 s, not 4.6, on a busy machine).
            parts = (jnp.split(array, feature_group_count, axis=-1) for array in (lhs, rhs))
            results = [
                conv_general_dilated(
                    images, kernel, window_strides, padding, dimension_numbers=dimension_numbers
                )
                for images, kernel in zip(*parts, strict=True)
            ]
            return jnp.concatenate(results, axis=-1)
        arguments = (
            lhs_dilation,
            rhs_dilation,
            dimension_numbers,
            feature_group_count,
            batch_group_count,
        )
        if _is_ordinary(lhs, rhs, *arguments, *options.values()):
            strides = (window_strides[0], window_strides[1])
            pads = padding
            if isinstance(pads, str):
                pads = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], strides, pads)
            result = algorithm(lhs, rhs, strides, pads)
            if result is not None:
                return result
        return lax.conv_general_dilated(lhs, rhs, window_strides, padding, *arguments, **options)

    return conv_general_dilated


def _is_ordinary(
    lhs: Array,
    rhs: Array,
    lhs_dilation: Sequence[int] | None,
    rhs_dilation: Sequence[int] | None,
    dimension_numbers: Any,
    feature_group_count: int,
    batch_group_count: int,
    *options: Any,
) -> bool:
    """Says whether a convolution is one of NHWC images without dilation, groups, or options."""
    return (
        lhs.ndim == 4
        and lhs.dtype == rhs.dtype
        and lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers) == _NHWC
        and set(lhs_dilation or (1,)) == set(rhs_dilation or (1,)) == {1}
        and feature_group_count == batch_group_count == 1
        and all(option is None for option in options)
    )


def _suits_winograd(kernel: Array, strides: tuple[int, int], rows: int, columns: int) -> bool:
    """Says whether Winograd's tiles, which may reach beyond the result, have fewer products."""
    tiles = -(-rows // winograd.TILE) * -(-columns // winograd.TILE)
    return (
        strides == (1, 1)
        and kernel.shape[:2] == (3, 3)
        and min(kernel.shape[2:]) >= _WINOGRAD_CHANNELS
        and tiles * (winograd.TILE + 2) ** 2 < rows * columns * 9
    )


def _pad(images: Array, padding: Sequence[tuple[int, int]]) -> Array:
    return jnp.pad(images, ((0, 0), *padding, (0, 0)))


def _as_products(
    images: Array,
    kernel: Array,
    strides: tuple[int, int],
    padding: Sequence[tuple[int, int]],
    in_chunks: bool,
) -> Array | None:
    """Convolves float32 by `winograd` or `patches`; see `drop_in`."""
    rows, columns = (
        (size + low + high - window) // stride + 1
        for size, (low, high), window, stride in zip(
            images.shape[1:3], padding, kernel.shape[:2], strides, strict=True
        )
    )
    has_size = min(rows, columns) > 0 and min(*padding[0], *padding[1]) >= 0
    if images.dtype != jnp.float32 or not has_size:
        return None
    if _suits_winograd(kernel, strides, rows, columns):
        (top, bottom), (left, right) = padding
        bottom, right = bottom + -rows % winograd.TILE, right + -columns % winograd.TILE
        padded = _pad(images, ((top, bottom), (left, right)))
        return winograd.convolve(padded, kernel, in_chunks)[:, :rows, :columns]
    if 4 * images.shape[0] * rows * columns * kernel[..., 0].size > _PATCHES_BYTES:
        return None
    return patches.convolve(_pad(images, padding), kernel, strides)


conv_general_dilated = drop_in(functools.partial(_as_products, in_chunks=False))
"""As `jax.lax.conv_general_dilated`, and by it, for all that the algorithms here do not cover.

They cover float32 images in NHWC order without dilation, groups of channels one by one: 3x3
kernels of stride 1 by `winograd`, unless there are too few channels or pixels for it to be the
faster one; others by `patches`, unless these would take too much memory. They can be differentiated
in reverse mode only.
"""

conv_in_chunks = drop_in(functools.partial(_as_products, in_chunks=True))
"""As `conv_general_dilated`, a few images of a large batch at a time: for few cores.

Not for a batch that devices share: the chunks of one device would be followed by those of the next.
"""
