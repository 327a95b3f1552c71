"""Layers that the networks share."""

from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.initializers import Initializer, he_normal, zeros
from jax import Array

from alexnet_jax.errors import InputError, show
from alexnet_jax.ops import Ops


def dirac(
    key: Array,
    shape: Sequence[int],
    dtype: Any = jnp.float32,
    out_sharding: Any = None,
    *,
    groups: int = 1,
) -> Array:
    """Initialises kernels so that a convolution begins as the identity, as far as it can.

    The i-th output is the i-th input (Zagoruyko and Komodakis, 2017, "DiracNets"); outputs beyond
    the number of inputs, and matrices, are drawn as by He et al. (2015).

    Args:
        key: Random key.
        shape: (k, k, C, O) of a convolution, or (C, O) of a matrix.
        dtype: Of the kernels.
        out_sharding: Where they lie, as JAX's own initializers take it.
        groups: Of the channels, each of which is convolved by itself; then C is that of one group.
    """
    drawn = he_normal()(key, tuple(shape), dtype, out_sharding)
    if len(shape) == 2:
        return drawn
    height, width, inputs, outputs = shape
    same = min(inputs, outputs // groups)
    middle = jnp.eye(inputs, same, dtype=dtype)[None, None]
    around = [(side // 2, side - 1 - side // 2) for side in (height, width)]
    identity = jnp.pad(middle, [*around, (0, 0), (0, 0)])
    parts = [
        part
        for group in jnp.split(drawn, groups, axis=-1)
        for part in (identity, group[..., same:])
    ]
    return jnp.concatenate(parts, -1)


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
        bias_init: Initialises the bias.
    """

    features: int
    kernel: int
    stride: int
    pool: tuple[int, int] | None
    kernel_init: Initializer
    ops: Ops
    bias_init: Initializer = zeros

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Takes float[B, H, W, C] and returns float[B, h, w, features] of the same dtype."""
        shape = (self.kernel, self.kernel, images.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        bias = self.param("bias", self.bias_init, (self.features,), jnp.float32)
        return self.ops.conv_relu_pool(images, kernel, bias, stride=self.stride, pool=self.pool)


def local_response_norm(
    x: Array, *, k: float = 2.0, n: int = 5, alpha: float = 1e-4, beta: float = 0.75
) -> Array:
    """Divides each value by how large its neighbours are, as in section 3.3 of the AlexNet paper.

    The divisor is (k + alpha * sum of a^2)^beta over n channels around, fewer at the ends. PyTorch
    and Caffe divide alpha by n, which the paper does not.

    Args:
        x: float[B, H, W, C].
        k: Constant of the divisor.
        n: Channels in a sum, odd.
        alpha: Weight of the sum.
        beta: Exponent.

    Returns:
        As `x`; the sums are of float32.
    """
    squares = jnp.square(x.astype(jnp.float32))
    channels = x.shape[-1]
    padded = jnp.pad(squares, ((0, 0), (0, 0), (0, 0), (n // 2, n // 2)))
    total = sum(padded[..., i : i + channels] for i in range(n))
    return (x * (k + alpha * total) ** -beta).astype(x.dtype)


def adaptive_average_pool(x: Array, side: int) -> Array:
    """Averages over equal parts of an image, as PyTorch's `AdaptiveAvgPool2d` cuts them.

    Part i of S out of H pixels goes from floor(i H / S) to ceil((i + 1) H / S); so parts share
    pixels where S does not divide H, and repeat them where H is less.

    Args:
        x: float[B, H, W, C].
        side: S, of the result.

    Returns:
        [B, S, S, C], of the same dtype; `x` itself if it has that size.
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


_MOST = 2**16  # Of channels, units and pixels: beyond, sizes overflow before they are compared.


def check_counts(least: int = 1, /, **options: int | tuple[int, ...]) -> None:
    """Refuses options that are no counts, or tuples of such.

    Args:
        least: The smallest that is right.
        **options: The values, by the names of the options.

    Raises:
        InputError: Names the option of config.model, its value, and what would be right.
    """
    for name, values in options.items():
        for value in values if isinstance(values, (tuple, list)) else (values,):
            if type(value) is not int or not least <= value <= _MOST:
                raise InputError(
                    f"config.model.{name} is {show(values)}; "
                    f"it must be between {least} and {_MOST}."
                )


def check_fraction(**options: float) -> None:
    """Refuses options that are not at least 0 and less than 1, as `check_counts` does."""
    for name, value in options.items():
        if not 0 <= value < 1:
            raise InputError(
                f"config.model.{name} is {show(value)}; it must be at least 0 and less than 1."
            )


def check_choice(**options: tuple[str, Collection[str]]) -> None:
    """Refuses options that are not one of the values beside them, as `check_counts` does."""
    for name, (value, right) in options.items():
        if value not in right:
            raise InputError(
                f"config.model.{name} is {show(value)}; it must be one of {', '.join(right)}."
            )
