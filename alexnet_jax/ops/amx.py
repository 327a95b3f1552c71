"""Convolution in bfloat16, with ReLU and pooling, for CPUs that multiply such matrices at once.

XLA:CPU never computes `lax.conv` by AMX. Here a convolution is one matrix product over patches,
in the order channels, rows, columns, images: then the patches are concatenations along the first
dimension, of long pieces. At the borders images have the usual order, images, rows, columns,
channels; between two of these operations XLA cancels the two changes of order.
"""

import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array, lax

from alexnet_jax.ops import pooling, reference
from alexnet_jax.ops.bfloat16 import apart, from_bits, multiply, row_major, to_bits
from alexnet_jax.ops.convolution import drop_in

# Of what one convolution multiplies or sums; a training step has several such arrays at once.
_TAPS_BYTES = 2**30
# Of the pixels 0 to 3 of a pooling's window: all were negative.
_NO_WINNER = np.uint8(4)


def conv_relu_pool(
    images: Array, kernel: Array, bias: Array, *, stride: int, pool: tuple[int, int] | None
) -> Array:
    """As `composed.conv_relu_pool`, as one operation where its parts are covered here.

    Covered are bfloat16 images, stride 1, kernels of odd sides, and pooling of 2x2 pixels apart.
    That can be differentiated in reverse mode only.

    Args:
        images: float[B, H, W, C].
        kernel: float32[k, k, C, O].
        bias: float32[O].
        stride: Pixels from one window of the convolution to the next.
        pool: Side and stride of the pooling's window, in pixels; None pools nothing.

    Returns:
        float[B, h, w, O], of the images' dtype.
    """
    if stride == 1 and _covered(images, kernel):
        fused = pool == (2, 2) and images.shape[1] % 2 == images.shape[2] % 2 == 0
        x = _conv_relu_pool(images, kernel, bias, fused)
        return x if fused or pool is None else nn.max_pool(x, (pool[0],) * 2, (pool[1],) * 2)
    return reference.conv_relu_pool(
        images, kernel, bias, stride=stride, pool=pool, max_pool=pooling.max_pool
    )


