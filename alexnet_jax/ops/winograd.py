"""Convolution of 3x3 kernels by Winograd's minimal filtering: 36 products where a sum takes 144.

F(4x4, 3x3) of Lavin and Gray (2016), "Fast Algorithms for Convolutional Neural Networks", in its
notation: Y = A^T [ (G g G^T) * (B^T d B) ] A for each 6x6 tile d of the image, every fourth pixel,
and each kernel g. Summed over the channels, the elementwise product is 36 matrix products; the
backward pass is the same three transforms, transposed, around 72 more.

Tiles have 2.25 times the numbers of their images. A few images at a time, they stay in a CPU's
caches; those of a whole batch would go to memory and back, which takes longer than the products.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

TILE = 4  # side of a tile's result, in pixels; 2 more go in
_POINTS = TILE + 2
# Rows are the polynomials of the points 0, 1, -1, 2, -2 and infinity.
_B_TRANSPOSED = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
_A_TRANSPOSED = np.array(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
)
_G = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24
_KERNEL_MATRIX = np.kron(_G, _G).astype(np.float32)  # along the rows and along the columns at once

# Of the tiles before and after the products: up to which a batch is computed at once, and of a
# chunk of a larger one.
WHOLE_BYTES = 16 * 2**20
CHUNK_BYTES = 6 * 2**20
# A chunk's tiles are at least so many times as large as the transformed kernels, which each chunk
# reads, and whose gradient it adds to.
CHUNK_PER_KERNELS = 4


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(
    images: Float[Array, "batch height width channels"],
    kernel: Float[Array, "3 3 channels features"],
    in_chunks: bool,
) -> Float[Array, "batch height-2 width-2 features"]:
    """Correlates images with 3x3 kernels, without padding; differentiable in reverse mode.

    Height and width of the result must be multiples of `TILE`. It differs from that of
    `lax.conv_general_dilated` by float rounding alone, some 3e-6 of its largest value. With
    `in_chunks`, a batch with large tiles is computed a few images at a time.
    """
    return _forward(images, kernel, in_chunks)[0]


def _forward(images: Array, kernel: Array, in_chunks: bool) -> tuple[Array, tuple[Array, Array]]:
    transformed = _kernel_transform(kernel)

    def convolve_some(images: Array) -> Array:
        tiled = _image_transform(images)
        products = _multiply(_flat(tiled), transformed, 2, 1)
        return _inverse_transform(products.reshape(*tiled.shape[:-1], -1))

    size = _chunk_size(images, kernel, in_chunks)
    if size == images.shape[0]:
        return convolve_some(images), (images, kernel)
    results = lax.map(convolve_some, _chunks(images, size))
    return results.reshape(images.shape[0], *results.shape[2:]), (images, kernel)


def _backward(
    in_chunks: bool, residuals: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    images, kernel = residuals
    transformed = _kernel_transform(kernel)

    def differentiate_some(by_kernel: Array, arrays: tuple[Array, Array]) -> tuple[Array, Array]:
        images, gradient = arrays
        # Transformed again: kept, the tiles would be most of the memory that a step moves.
        tiled = _flat(_image_transform(images))
        spread = _inverse_transform_transposed(gradient)
        by_tile = _multiply(_flat(spread), transformed, 2, 2).reshape(*spread.shape[:-1], -1)
        by_kernel += _multiply(tiled, _flat(spread), 1, 1)
        return by_kernel, _image_transform_transposed(by_tile)

    size = _chunk_size(images, kernel, in_chunks)
    zeros = jnp.zeros_like(transformed)
    if size == images.shape[0]:
        by_kernel, by_image = differentiate_some(zeros, (images, gradient))
    else:
        chunks = _chunks(images, size), _chunks(gradient, size)
        by_kernel, by_image = lax.scan(differentiate_some, zeros, chunks)
    by_kernel = jnp.tensordot(_KERNEL_MATRIX.T, by_kernel, 1)
    return by_image.reshape(images.shape), by_kernel.reshape(kernel.shape)


convolve.defvjp(_forward, _backward)


def _chunk_size(images: Array, kernel: Array, in_chunks: bool) -> int:
    """Returns how many images to compute at a time: all, or a divisor of their number."""
    batch, height, width, _ = images.shape
    channels, features = kernel.shape[2:]
    points = (height // TILE) * (width // TILE) * _POINTS**2
    image_bytes = points * (channels + features) * images.dtype.itemsize
    if not in_chunks or batch * image_bytes <= WHOLE_BYTES:
        return batch
    kernel_bytes = _POINTS**2 * channels * features * images.dtype.itemsize
    most = max(1, max(CHUNK_BYTES, CHUNK_PER_KERNELS * kernel_bytes) // image_bytes)
    size = max(size for size in range(1, min(most, batch) + 1) if batch % size == 0)
    # A batch of a prime number of images is better computed at once than one by one.
    return size if 4 * size > min(most, batch) else batch


def _chunks(images: Array, size: int) -> Array:
    return images.reshape(-1, size, *images.shape[1:])


def _flat(tiles: Array) -> Array:
    """float[6, 6, B, h, w, C] to float[36, B * h * w, C]."""
    return tiles.reshape(_POINTS**2, -1, tiles.shape[-1])


def _multiply(left: Array, right: Array, sum_left: int, sum_right: int) -> Array:
    """36 matrix products, summed over the given dimension of each side."""
    return lax.dot_general(left, right, (((sum_left,), (sum_right,)), ((0,), (0,))))


# The transforms of images are written out, as sums: most entries of their matrices are 0.


def _combine(matrix: np.ndarray, lines: Sequence[Array]) -> list[Array]:
    """Multiplies an integer matrix, none of whose rows is 0, by a vector of arrays."""

    def total(row: np.ndarray) -> Array:
        terms = zip(row, lines, strict=True)
        scaled = (line if f == 1 else float(f) * line for f, line in terms if f)
        return functools.reduce(jnp.add, scaled)

    return [total(row) for row in matrix]


def _tile_lines(x: Array, axis: int, count: int) -> list[Array]:
    """Slices every fourth line, beginning with each of the first `count`."""
    end = x.shape[axis] - count + 1
    return [lax.slice_in_dim(x, i, end + i, TILE, axis) for i in range(count)]


def _image_transform(images: Array) -> Array:
    """B^T d B: float[B, 4h + 2, 4w + 2, C] to float[6, 6, B, h, w, C]."""

    def along(x: Array, axis: int) -> Array:
        return jnp.stack(_combine(_B_TRANSPOSED, _tile_lines(x, axis, _POINTS)))

    return along(along(images, 2), 2)


def _image_transform_transposed(tiles: Array) -> Array:
    """float[6, 6, B, h, w, C] to float[B, 4h + 2, 4w + 2, C], adding where tiles overlap."""

    def along(x: Array, axis: int) -> Array:
        lines = _combine(_B_TRANSPOSED.T, list(x))

        def pad(line: Array, before: int) -> Array:
            pads = [(0, 0)] * line.ndim
            pads[axis] = (before, 1 - before)
            return jnp.pad(line, pads)

        # The last two lines of a tile are the first two of the next.
        lines = [pad(line, 0) for line in lines[:TILE]] + [pad(line, 1) for line in lines[TILE:]]
        lines = [lines[0] + lines[4], lines[1] + lines[5], *lines[2:4]]
        x = jnp.stack(lines, axis + 1)
        x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
        return lax.slice_in_dim(x, 0, x.shape[axis] - 2, axis=axis)

    return along(along(tiles, 2), 2)


def _kernel_transform(kernel: Array) -> Array:
    """G g G^T: float[3, 3, C, O] to float[36, C, O]."""
    return jnp.tensordot(_KERNEL_MATRIX, kernel.reshape(9, *kernel.shape[2:]), 1)


def _inverse_transform(products: Array) -> Array:
    """A^T m A: float[6, 6, B, h, w, O] to float[B, 4h, 4w, O]."""

    def along(x: Array, axis: int) -> Array:
        return jnp.stack(_combine(_A_TRANSPOSED, list(x)), axis)

    x = along(along(products, 3), 4)
    batch, height, _, width, _, features = x.shape
    return x.reshape(batch, TILE * height, TILE * width, features)


def _inverse_transform_transposed(gradient: Array) -> Array:
    """float[B, 4h, 4w, O] to float[6, 6, B, h, w, O]."""

    def along(x: Array, axis: int) -> Array:
        return jnp.stack(_combine(_A_TRANSPOSED.T, _tile_lines(x, axis, TILE)))

    return along(along(gradient, 2), 2)
