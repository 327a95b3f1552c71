"""Convolution of 3x3 kernels by Winograd's minimal filtering: 16 products where a sum takes 36.

F(2x2, 3x3) of Lavin and Gray (2016), "Fast Algorithms for Convolutional Neural Networks", in its
notation: Y = A^T [ (G g G^T) * (B^T d B) ] A for each 4x4 tile d of the image, every second pixel,
and each kernel g. Summed over the channels, the elementwise product is 16 matrix products, which
is all that costs; the backward pass is the same three transforms, transposed, around 32 more.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

_G = np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]], np.float32) / 2
_KERNEL_MATRIX = np.kron(_G, _G)  # along the rows and along the columns at once


@jax.custom_vjp
def convolve(images: Array, kernel: Array) -> Array:
    """Correlates images with 3x3 kernels, stride 1, without padding.

    The result differs from that of `lax.conv_general_dilated` by float rounding alone, some
    1e-6 of its largest value. It can be differentiated in reverse mode.

    Args:
        images: float[B, H + 2, W + 2, C] with even H and W.
        kernel: float[3, 3, C, O].

    Returns:
        float[B, H, W, O].
    """
    return _forward(images, kernel)[0]


def _forward(images: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    batch, height, width, channels = images.shape
    tiles = (batch, height // 2 - 1, width // 2 - 1)
    tiled = _image_transform(images).reshape(16, -1, channels)
    products = _multiply(tiled, _kernel_transform(kernel), 2, 1)
    return _inverse_transform(products.reshape(4, 4, *tiles, -1)), (tiled, kernel)


def _backward(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    tiled, kernel = residuals
    batch, height, width, features = gradient.shape
    spread = _inverse_transform_transposed(gradient).reshape(16, -1, features)
    by_tile = _multiply(spread, _kernel_transform(kernel), 2, 2)
    by_kernel = _multiply(tiled, spread, 1, 1)
    return (
        _image_transform_transposed(by_tile.reshape(4, 4, batch, height // 2, width // 2, -1)),
        _kernel_transform_transposed(by_kernel),
    )


convolve.defvjp(_forward, _backward)


def _multiply(left: Array, right: Array, sum_left: int, sum_right: int) -> Array:
    """16 matrix products, summed over the given dimension of each side."""
    return lax.dot_general(left, right, (((sum_left,), (sum_right,)), ((0,), (0,))))


# The transforms of images are written out, as sums: most entries of their matrices are 0.


def _image_transform(images: Array) -> Array:
    """B^T d B: float[B, 2h + 2, 2w + 2, C] to float[4, 4, B, h, w, C]."""

    def along(x: Array, axis: int) -> Array:
        lines = 2 * (x.shape[axis] // 2 - 1)  # the first line of each tile, and then the others
        a, b, c, d = (lax.slice_in_dim(x, i, i + lines - 1, 2, axis) for i in range(4))
        return jnp.stack([a - c, b + c, c - b, b - d])

    return along(along(images, 2), 2)


def _image_transform_transposed(tiles: Array) -> Array:
    """float[4, 4, B, h, w, C] to float[B, 2h + 2, 2w + 2, C], adding where tiles overlap."""

    def along(x: Array, axis: int) -> Array:
        a, b, c, d = x[0], x[1] - x[2] + x[3], x[1] + x[2] - x[0], -x[3]

        def overlap(first: Array, second: Array) -> Array:
            pads = [(0, 0)] * first.ndim
            pads[axis] = (0, 1)
            ahead = jnp.pad(first, pads)
            pads[axis] = (1, 0)
            return ahead + jnp.pad(second, pads)

        pairs = jnp.stack([overlap(a, c), overlap(b, d)], axis + 1)
        shape = list(pairs.shape)
        shape[axis : axis + 2] = [shape[axis] * 2]
        return pairs.reshape(shape)

    return along(along(tiles, 2), 2)


def _kernel_transform(kernel: Array) -> Array:
    """G g G^T: float[3, 3, C, O] to float[16, C, O]."""
    return jnp.tensordot(_KERNEL_MATRIX, kernel.reshape(9, *kernel.shape[2:]), 1)


def _kernel_transform_transposed(products: Array) -> Array:
    """float[16, C, O] to float[3, 3, C, O]."""
    kernel = jnp.tensordot(_KERNEL_MATRIX.T, products, 1)
    return kernel.reshape(3, 3, *products.shape[1:])


def _inverse_transform(products: Array) -> Array:
    """A^T m A: float[4, 4, B, h, w, O] to float[B, 2h, 2w, O]."""

    def along(x: Array, axis: int) -> Array:
        return jnp.stack([x[0] + x[1] + x[2], x[1] - x[2] - x[3]], axis)

    x = along(along(products, 3), 4)
    batch, height, _, width, _, features = x.shape
    return x.reshape(batch, 2 * height, 2 * width, features)


def _inverse_transform_transposed(gradient: Array) -> Array:
    """float[B, 2h, 2w, O] to float[4, 4, B, h, w, O]."""

    def along(x: Array, axis: int) -> Array:
        a, b = (lax.slice_in_dim(x, i, x.shape[axis] - 1 + i, 2, axis) for i in range(2))
        return jnp.stack([a, a + b, a - b, -b])

    return along(along(gradient, 2), 2)