def _same_size(
    images: Array, kernel: Array, strides: tuple[int, int], padding: Sequence[tuple[int, int]]
) -> Array | None:
    """Convolves where there are as many pixels out as in; see `convolution.drop_in`."""
    edges = {edge for pair in padding for edge in pair}
    if strides == (1, 1) and edges == {kernel.shape[0] // 2} and _covered(images, kernel):
        return _convolve(images, kernel)
    return None


conv_general_dilated = drop_in(_same_size)
"""As `jax.lax.conv_general_dilated`, and by it, for all that is not covered here.

Covered are bfloat16 images in NHWC order without dilation, groups of channels one by one, stride
1, kernels of odd sides, and results of the images' size. That can be differentiated in reverse
mode only.
"""


def _covered(images: Array, kernel: Array) -> bool:
    height, width, channels, features = kernel.shape
    taps = height * width * min(channels, features) * images[..., 0].size
    return (
        images.dtype == jnp.bfloat16
        and height == width
        and height % 2 == 1
        and 4 * taps <= _TAPS_BYTES
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _conv_relu_pool(images: Array, kernel: Array, bias: Array, pool: bool) -> Array:
    def layer(kernel: Array, x: Array, bias: Array) -> Array:
        return _layer(kernel, x, bias, pool)[0]

    return _leave(apart(layer, to_bits(kernel), _enter(images), bias))


def _conv_relu_pool_forward(
    images: Array, kernel: Array, bias: Array, pool: bool
) -> tuple[Array, tuple[Array, Array, Array]]:
    layer = functools.partial(_layer, pool=pool)
    bits = to_bits(kernel)
    results, saved, passed = apart(layer, bits, _enter(images), bias)
    return _leave(results), (bits, saved, passed)


def _conv_relu_pool_backward(
    pool: bool, residuals: tuple[Array, Array, Array], gradient: Array
) -> tuple[Array, Array, Array]:
    kernel, saved, passed = residuals
    layer = functools.partial(_layer_backward, pool=pool)
    by_x, by_kernel, by_bias = apart(layer, kernel, saved, passed, _enter(gradient))
    return _leave(by_x), by_kernel, by_bias


_conv_relu_pool.defvjp(_conv_relu_pool_forward, _conv_relu_pool_backward)


@jax.custom_vjp
def _convolve(images: Array, kernel: Array) -> Array:
    return _convolve_forward(images, kernel)[0]


def _convolve_forward(images: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    def layer(kernel: Array, x: Array) -> tuple[Array, Array]:
        y, saved = correlate(x, kernel)
        return to_bits(y), saved

    bits = to_bits(kernel)
    results, saved = apart(layer, bits, _enter(images))
    return _leave(results), (bits, saved)


def _convolve_backward(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    def layer(kernel: Array, saved: Array, gradient: Array) -> tuple[Array, Array]:
        by_x, by_kernel = correlate_backward(saved, kernel, gradient)
        return to_bits(by_x), by_kernel

    kernel, saved = residuals
    by_x, by_kernel = apart(layer, kernel, saved, _enter(gradient))
    return _leave(by_x), by_kernel.astype(jnp.bfloat16)


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _enter(images: Array) -> Array:
    """bfloat16[B, H, W, C] to uint16[C, H, W, B]."""
    return to_bits(images).transpose(3, 1, 2, 0)


def _leave(x: Array) -> Array:
    """uint16[C, H, W, B] to bfloat16[B, H, W, C]."""
    return from_bits(x.transpose(3, 1, 2, 0))


def _layer(kernel: Array, x: Array, bias: Array, pool: bool) -> tuple[Array, Array, Array]:
    """Convolution, bias, ReLU and pooling.

    Args:
        kernel: uint16[k, k, C, O].
        x: uint16[C, H, W, B].
        bias: float32[O].
        pool: Whether to take the largest of each 2x2 pixels.

    Returns:
        The result, uint16[O, H, W, B], or half the height and width; what `correlate_backward`
        needs; and which values the gradient goes to: the result itself says it where nothing is
        pooled, else uint8 of its shape, the pixel of each window.
    """
    y, saved = correlate(x, kernel)
    bias = bias[:, None, None, None]
    if not pool:
        results = to_bits(nn.relu(y + bias))
        return results, saved, results
    largest, winner = pooling.pool(y)
    results = nn.relu(largest + bias)
    return to_bits(results), saved, jnp.where(results > 0, winner, _NO_WINNER)


def _layer_backward(
    kernel: Array, saved: Array, passed: Array, gradient: Array, pool: bool
) -> tuple[Array, Array, Array]:
    """Returns the gradients by images, uint16[C, H, W, B], kernel and bias, float32."""
    passes = passed < _NO_WINNER if pool else from_bits(passed) > 0
    by_bias = jnp.where(passes, from_bits(gradient).astype(jnp.float32), 0).sum((1, 2, 3))
    if pool:
        gradient = pooling.spread(passed, gradient)
    else:
        gradient = jnp.where(passes, gradient, jnp.zeros((), jnp.uint16))
    by_x, by_kernel = correlate_backward(saved, kernel, gradient)
    return to_bits(by_x), by_kernel, by_bias


# A convolution is the product of the kernel and the patches, or the sum of the products of each
# of the kernel's pixels ("taps") and the image, shifted. The former has k * k times the input's
# numbers in memory and the latter k * k times the output's, so the narrower side decides.


def correlate(x: Array, kernel: Array) -> tuple[Array, Array]:
    """Correlates images with kernels, as many pixels out as in.

    Args:
        x: uint16[C, H, W, B].
        kernel: uint16[k, k, C, O].

    Returns:
        float32[O, H, W, B], and what `correlate_backward` needs.
    """
    side, _, channels, features = kernel.shape
    pixels = x.shape[1:]
    if channels <= features:
        patches = _patches(x, side)
        by_feature = row_major(kernel.reshape(-1, features).T)
        return multiply(by_feature, patches, 0).reshape(features, *pixels), patches
    x = from_bits(x.reshape(channels, -1))
    by_tap = row_major(kernel.transpose(0, 1, 3, 2)).reshape(-1, channels)
    taps = multiply(by_tap, x, 0).reshape(side, side, features, *pixels)
    return _sum_shifted(taps, 1), x


def correlate_backward(saved: Array, kernel: Array, gradient: Array) -> tuple[Array, Array]:
    """Transposes `correlate`.

    Args:
        saved: Its second result.
        kernel: uint16[k, k, C, O].
        gradient: uint16[O, H, W, B].

    Returns:
        The gradients by images, float32[C, H, W, B], and by kernel, float32[k, k, C, O].
    """
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
    # The barriers have each step written out once, not computed anew in each that reads it.
    padded = lax.optimization_barrier(jnp.pad(x, ((0, 0), (edge, edge), (edge, edge), (0, 0))))
    columns = jnp.concatenate([padded[:, :, j : j + width] for j in range(side)])
    columns = lax.optimization_barrier(columns)
    patches = jnp.concatenate([columns[:, i : i + height] for i in range(side)])
    return from_bits(lax.optimization_barrier(patches.reshape(side * side * channels, -1)))


def _sum_shifted(taps: Array, direction: int) -> Array:
    """Sums images of which each is moved by its place in a kernel.

    Args:
        taps: float32[k, k, C, H, W, B].
        direction: 1 moves pixels towards the image's start where the kernel's pixel lies behind
            its centre, as a correlation does, and -1 towards its end.

    Returns:
        float32[C, H, W, B]. What leaves the image is lost, and zeros come in.
    """
    side = taps.shape[0]

    def move(x: Array, axis: int, places: int) -> Array:
        edges = [(0, 0, 0)] * x.ndim
        edges[axis] = (-places, places, 0)
        return lax.pad(x, jnp.zeros((), x.dtype), edges)

    def total(images: Iterable[Array], axis: int) -> Array:
        moved = [move(x, axis, direction * (i - side // 2)) for i, x in enumerate(images)]
        return functools.reduce(jnp.add, moved)

    # One row after the other, lest each pixel of the sum gather all of them anew.
    return total([lax.optimization_barrier(total(row, 2)) for row in taps], 1)
