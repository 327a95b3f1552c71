"""Random changes of training images, per image and inside jit; and normalisation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

# From a key and uint8[B, H, W, C] to [B, h, w, C] on the scale 0..255: uint8, or, with shifted
# colours, float32 that may reach beyond it.
Augment = Callable[[Array, Array], Array]
Normalize = Callable[[Array], Array]  # [B, H, W, C] on the scale 0..255 -> float32[B, h, w, C]


def with_border(images: Array, padding: int, fill: str = "reflect") -> Array:
    """Puts a border around images.

    Args:
        images: [B, H, W, C].
        padding: Pixels on each side; by reflection less than H and W.
        fill: "reflect" fills by reflection, "constant" with zeros.

    Returns:
        [B, H + 2 padding, W + 2 padding, C].
    """
    edge = (padding, padding)
    mode = "reflect" if fill == "reflect" else "constant"
    return jnp.pad(images, ((0, 0), edge, edge, (0, 0)), mode=mode)


def random_crop(key: Array, images: Array, padding: int, fill: str = "reflect") -> Array:
    """Shifts each image by up to `padding` pixels, and fills the border.

    Args:
        key: Random key.
        images: [B, H, W, C].
        padding: Largest shift in pixels, less than H and W.
        fill: As of `with_border`.

    Returns:
        [B, H, W, C], as if each image had been padded on all sides and cropped at random.
    """
    batch, height, width, channels = images.shape
    padded = with_border(images, padding, fill)
    corners = jax.random.randint(key, (batch, 2), 0, 2 * padding + 1)

    def crop(image: Array, corner: Array) -> Array:
        start = (corner[0], corner[1], jnp.zeros((), corner.dtype))
        return jax.lax.dynamic_slice(image, start, (height, width, channels))

    return jax.vmap(crop)(padded, corners)


def random_flip(key: Array, images: Array) -> Array:
    """Mirrors each image of [B, H, W, C] left-right with probability 1/2."""
    mirrored = jax.random.bernoulli(key, shape=(images.shape[0], 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


def alternating_flip(key: Array, epoch: Array, images: Array) -> Array:
    """Mirrors each image left-right in every other epoch, a random half of them in the first.

    So each image is seen both ways in any two epochs (Jordan, 2024, "94% on CIFAR-10 in 3.29
    seconds on a single GPU"). Which half an image belongs to follows from its own pixels, by a
    random hash: no number of it has to travel with it, wherever it comes from.

    Args:
        key: The same in all epochs.
        epoch: int32[], from 0.
        images: uint8[B, H, W, C], as the data set has them.
    """
    factors = jax.random.bits(key, (1, *images.shape[1:]), jnp.uint32)
    hashes = (images.astype(jnp.uint32) * factors).sum((1, 2, 3), dtype=jnp.uint32)
    # Multiplied by random numbers, the highest bit is the most evenly spread.
    mirrored = (hashes >> 31) ^ (epoch.astype(jnp.uint32) & 1)
    return jnp.where(mirrored.astype(bool).reshape(-1, 1, 1, 1), images[:, :, ::-1], images)


def cutout(key: Array, images: Array, side: int, fill: tuple[int, ...]) -> Array:
    """Covers a square of each image (DeVries and Taylor, 2017).

    Its centre is any pixel, so that it may reach beyond the edge.

    Args:
        key: Random key.
        images: uint8[B, H, W, C].
        side: Of the square, in pixels.
        fill: Colour of the square; that of the data set's mean makes it 0 once normalised.
    """
    batch, height, width, _ = images.shape
    keys = jax.random.split(key)

    def covered(key: Array, length: int) -> Array:
        centre = jax.random.randint(key, (batch, 1), 0, length)
        distance = jnp.arange(length).reshape(1, -1) - centre + side // 2
        return (distance >= 0) & (distance < side)

    rows, columns = covered(keys[0], height), covered(keys[1], width)
    square = rows[:, :, None, None] & columns[:, None, :, None]
    return jnp.where(square, jnp.array(fill, jnp.uint8).reshape(1, 1, 1, -1), images)


def random_window(key: Array, images: Array, size: int) -> Array:
    """Takes a square from anywhere in each image.

    Args:
        key: Random key.
        images: [B, H, W, C] of any dtype.
        size: Side of the square in pixels, at most H and W.

    Returns:
        [B, size, size, C] of the same dtype.
    """
    batch, height, width, channels = images.shape
    corners = jax.random.randint(
        key, (batch, 2), 0, jnp.array([[height - size + 1, width - size + 1]])
    )

    def crop(image: Array, corner: Array) -> Array:
        start = (corner[0], corner[1], jnp.zeros((), corner.dtype))
        return jax.lax.dynamic_slice(image, start, (size, size, channels))

    return jax.vmap(crop)(images, corners)


def centre(images: Array, size: int) -> Array:
    """Takes the `size` x `size` pixels in the middle of images [B, H, W, C] of any dtype."""
    top, left = ((side - size) // 2 for side in images.shape[1:3])
    return images[:, top : top + size, left : left + size]


def shift_colours(key: Array, images: Array, axes: Array | np.ndarray, deviation: float) -> Array:
    """Adds to all pixels of an image a random colour, as such colours vary in the data set.

    Krizhevsky, Sutskever and Hinton (2012), section 4.1. The text there multiplies the principal
    components by eigenvalues of the covariance; Krizhevsky's cuda-convnet2 by the deviations, which
    are their square roots, and have the unit of a colour. So does this.

    Args:
        key: Random key.
        images: [B, H, W, C].
        axes: [C, C], of `principal_colours`.
        deviation: Of the normal distribution that each component's share is drawn from.

    Returns:
        float32[B, H, W, C], on the same scale, and not cut off at its ends.
    """
    batch, _, _, channels = images.shape
    shares = deviation * jax.random.normal(key, (batch, channels))
    shift = jnp.matmul(shares, jnp.asarray(axes, jnp.float32), precision=jax.lax.Precision.HIGHEST)
    # On a grid of 1/256, where sums are exact: else the streamed and the resident path, which XLA
    # fuses otherwise, would differ in their last bits.
    shift = jnp.round(shift * 256) / 256
    return images.astype(jnp.float32) + shift[:, None, None, :]


def create_augment(
    config: ConfigDict,
    mean: tuple[float, ...] = (0.5, 0.5, 0.5),
    crop_size: int = 0,
    colours: tuple[tuple[float, ...], ...] = (),
) -> Augment:
    """Chains what a `config.augment` section asks for; the identity if it asks for nothing.

    Args:
        config: The section; its `alternating_flip` is a matter of the step, which knows the epoch.
        mean: Of each channel, on the scale 0..1, for what is to be covered.
        crop_size: `config.data.crop_size`.
        colours: Of `principal_colours`, if the section asks for `pca_jitter`.
    """
    fill = tuple(round(255 * value) for value in mean)

    def augment(key: Array, images: Array) -> Array:
        crop_key, flip_key = jax.random.split(key)
        if crop_size:
            images = random_window(jax.random.fold_in(key, 4), images, crop_size)
        if config.crop_padding:
            images = random_crop(crop_key, images, config.crop_padding, config.pad_mode)
        if config.flip and not config.alternating_flip:
            images = random_flip(flip_key, images)
        # Folded in, so that the other draws are the same with these and without.
        if config.cutout:
            images = cutout(jax.random.fold_in(key, 2), images, config.cutout, fill)
        if config.pca_jitter:
            colour_key = jax.random.fold_in(key, 3)
            images = shift_colours(colour_key, images, np.array(colours), config.pca_jitter)
        return images

    return augment


def channel_statistics(counts: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Works out mean and standard deviation of each channel, with values scaled to 0..1.

    Args:
        counts: int64[C, 256], how often each value occurs, which needs no float copy of the images.
            The sums are of integers, and exact: the same on every host that takes part in a run.

    Returns:
        (means, deviations), C floats each; a channel that never changes has deviation 1.
    """
    values = np.arange(256)
    means, deviations = [], []
    for channel in counts:
        # Python's integers, for squares of sums over many images have more than 64 bits.
        count, total, squares = (int(channel @ values**power) for power in range(3))
        variance = (squares * count - total**2) / (255 * count) ** 2
        means.append(total / (255 * count))
        deviations.append(variance**0.5 if variance else 1.0)
    return tuple(means), tuple(deviations)


def principal_colours(images: np.ndarray) -> tuple[tuple[float, ...], ...]:
    """Finds the directions in which the colours of pixels vary, and how far.

    Args:
        images: uint8[N, H, W, 3].

    Returns:
        3 colours on the scale 0..255: the eigenvectors of the covariance of the pixels, the largest
        first, each as long as the deviation of the pixels along it.
    """
    sums, products, count = np.zeros(3), np.zeros((3, 3)), 0
    for start in range(0, len(images), 64):  # in float64, where sums of integers are exact
        pixels = images[start : start + 64].reshape(-1, 3).astype(np.float64)
        sums, products, count = (
            sums + pixels.sum(0),
            products + pixels.T @ pixels,
            count + len(pixels),
        )
    mean = sums / count
    values, vectors = np.linalg.eigh(products / count - np.outer(mean, mean))
    colours = (vectors * np.sqrt(np.maximum(values, 0))).T[::-1]
    colours *= np.where(colours.sum(axis=1, keepdims=True) < 0, -1, 1)  # eigh leaves the sign open
    return tuple(tuple(map(float, colour)) for colour in colours)


def create_normalize(
    means: tuple[float, ...], deviations: tuple[float, ...], crop_size: int = 0
) -> Normalize:
    """Returns the function that maps uint8 images to float32 with mean 0, deviation 1.

    Args:
        means: Of each channel, on the scale 0..1.
        deviations: Likewise.
        crop_size: Side of the middle that is left of larger images; 0 leaves all.
    """
    # x / 255 - mean, over deviation, as one multiplication and one addition.
    scale = np.reshape(1 / (255 * np.array(deviations)), (1, 1, 1, -1)).astype(np.float32)
    shift = np.reshape(-np.array(means) / np.array(deviations), (1, 1, 1, -1)).astype(np.float32)

    def normalize(images: Array) -> Array:
        if crop_size:
            images = centre(images, crop_size)
        return images.astype(jnp.float32) * scale + shift

    return normalize
