"""Convolution of any kernel and stride as one matrix product over the patches of the image.

("im2col": Chellapilla, Puri, Simard, 2006, "High Performance Convolutional Neural Networks for
Document Processing".)
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(images: Array, kernel: Array, strides: tuple[int, int]) -> Array:
    """Correlates images with kernels, without padding.

    It can be differentiated in reverse mode. The patches are gathered again in the backward pass:
    that takes a small part of the product's time, and kept they would be most of the memory.

    Args:
        images: float[B, H, W, C].
        kernel: float[h, w, C, O].
        strides: Pixels from one patch to the next, downwards and to the right.

    Returns:
        float[B, (H - h) // strides[0] + 1, (W - w) // strides[1] + 1, O].
    """
    return _patches(images, kernel.shape[:2], strides) @ _matrix(kernel)


def _forward(
    images: Array, kernel: Array, strides: tuple[int, int]
) -> tuple[Array, tuple[Array, Array]]:
    return convolve(images, kernel, strides), (images, kernel)


def _backward(
    strides: tuple[int, int], residuals: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    images, kernel = residuals
    gather = functools.partial(_patches, window=kernel.shape[:2], strides=strides)
    over_positions = ((0, 1, 2), (0, 1, 2))
    by_kernel = lax.dot_general(gather(images), gradient, (over_positions, ((), ())))
    by_patch = lax.dot_general(gradient, _matrix(kernel), (((3,), (1,)), ((), ())))
    (by_image,) = jax.linear_transpose(gather, images)(by_patch)
    return by_image, by_kernel.reshape(kernel.shape)


convolve.defvjp(_forward, _backward)


def _matrix(kernel: Array) -> Array:
    return kernel.reshape(-1, kernel.shape[3])


def _patches(images: Array, window: tuple[int, ...], strides: tuple[int, int]) -> Array:
    """float[B, H, W, C] to float[B, rows, columns, h * w * C], in the order of a kernel's rows."""
    batch, height, width, channels = images.shape
    rows, columns = ((s - w) // d for s, w, d in zip((height, width), window, strides, strict=True))
    shifted = [
        lax.slice(
            images,
            (0, i, j, 0),
            (batch, i + rows * strides[0] + 1, j + columns * strides[1] + 1, channels),
            (1, *strides, 1),
        )
        for i in range(window[0])
        for j in range(window[1])
    ]
    return jnp.concatenate(shifted, axis=3)
