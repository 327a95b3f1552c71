"""A frozen first layer that decorrelates the pixels of small patches of the training images.

Page (2019), "How to train your ResNet", part 8, and Jordan (2024), "94% on CIFAR-10 in 3.29 seconds
on a single GPU" (airbench): the eigenvectors of the patches' second moments, each divided by the
square root of its eigenvalue and taken with both signs, are the kernels of a convolution.
"""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jaxtyping import Float, Float32, UInt8

from alexnet_jax.ops import Ops

COLLECTION = "whitening"
NAME = "whiten"  # of the layer in a network
# Added to the eigenvalues, so that directions of noise are not amplified; airbench's value.
EPSILON = 5e-4
CHUNK_BYTES = 2**21  # of patches at once, small enough for the CPU's cache
MAX_IMAGES = 5000  # that the moments are computed on, evenly spaced over the training images


class Whitening(nn.Module):
    """Convolution with frozen kernels, which keeps the size of the images.

    The kernels are the variable "kernel" of the collection "whitening", so that no optimizer sees
    them and every checkpoint has them. `model.init` makes them pass each pixel of a patch, with
    both signs, until those of `whitening_kernels` take their place.
    """

    side: int  # of a patch, in pixels
    use_bias: bool
    dtype: str
    ops: Ops

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width 2*channels*{self.side}**2"]:
        """Convolves with zero padding, which is one pixel more at the end if `side` is even."""
        channels = images.shape[-1]
        size = self.side**2 * channels

        pixels = np.eye(size, dtype=np.float32)
        init = functools.partial(_both_signs, pixels, self.side, channels)
        kernel = self.variable(COLLECTION, "kernel", init).value
        before = (self.side - 1) // 2
        edge = (before, self.side - 1 - before)
        x = self.ops.conv_general_dilated(
            images,
            jnp.asarray(kernel, self.dtype),
            (1, 1),
            [edge, edge],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (2 * size,), np.float32)
            x = x + bias.astype(self.dtype).reshape(1, 1, 1, -1)
        return x


def whitening_kernels(
    images: UInt8[np.ndarray, "count height width channels"],
    mean: Sequence[float],
    std: Sequence[float],
    side: int,
) -> Float32[np.ndarray, "{side} {side} channels 2*channels*{side}**2"]:
    """Computes the kernels of `Whitening` from training images.

    The first half of them, by descending eigenvalue, maps the normalized patches to uncorrelated
    values of unit variance, but for `EPSILON`; the second half is its negative. `mean` and `std`
    are those of each channel, on the scale 0..1, that the network's input is normalized by.
    """
    height, width, channels = images.shape[1:]
    size = side**2 * channels
    # Sums of products of integers below 2^53, which float64 holds exactly: the same in any order,
    # on every machine and process.
    count, sums, products = 0, np.zeros(size), np.zeros((size, size))
    rows, columns = height - side + 1, width - side + 1  # of patches in an image
    together = max(1, CHUNK_BYTES // (8 * size * rows * columns))
    for start in range(0, len(images), together):
        windows = np.lib.stride_tricks.sliding_window_view(
            images[start : start + together], (side, side), (1, 2)
        )
        # A row for each place in a patch, in the order of a kernel's dimensions.
        patches = windows.transpose(4, 5, 3, 0, 1, 2).reshape(size, -1).astype(np.float64)
        count += patches.shape[1]
        sums += patches.sum(1)
        products += patches @ patches.T
    # Second moments of (x / 255 - mean) / std.
    scale = np.tile(1 / (255 * np.array(std)), side**2)
    shift = np.tile(-np.array(mean) / np.array(std), side**2)
    means = scale * sums / count
    moments = np.outer(scale, scale) * products / count
    moments += np.outer(means, shift) + np.outer(shift, means) + np.outer(shift, shift)
    values, vectors = np.linalg.eigh(moments)
    values, vectors = values[::-1], vectors[:, ::-1]
    # An eigenvector's sign is the library's choice; here its largest entry is positive.
    largest = np.abs(vectors).argmax(0)
    vectors = vectors * np.sign(vectors[largest, np.arange(size)])
    kernels = vectors / np.sqrt(np.maximum(values, 0) + EPSILON)
    return _both_signs(kernels.astype(np.float32), side, channels)


def _both_signs(kernels: np.ndarray, side: int, channels: int) -> np.ndarray:
    return np.concatenate([kernels, -kernels], 1).reshape(side, side, channels, -1)
