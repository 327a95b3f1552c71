"""Convolution in bfloat16, fused with ReLU and pooling, for CPUs with AMX or AVX-512 BF16.

XLA:CPU never computes `lax.conv` by AMX. Here a convolution is one matrix product over patches
(im2col), in the order channels, rows, columns, images, so that patches are concatenations of long
pieces along the first dimension. The operations take and return NHWC; XLA cancels the two
transpositions between consecutive ones. They can be differentiated in reverse mode only.
"""

import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array, lax
from jaxtyping import Float, Float32, UInt16

from alexnet_jax.ops import pooling, reference
from alexnet_jax.ops.bfloat16 import apart, from_bits, multiply, row_major, to_bits
from alexnet_jax.ops.convolution import drop_in

# Of the patches or taps of one convolution; a training step has several such arrays at once.
MAX_PATCH_BYTES = 2**30
# The argmax of a 2x2 window, 0 to 3, when ReLU set its maximum to 0.
_NO_WINNER = np.uint8(4)

# A convolution is the product of the kernel and the patches, or the sum of the products of each
# of the kernel's pixels ("taps") and the shifted image. The former has k * k times the input's
# numbers in memory and the latter k * k times the output's, so the narrower side decides.


def correlate(
    x: UInt16[Array, "channels height width batch"],
    kernel: UInt16[Array, "k k channels features"],
) -> tuple[Float32[Array, "features height width batch"], Array]:
    """Correlates with zero padding to the same size; also returns what the backward pass needs."""
    side, _, channels, features = kernel.shape
    pixels = x.shape[1:]
    if channels <= features:
        patches = _patches(x, side)
        by_feature = row_major(kernel.reshape(-1, features).T)
        return multiply(by_feature, patches, 0).reshape(features, *pixels), patches
    flat = from_bits(x.reshape(channels, -1))
    by_tap = row_major(kernel.transpose(0, 1, 3, 2)).reshape(-1, channels)
    taps = multiply(by_tap, flat, 0).reshape(side, side, features, *pixels)
    return _sum_shifted(taps, 1), flat


def correlate_backward(
    saved: Array,
    kernel: UInt16[Array, "k k channels features"],
    gradient: UInt16[Array, "features height width batch"],
) -> tuple[Float32[Array, "channels height width batch"], Float32[Array, "k k channels features"]]:
    """Returns the gradients of `correlate` by images and kernel; `saved` is its second result."""
    side, _, channels, features = kernel.shape
    pixels = gradient.shape[1:]
    if channels <= features:
        flat = from_bits(gradient.reshape(features, -1))
        by_kernel = multiply(saved, flat, 1).reshape(kernel.shape)
        taps = multiply(from_bits(kernel.reshape(-1, features)), flat, 0)
        return _sum_shifted(taps.reshape(side, side, channels, *pixels), -1), by_kernel
    # Seen from a pixel of the input, the kernel's pixels come in reverse.
    patches = _patches(gradient, side)
    by_tap = multiply(patches, saved, 1).reshape(side, side, features, channels)
    by_channel = row_major(kernel[::-1, ::-1].transpose(2, 0, 1, 3)).reshape(channels, -1)
    by_x = multiply(by_channel, patches, 0).reshape(channels, *pixels)
    return by_x, by_tap[::-1, ::-1].transpose(0, 1, 3, 2)


def _patches(x: Array, side: int) -> Array:
    """uint16[C, H, W, B] to bfloat16[side * side * C, H * W * B], in the order of kernels."""
    channels, height, width, _ = x.shape
    edge = side // 2
    # The barriers make XLA write each step out once, not recompute it in each that reads it.
    padded = lax.optimization_barrier(jnp.pad(x, ((0, 0), (edge, edge), (edge, edge), (0, 0))))
    columns = jnp.concatenate([padded[:, :, j : j + width] for j in range(side)])
    columns = lax.optimization_barrier(columns)
    patches = jnp.concatenate([columns[:, i : i + height] for i in range(side)])
    return from_bits(lax.optimization_barrier(patches.reshape(side * side * channels, -1)))


