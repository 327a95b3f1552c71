"""Convolution, ReLU and pooling from one operation for each."""

from collections.abc import Callable

from flax import linen as nn
from jax import Array, lax
from jaxtyping import Float


def conv_relu_pool(
    images: Float[Array, "batch height width channels"],
    kernel: Float[Array, "k k channels features"],
    bias: Float[Array, " features"],
    *,
    stride: int,
    pool: tuple[int, int] | None,
    conv_general_dilated: Callable[..., Array] = lax.conv_general_dilated,
    max_pool: Callable[..., Array] = nn.max_pool,
) -> Float[Array, "batch pooled_height pooled_width features"]:
    """Convolves with k // 2 zeros at each edge, adds a bias, applies ReLU and max pooling.

    Args:
        images: Their dtype is that of the arithmetic and the result.
        kernel: In float32, as the bias.
        bias: One number per feature.
        stride: Of the convolution, in pixels.
        pool: Side and stride of the pooling window, in pixels; None does not pool.
        conv_general_dilated: As that of `jax.lax`.
        max_pool: As that of `flax.linen`.
    """
    edge = kernel.shape[0] // 2
    x = conv_general_dilated(
        images,
        kernel.astype(images.dtype),
        (stride, stride),
        [(edge, edge), (edge, edge)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    x = nn.relu(x + bias.astype(images.dtype).reshape(1, 1, 1, -1))
    return x if pool is None else max_pool(x, (pool[0],) * 2, (pool[1],) * 2)
