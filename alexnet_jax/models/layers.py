"""Layers that the networks share."""

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.initializers import Initializer, zeros
from jax import Array

from alexnet_jax.ops import Ops


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
