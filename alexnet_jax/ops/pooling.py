"""Max pooling over windows that do not overlap, with a backward pass that runs on every core."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array


@jax.custom_vjp
def max_pool_2x2(x: Array) -> Array:
    """Takes the largest of each 2x2 pixels; the gradient goes to the first of several.

    XLA's CPU backend computes the gradient of a pooling on one core (`select_and_scatter`): 0.5 s
    of a 2 s step of the reference network on 2 cores. This keeps which pixel won, in a byte.

    Args:
        x: float[B, 2h, 2w, C].

    Returns:
        float[B, h, w, C].
    """
    return pool(x)[0]


def pool(x: Array) -> tuple[Array, Array]:
    """Takes the largest of each 2x2 pixels, and says which it was, 0 to 3, as uint8[B, h, w, C].

    Args:
        x: float[B, 2h, 2w, C]; also in another order, with the pixels in the middle.
    """
    batch, height, width, channels = x.shape
    windows = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    a, b, c, d = (windows[:, :, i, :, j] for i in range(2) for j in range(2))
    above, below = jnp.maximum(a, b), jnp.maximum(c, d)
    winner = jnp.where(above >= below, jnp.where(a >= b, 0, 1), jnp.where(c >= d, 2, 3))
    return jnp.maximum(above, below), winner.astype(jnp.uint8)


def spread(winner: Array, gradient: Array) -> Array:
    """Transposes `pool`: each number goes to the pixel that won, and to none if that is no 0 to 3.

    Args:
        winner: uint8[B, h, w, C].
        gradient: Of any dtype, [B, h, w, C].

    Returns:
        The gradient's dtype, [B, 2h, 2w, C].
    """
    batch, height, width, channels = gradient.shape
    pixel = jnp.arange(4, dtype=jnp.uint8).reshape(1, 1, 2, 1, 2, 1)
    won = winner[:, :, None, :, None] == pixel
    pixels = jnp.where(won, gradient[:, :, None, :, None], jnp.zeros((), gradient.dtype))
    return pixels.reshape(batch, 2 * height, 2 * width, channels)


max_pool_2x2.defvjp(pool, lambda winner, gradient: (spread(winner, gradient),))


def max_pool(x: Array, window_shape: tuple[int, int], strides: tuple[int, int]) -> Array:
    """As `flax.linen.max_pool`, and by it unless the windows are 2x2, apart, and cover the image.

    Args:
        x: float[B, H, W, C].
        window_shape: Height and width of a window, in pixels.
        strides: From one window to the next, in pixels.
    """
    even = x.ndim == 4 and x.shape[1] % 2 == x.shape[2] % 2 == 0
    if even and window_shape == strides == (2, 2):
        return max_pool_2x2(x)
    return nn.max_pool(x, window_shape, strides)
