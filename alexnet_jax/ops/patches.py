"""Convolution of any kernel and stride as one matrix product over patches (im2col).

Chellapilla, Puri, Simard (2006), "High Performance Convolutional Neural Networks for Document
Processing".
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(
    images: Float[Array, "batch height width channels"],
    kernel: Float[Array, "h w channels features"],
    strides: tuple[int, int],
) -> Float[Array, "batch (height-h)//{strides[0]}+1 (width-w)//{strides[1]}+1 features"]:
    """Correlates images with kernels, without padding; differentiable in reverse mode.

    The patches are gathered again in the backward pass: that takes a small part of the product's
    time, and kept they would be most of the memory.
    """
    return _patches(images, kernel.shape[:2], strides) @ kernel.reshape(-1, kernel.shape[3])


def _forward(
    images: Array, kernel: Array, strides: tuple[int, int]
) -> tuple[Array, tuple[Array, Array]]:
    return convolve(images, kernel, strides), (images, kernel)


def _backward(
    strides: tuple[int, int], residuals: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    images, kernel = residuals
    gather = functools.partial(_patches, window=kernel.shape[:2], strides=strides)
    positions = (0, 1, 2)
    by_kernel = lax.dot_general(gather(images), gradient, ((positions, positions), ((), ())))
    matrix = kernel.reshape(-1, kernel.shape[3])
    by_patch = lax.dot_general(gradient, matrix, (((3,), (1,)), ((), ())))
    (by_image,) = jax.linear_transpose(gather, images)(by_patch)
    return by_image, by_kernel.reshape(kernel.shape)


convolve.defvjp(_forward, _backward)


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
