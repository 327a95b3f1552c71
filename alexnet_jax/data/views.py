"""Several views of each image at test time, whose answers are averaged."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

VIEWS = ("none", "flip", "flip_translate", "ten_crop")


class Views(NamedTuple):
    """How an image is looked at, and how the answers become one.

    Attributes:
        take: uint8[B, H, W, C] to uint8[V, B, H, W, C].
        combine: Logits float32[V, B, classes] to float32[B, classes], logits again.
    """

    take: Callable[[Array], Array]
    combine: Callable[[Array], Array]


def _mirrored(views: list[Array]) -> Array:
    return jnp.stack([view for each in views for view in (each, each[:, :, ::-1])])


def _shifted(images: Array, padding: int, corners: list[tuple[int, int]]) -> list[Array]:
    """Cuts windows of the images' size, by corner, out of images with a reflected border."""
    edge = (padding, padding)
    padded = jnp.pad(images, ((0, 0), edge, edge, (0, 0)), mode="reflect")
    height, width = images.shape[1:3]
    return [padded[:, y : y + height, x : x + width] for y, x in corners]


def flip(images: Array) -> Array:
    """The image and its mirror image: uint8[B, H, W, C] to uint8[2, B, H, W, C]."""
    return _mirrored([images])


def flip_translate(images: Array) -> Array:
    """The same of the image, and shifted by a pixel up and left, and down and right: 6 views."""
    return _mirrored([images, *_shifted(images, 1, [(0, 0), (2, 2)])])


def ten_crop(images: Array, padding: int, size: int = 0) -> Array:
    """The four corners and the centre of each image, and their mirror images: 10 views.

    Args:
        images: uint8[B, H, W, C].
        padding: Pixels of reflected border that the image gets first; of no account with `size`.
        size: Side of the crops; 0 is that of the image.
    """
    if size:
        bottom, right = (side - size for side in images.shape[1:3])
        corners = [(0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2)]
        return _mirrored([images[:, y : y + size, x : x + size] for y, x in corners])
    far = 2 * padding
    corners = [(0, 0), (0, far), (far, 0), (far, far), (padding, padding)]
    return _mirrored(_shifted(images, padding, corners))


def mean_logits(weights: tuple[float, ...]) -> Callable[[Array], Array]:
    """Averages logits float32[V, B, classes] with weights of the views, which sum to 1."""
    return lambda logits: jnp.tensordot(np.array(weights, np.float32), logits, 1)


def mean_softmax(logits: Array) -> Array:
    """Averages the probabilities of logits float32[V, B, classes], and returns logarithms."""
    return jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=0) - np.log(len(logits))


def create_views(name: str, padding: int = 4, crop_size: int = 0) -> Views | None:
    """Returns the views of a name.

    "flip" and "flip_translate" are levels 1 and 2 of airbench (Jordan, 2024): logits are averaged,
    with half of the weight on the image that is not shifted. "ten_crop" is that of Krizhevsky,
    Sutskever and Hinton (2012): the softmax is averaged.

    Args:
        name: One of `VIEWS`; "none" is None.
        padding: Pixels of reflected border around the image that "ten_crop" cuts from; that of
            `config.augment.crop_padding` shows the network what it was trained on.
        crop_size: `config.data.crop_size`: where it is not 0, "ten_crop" cuts out so much.
    """
    if name == "flip":
        return Views(flip, mean_logits((1 / 2,) * 2))
    if name == "flip_translate":
        return Views(flip_translate, mean_logits((1 / 4,) * 2 + (1 / 8,) * 4))
    if name == "ten_crop":
        return Views(lambda images: ten_crop(images, padding, crop_size), mean_softmax)
    return None
