"""A first layer that is measured, not trained: it decorrelates the pixels of small patches.

Page (2019), "How to train your ResNet", part 8, and Jordan (2024), "94% on CIFAR-10 in 3.29 seconds
on a single GPU" (airbench): the eigenvectors of the patches' second moments, each divided by the
root of its eigenvalue and taken with both signs, are the kernels of a frozen convolution.
"""

import numpy as np
from flax import linen as nn
from jax import Array

from alexnet_jax.ops import Ops

COLLECTION = "whitening"
NAME = "whiten"  # of the layer in a network
# Added to the eigenvalues, so that directions of noise are not blown up; airbench's value.
EPSILON = 5e-4
CHUNK_BYTES = 2**21  # of patches at once, small enough for the processor's cache
MOST_IMAGES = 5000  # that the moments are measured on, evenly spaced over those to train on


class Whitening(nn.Module):
    """Convolution with frozen kernels, which keeps the size of the images.

    The kernels are the variable "kernel" of the collection "whitening", so that no optimizer sees
    them and every checkpoint has them. `model.init` makes them pass each pixel of a patch, with
    both signs, until those of `whitening_kernels` take their place.

    Attributes:
        side: k, of a patch, in pixels.
        use_bias: Whether a trained bias is added.
        dtype: Of the arithmetic.
        ops: What it convolves with.
    """

    side: int
    use_bias: bool
    dtype: str
    ops: Ops

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Takes float[B, H, W, C] and returns float[B, H, W, 2 * k * k * C]."""
        channels = images.shape[-1]
        size = self.side**2 * channels

        def unmeasured() -> np.ndarray:
            kernels = np.eye(size, dtype=np.float32)
            return _both_signs(kernels, self.side, channels)

        kernel = self.variable(COLLECTION, "kernel", unmeasured).value
        before = (self.side - 1) // 2
        edge = (before, self.side - 1 - before)
        x = self.ops.conv_general_dilated(
            images,
            kernel.astype(self.dtype),
            (1, 1),
            [edge, edge],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (2 * size,), np.float32)
            x = x + bias.astype(self.dtype).reshape(1, 1, 1, -1)
        return x


def whitening_kernels(
    images: np.ndarray, mean: tuple[float, ...], deviation: tuple[float, ...], side: int
) -> np.ndarray:
    """Measures the kernels of `Whitening` on training images.

    Args:
        images: uint8[N, H, W, C].
        mean: Of each channel, on the scale 0..1, as the network's input is normalised by.
        deviation: Likewise.
        side: k, of a patch, in pixels.

    Returns:
        float32[k, k, C, 2 * k * k * C]; in the first half of its channels, by descending
        eigenvalue, the normalised patches have no correlation, and unit variance but for
        `EPSILON`; the second half is its negative.
    """
    height, width, channels = images.shape[1:]
    size = side**2 * channels
    # Sums of products of whole numbers below 2^53, which float64 holds exactly: the same in
    # whatever order, on every machine and process.
    count, sums, products = 0, np.zeros(size), np.zeros((size, size))
    rows, columns = height - side + 1, width - side + 1  # of patches in an image
    together = max(1, CHUNK_BYTES // (8 * size * rows * columns))
    for start in range(0, len(images), together):
        planes = images[start : start + together].transpose(3, 0, 1, 2)
        # A row for each place in a patch, in the order of a kernel's dimensions.
        places = np.empty((size, planes.shape[1], rows, columns))
        for place, (i, j, channel) in zip(places, np.ndindex(side, side, channels), strict=True):
            place[:] = planes[channel, :, i : i + rows, j : j + columns]
        patches = places.reshape(size, -1)
        count += patches.shape[1]
        sums += patches.sum(1)
        products += patches @ patches.T
    # Second moments of (x / 255 - mean) / deviation.
    scale = np.tile(1 / (255 * np.array(deviation)), side**2)
    shift = np.tile(-np.array(mean) / np.array(deviation), side**2)
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
