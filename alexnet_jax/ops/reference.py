"""Convolution, ReLU and pooling from one operation for each."""

from collections.abc import Callable

from flax import linen as nn
from jax import Array, lax


def conv_relu_pool(
    images: Array,
    kernel: Array,
    bias: Array,
    *,
    stride: int,
    pool: tuple[int, int] | None,
    conv_general_dilated: Callable[..., Array] = lax.conv_general_dilated,
    max_pool: Callable[..., Array] = nn.max_pool,
) -> Array:
    """Correlates with square kernels, adds a bias, sets what is negative to 0, and max-pools.

    Args:
        images: float[B, H, W, C]; their dtype is that of the arithmetic.
        kernel: float32[k, k, C, O]. At each edge k // 2 zeros are added to the image.
        bias: float32[O].
        stride: Pixels from one window of the convolution to the next.
        pool: Side and stride of the pooling's window, in pixels; None pools nothing.
        conv_general_dilated: As that of `jax.lax`.
        max_pool: As that of `flax.linen`, with a window, strides, and no padding.

    Returns:
        float[B, h, w, O], of the images' dtype.
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