def _sum_shifted(taps: Array, direction: int) -> Array:
    """float32[k, k, C, H, W, B] to float32[C, H, W, B], each shifted by its place in a kernel.

    Direction 1 shifts pixels toward the image's start where the kernel's pixel is after its
    center, as a correlation does; -1 toward its end. Zeros are shifted in.
    """
    side = taps.shape[0]

    def shift(x: Array, axis: int, places: int) -> Array:
        edges = [(0, 0, 0)] * x.ndim
        edges[axis] = (-places, places, 0)
        return lax.pad(x, jnp.zeros((), x.dtype), edges)

    def total(images: Iterable[Array], axis: int) -> Array:
        shifted = [shift(x, axis, direction * (i - side // 2)) for i, x in enumerate(images)]
        return functools.reduce(jnp.add, shifted)

    # One row after the other, or each pixel of the sum would gather all of them anew.
    return total([lax.optimization_barrier(total(row, 2)) for row in taps], 1)


def _layer(
    kernel: Array, x: Array, bias: Array | None, pool: bool
) -> tuple[Array, Array, Array | None]:
    """Convolves; given a bias, adds it, applies ReLU and, if `pool`, 2x2 max pooling.

    Returns:
        The result, as uint16; what `correlate_backward` needs; and what tells which values the
        gradient goes to: the result itself after ReLU alone, the argmax of each window, as uint8,
        after pooling.
    """
    y, saved = correlate(x, kernel)
    if bias is None:
        return to_bits(y), saved, None
    bias = bias[:, None, None, None]
    if not pool:
        results = to_bits(nn.relu(y + bias))
        return results, saved, results
    largest, winner = pooling.pool(y)
    results = nn.relu(largest + bias)
    return to_bits(results), saved, jnp.where(results > 0, winner, _NO_WINNER)


def _layer_backward(
    kernel: Array, saved: Array, passed: Array | None, gradient: Array, pool: bool
) -> tuple[Array, Array, Array | None]:
    """Returns the gradients by images, uint16[C, H, W, B], kernel and bias, float32."""
    by_bias = None
    if passed is not None:
        passes = passed < _NO_WINNER if pool else from_bits(passed) > 0
        by_bias = jnp.where(passes, from_bits(gradient).astype(jnp.float32), 0).sum((1, 2, 3))
        if pool:
            gradient = pooling.spread(passed, gradient)
        else:
            gradient = jnp.where(passes, gradient, jnp.zeros((), jnp.uint16))
    by_x, by_kernel = correlate_backward(saved, kernel, gradient)
    return to_bits(by_x), by_kernel, by_bias


def _enter(images: Array) -> Array:
    """bfloat16[B, H, W, C] to uint16[C, H, W, B]."""
    return to_bits(images).transpose(3, 1, 2, 0)


def _leave(x: Array) -> Array:
    """uint16[C, H, W, B] to bfloat16[B, H, W, C]."""
    return from_bits(x.transpose(3, 1, 2, 0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _fused(images: Array, kernel: Array, bias: Array | None, pool: bool) -> Array:
    """As `_layer`, of bfloat16[B, H, W, C], float32[k, k, C, O] and float32[O]."""

    def layer(kernel: Array, x: Array, bias: Array | None) -> Array:
        return _layer(kernel, x, bias, pool)[0]

    return _leave(apart(layer, to_bits(kernel), _enter(images), bias))


def _forward(
    images: Array, kernel: Array, bias: Array | None, pool: bool
) -> tuple[Array, tuple[Array, Array, Array | None]]:
    bits = to_bits(kernel)
    layer = functools.partial(_layer, pool=pool)
    results, saved, passed = apart(layer, bits, _enter(images), bias)
    return _leave(results), (bits, saved, passed)


def _backward(
    pool: bool, residuals: tuple[Array, Array, Array | None], gradient: Array
) -> tuple[Array, Array, Array | None]:
    layer = functools.partial(_layer_backward, pool=pool)
    by_x, by_kernel, by_bias = apart(layer, *residuals, _enter(gradient))
    return _leave(by_x), by_kernel, by_bias


_fused.defvjp(_forward, _backward)


def _is_covered(images: Array, kernel: Array) -> bool:
    height, width, channels, features = kernel.shape
    taps = height * width * min(channels, features) * images[..., 0].size
    return (
        images.dtype == jnp.bfloat16
        and height == width
        and height % 2 == 1
        and 4 * taps <= MAX_PATCH_BYTES
    )


def conv_relu_pool(
    images: Float[Array, "batch height width channels"],
    kernel: Float[Array, "k k channels features"],
    bias: Float[Array, " features"],
    *,
    stride: int,
    pool: tuple[int, int] | None,
) -> Float[Array, "batch pooled_height pooled_width features"]:
    """As `reference.conv_relu_pool`, as one operation where its parts are covered here.

    Covered are bfloat16 images, stride 1, odd kernels, and nonoverlapping 2x2 pooling.
    """
    if stride == 1 and _is_covered(images, kernel):
        fused = pool == (2, 2) and images.shape[1] % 2 == images.shape[2] % 2 == 0
        x = _fused(images, kernel, bias, fused)
        return x if fused or pool is None else nn.max_pool(x, (pool[0],) * 2, (pool[1],) * 2)
    return reference.conv_relu_pool(
        images, kernel, bias, stride=stride, pool=pool, max_pool=pooling.max_pool
    )


@drop_in
def conv_general_dilated(
    images: Array, kernel: Array, strides: tuple[int, int], padding: Sequence[tuple[int, int]]
) -> Array | None:
    """Covers bfloat16 images, stride 1, odd kernels, and padding that keeps the images' size."""
    edges = {edge for pair in padding for edge in pair}
    if strides == (1, 1) and edges == {kernel.shape[0] // 2} and _is_covered(images, kernel):
        return _fused(images, kernel.astype(jnp.float32), None, False)
    return None
