"""Random changes of training images, per image and inside jit; and normalization.

An augmentation is a function `(keys, epoch, images, labels) -> (images, labels)`. Labels may come
back as weights of the classes, float32[B, classes], so that one that mixes images fits in.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, Num, UInt8

from alexnet_jax.data.options import AugmentConfig

Images = Num[Array, "batch height width channels"]  # uint8, or float32 once colors are shifted
UInt8Images = UInt8[Array, "batch height width channels"]
Normalize = Callable[[Array], Array]  # [B, H, W, C] on the scale 0..255 -> float32[B, h, w, C]


class Keys(NamedTuple):
    """Random keys of an augmentation."""

    step: Array  # another one at each step
    run: Array  # the same at every step of a run


Augment = Callable[[Keys, Array, Array, Array], tuple[Array, Array]]


def pad(images: Images, padding: int, mode: str = "reflect") -> Images:
    """Pads each side by `padding` pixels, by reflection or with zeros ("constant")."""
    edge = (padding, padding)
    return jnp.pad(images, ((0, 0), edge, edge, (0, 0)), mode=mode)


def random_crop(key: Array, images: Images, size: tuple[int, int]) -> Images:
    """Crops each image to a window (height, width) from anywhere in it."""
    batch, height, width, channels = images.shape
    ends = jnp.array([[height - size[0] + 1, width - size[1] + 1]])
    corners = jax.random.randint(key, (batch, 2), 0, ends)

    def crop(image: Array, corner: Array) -> Array:
        start = (corner[0], corner[1], jnp.zeros((), corner.dtype))
        return jax.lax.dynamic_slice(image, start, (*size, channels))

    return jax.vmap(crop)(images, corners)


def center_crop(images: Images, size: int) -> Images:
    """Crops images to the `size` x `size` pixels in the middle."""
    top, left = ((side - size) // 2 for side in images.shape[1:3])
    return images[:, top : top + size, left : left + size]


def random_flip(key: Array, images: Images) -> Images:
    """Flips each image horizontally with probability 1/2."""
    flipped = jax.random.bernoulli(key, shape=(images.shape[0], 1, 1, 1))
    return jnp.where(flipped, images[:, :, ::-1], images)


def alternating_flip(key: Array, epoch: Int[Array, ""], images: UInt8Images) -> UInt8Images:
    """Flips each image horizontally in every other epoch, a random half of them in the first.

    So each image is seen both ways in any two epochs (Jordan, 2024, "94% on CIFAR-10 in 3.29
    seconds on a single GPU"). Which half an image belongs to is a random hash of its pixels, so
    that no index has to travel with it. The key must be the same in all epochs.
    """
    factors = jax.random.bits(key, (1, *images.shape[1:]), jnp.uint32)
    hashes = (images.astype(jnp.uint32) * factors).sum((1, 2, 3), dtype=jnp.uint32)
    # Multiplied by random numbers, the highest bit is the most evenly spread.
    flipped = (hashes >> 31) ^ (epoch.astype(jnp.uint32) & 1)
    return jnp.where(flipped.astype(bool).reshape(-1, 1, 1, 1), images[:, :, ::-1], images)


def cutout(key: Array, images: UInt8Images, side: int, fill: tuple[int, ...]) -> UInt8Images:
    """Fills a square of each image (DeVries and Taylor, 2017), which may reach beyond its edge."""
    batch, height, width, _ = images.shape
    keys = jax.random.split(key)

    def covered(key: Array, length: int) -> Array:
        center = jax.random.randint(key, (batch, 1), 0, length)
        distance = jnp.arange(length).reshape(1, -1) - center + side // 2
        return (distance >= 0) & (distance < side)

    rows, columns = covered(keys[0], height), covered(keys[1], width)
    square = rows[:, :, None, None] & columns[:, None, :, None]
    return jnp.where(square, jnp.array(fill, jnp.uint8).reshape(1, 1, 1, -1), images)


def pca_jitter(
    key: Array, images: Images, components: Array | np.ndarray, std: float
) -> Float[Array, "batch height width channels"]:
    """Adds a random color to each image, without clipping: PCA color augmentation.

    Krizhevsky, Sutskever and Hinton (2012), section 4.1, multiply the principal components by
    eigenvalues of the covariance; Krizhevsky's cuda-convnet2 by standard deviations, which are
    their square roots and have the unit of a color. So does this.

    Args:
        key: Random key.
        images: On the scale 0..255.
        components: [C, C], of `statistics.principal_components`.
        std: Of the normal distribution that each component's share is drawn from.
    """
    shares = std * jax.random.normal(key, (images.shape[0], images.shape[3]))
    shift = jnp.matmul(shares, jnp.asarray(components, jnp.float32), precision="highest")
    # On a grid of 1/256, where sums are exact: else the streamed and the in-memory path, which XLA
    # fuses otherwise, would differ in their last bits.
    shift = jnp.round(shift * 256) / 256
    return images.astype(jnp.float32) + shift[:, None, None, :]


def create_augment(
    config: AugmentConfig,
    mean: tuple[float, ...] = (0.5, 0.5, 0.5),
    crop_size: int = 0,
    components: tuple[tuple[float, ...], ...] = (),
) -> Augment:
    """Chains what a `config.augment` section asks for; the identity if it asks for nothing.

    Args:
        config: The section.
        mean: Of each channel, on the scale 0..1, which cutout fills with.
        crop_size: `config.data.crop_size`.
        components: Of `statistics.principal_components`, if there is a `config.pca_jitter`.
    """
    fill = tuple(round(255 * value) for value in mean)

    def augment(keys: Keys, epoch: Array, images: Array, labels: Array) -> tuple[Array, Array]:
        crop_key, flip_key = jax.random.split(keys.step)
        if config.flip and config.alternating_flip:
            images = alternating_flip(keys.run, epoch, images)
        # Folded in, so that the other draws are the same with and without these.
        if crop_size:
            key = jax.random.fold_in(keys.step, 4)
            images = random_crop(key, images, (crop_size, crop_size))
        if config.crop_padding:
            padded = pad(images, config.crop_padding, config.pad_mode)
            images = random_crop(crop_key, padded, (images.shape[1], images.shape[2]))
        if config.flip and not config.alternating_flip:
            images = random_flip(flip_key, images)
        if config.cutout:
            images = cutout(jax.random.fold_in(keys.step, 2), images, config.cutout, fill)
        if config.pca_jitter:
            key = jax.random.fold_in(keys.step, 3)
            images = pca_jitter(key, images, np.array(components), config.pca_jitter)
        return images, labels

    return augment


def create_normalize(
    mean: tuple[float, ...], std: tuple[float, ...], crop_size: int = 0
) -> Normalize:
    """Returns the function that maps images on the scale 0..255 to float32 with mean 0 and std 1.

    `mean` and `std` are of each channel, on the scale 0..1. With a `crop_size` the images are
    cropped to their center.
    """
    # (x / 255 - mean) / std, as one multiplication and one addition.
    scale = np.reshape(1 / (255 * np.array(std)), (1, 1, 1, -1)).astype(np.float32)
    shift = np.reshape(-np.array(mean) / np.array(std), (1, 1, 1, -1)).astype(np.float32)

    def normalize(images: Array) -> Array:
        if crop_size:
            images = center_crop(images, crop_size)
        return images.astype(jnp.float32) * scale + shift

    return normalize
