"""Layers that the networks share."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.initializers import Initializer, he_normal, zeros
from jax import Array

from alexnet_jax.ops import Ops


def dirac(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """Initialises kernels so that a convolution begins as the identity, as far as it can.

    The i-th output is the i-th input (Zagoruyko and Komodakis, 2017, "DiracNets"); outputs beyond
    the number of inputs, and matrices, are drawn as by He et al. (2015).

    Args:
        key: Random key.
        shape: (k, k, C, O) of a convolution, or (C, O) of a matrix.
        dtype: Of the kernels.
    """
    drawn = he_normal()(key, shape, dtype)
    if len(shape) == 2:
        return drawn
    height, width, inputs, outputs = shape
    same = min(inputs, outputs)
    delta = jnp.zeros((height, width, inputs, same), dtype)
    delta = delta.at[height // 2, width // 2, jnp.arange(same), jnp.arange(same)].set(1)
    return drawn.at[..., :same].set(delta)


class ConvReluPool(nn.Module):
    """Convolution with bias, ReLU, and max pooling, which some machines compute best as one.

    Its parameters are those of `flax.linen.Conv`: "kernel" and "bias", float32.

    Attributes:
        features: Number of output channels.
        kernel: Side of the square kernel, in pixels; at each edge of an image half as many zeros,
            rounded down, are added.
        stride: Of the convolution.
        pool: Side and stride of the pooling's window, in pixels; None pools nothing.
        kernel_init: Initialises the kernel.
        ops: What computes it.
    """

    features: int
    kernel: int
    stride: int
    pool: tuple[int, int] | None
    kernel_init: Initializer
    ops: Ops

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Takes float[B, H, W, C] and returns float[B, h, w, features] of the same dtype."""
        shape = (self.kernel, self.kernel, images.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        bias = self.param("bias", zeros, (self.features,), jnp.float32)
        return self.ops.conv_relu_pool(images, kernel, bias, stride=self.stride, pool=self.pool)
