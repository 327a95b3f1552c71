"""Random changes of training images, per image and inside jit; and normalisation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

Augment = Callable[[Array, Array], Array]  # (key, uint8[B, H, W, C]) -> uint8[B, H, W, C]
Normalize = Callable[[Array], Array]  # uint8[B, H, W, C] -> float32[B, H, W, C]


def random_crop(key: Array, images: Array, padding: int) -> Array:
    """Shifts each image by up to `padding` pixels, filling the border by reflection.

    Args:
        key: Random key.
        images: [B, H, W, C].
        padding: Largest shift in pixels, less than H and W.

    Returns:
        [B, H, W, C], as if each image had been padded on all sides and cropped at random.
    """
    batch, height, width, channels = images.shape
    edge = (padding, padding)
    padded = jnp.pad(images, ((0, 0), edge, edge, (0, 0)), mode="reflect")
    corners = jax.random.randint(key, (batch, 2), 0, 2 * padding + 1)

    def crop(image: Array, corner: Array) -> Array:
        start = (corner[0], corner[1], jnp.zeros((), corner.dtype))
        return jax.lax.dynamic_slice(image, start, (height, width, channels))

    return jax.vmap(crop)(padded, corners)


def random_flip(key: Array, images: Array) -> Array:
    """Mirrors each image of [B, H, W, C] left-right with probability 1/2."""
    mirrored = jax.random.bernoulli(key, shape=(images.shape[0], 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


def create_augment(config: ConfigDict) -> Augment:
    """Chains what a `config.augment` section asks for; the identity if it asks for nothing."""

    def augment(key: Array, images: Array) -> Array:
        crop_key, flip_key = jax.random.split(key)
        if config.crop_padding:
            images = random_crop(crop_key, images, config.crop_padding)
        if config.flip:
            images = random_flip(flip_key, images)
        return images

    return augment


def channel_statistics(counts: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Works out mean and standard deviation of each channel, with values scaled to 0..1.

    Args:
        counts: int64[C, 256], how often each value occurs; this makes the sums exact, in whatever
            order the images were read, and needs no float copy of them.

    Returns:
        (means, deviations), C floats each; a channel that never changes has deviation 1.
    """
    values = np.arange(256) / 255
    means, deviations = [], []
    for channel in counts:
        mean = float(channel @ values / channel.sum())
        variance = float(channel @ (values - mean) ** 2 / channel.sum())
        means.append(mean)
        # Not by the variance, which rounding leaves a little above 0.
        deviations.append(variance**0.5 if np.count_nonzero(channel) > 1 else 1.0)
    return tuple(means), tuple(deviations)


def create_normalize(means: tuple[float, ...], deviations: tuple[float, ...]) -> Normalize:
    """Returns the function that maps uint8 images to float32 with mean 0, deviation 1.

    Args:
        means: Of each channel, on the scale 0..1.
        deviations: Likewise.
    """
    # x / 255 - mean, over deviation, as one multiplication and one addition.
    scale = np.reshape(1 / (255 * np.array(deviations)), (1, 1, 1, -1)).astype(np.float32)
    shift = np.reshape(-np.array(means) / np.array(deviations), (1, 1, 1, -1)).astype(np.float32)

    def normalize(images: Array) -> Array:
        return images.astype(jnp.float32) * scale + shift

    return normalize
