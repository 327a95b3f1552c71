"""Layers that the networks share."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.initializers import Initializer, he_normal, zeros
from jax import Array
from jaxtyping import Float

from alexnet_jax.ops import Ops


def dirac(
    key: Array,
    shape: Sequence[int],
    dtype: Any = jnp.float32,
    out_sharding: Any = None,
    *,
    groups: int = 1,
) -> Array:
    """Initializes kernels so that a convolution is the identity, as far as it can be.

    The i-th output is the i-th input (Zagoruyko and Komodakis, 2017, "DiracNets"); outputs beyond
    the number of inputs, and matrices, are drawn as by He et al. (2015). Each of `groups` of the
    channels is initialized by itself.
    """
    drawn = he_normal()(key, tuple(shape), dtype, out_sharding)
    if len(shape) == 2:
        return drawn
    height, width, inputs, outputs = shape  # the inputs are those of one group
    same = min(inputs, outputs // groups)
    center = jnp.eye(inputs, same, dtype=dtype)[None, None]
    around = [(side // 2, side - 1 - side // 2) for side in (height, width)]
    identity = jnp.pad(center, [*around, (0, 0), (0, 0)])
    parts = [
        part
        for group in jnp.split(drawn, groups, axis=-1)
        for part in (identity, group[..., same:])
    ]
    return jnp.concatenate(parts, -1)


class ConvReluPool(nn.Module):
    """`ops.conv_relu_pool` with the parameters of `flax.linen.Conv`."""

    features: int
    kernel: int  # side, in pixels
    stride: int
    pool: tuple[int, int] | None
    kernel_init: Initializer
    ops: Ops
    bias_init: Initializer = zeros

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch pooled_height pooled_width {self.features}"]:
        """Computes in the dtype of the images."""
        shape = (self.kernel, self.kernel, images.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        bias = self.param("bias", self.bias_init, (self.features,), jnp.float32)
        return self.ops.conv_relu_pool(images, kernel, bias, stride=self.stride, pool=self.pool)


def local_response_norm(
    x: Float[Array, "*shape channels"],
    *,
    k: float = 2.0,
    n: int = 5,
    alpha: float = 1e-4,
    beta: float = 0.75,
) -> Float[Array, "*shape channels"]:
    """Divides each value by the size of its neighbors, as in section 3.3 of the AlexNet paper.

    The divisor is (k + alpha * sum of a^2)^beta over the n channels around, n odd, fewer at the
    ends, summed in float32. PyTorch and Caffe divide alpha by n, which the paper does not.
    """
    squares = jnp.square(x.astype(jnp.float32))
    channels = x.shape[-1]
    padded = jnp.pad(squares, [(0, 0)] * (x.ndim - 1) + [(n // 2, n // 2)])
    total = sum(padded[..., i : i + channels] for i in range(n))
    return (x * (k + alpha * total) ** -beta).astype(x.dtype)


def adaptive_average_pool(
    x: Float[Array, "batch height width channels"], side: int
) -> Float[Array, "batch {side} {side} channels"]:
    """Averages over equal parts of an image, like PyTorch's `AdaptiveAvgPool2d`.

    Part i of S out of H pixels is from floor(i H / S) to ceil((i + 1) H / S), so parts overlap
    where S does not divide H, and repeat where H is less.
    """
    if x.shape[1:3] == (side, side):
        return x

    def parts(size: int) -> np.ndarray:
        i, pixel = np.arange(side)[:, None], np.arange(size)
        inside = (i * size // side <= pixel) & (pixel < -(-(i + 1) * size // side))
        return (inside / inside.sum(axis=1, keepdims=True)).astype(np.float32)

    rows, columns = parts(x.shape[1]), parts(x.shape[2])
    pooled = jnp.einsum(
        "bhwc,ih,jw->bijc",
        x.astype(jnp.float32),
        rows,
        columns,
        precision=jax.lax.Precision.HIGHEST,
    )
    return pooled.astype(x.dtype)
