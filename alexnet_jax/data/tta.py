"""Several views of each image at test time, whose answers are averaged."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from alexnet_jax.data.augment import centre, with_border

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


def _shifted(
    images: Array, padding: int, corners: list[tuple[int, int]], fill: str = "reflect"
) -> list[Array]:
    """Cuts windows of the images' size, by corner, out of images with a border."""
    padded = with_border(images, padding, fill)
    height, width = images.shape[1:3]
    return [padded[:, y : y + height, x : x + width] for y, x in corners]


def _centres(views: list[Array], size: int) -> list[Array]:
    # Before they are mirrored: with an odd margin the middle of a mirror image is another.
    return [centre(view, size) for view in views] if size else views


def flip(images: Array, size: int = 0) -> Array:
    """The image and its mirror image.

    Args:
        images: uint8[B, H, W, C].
        size: Side of the middle of it that is seen; 0 is all.

    Returns:
        uint8[2, B, h, w, C].
    """
    return _mirrored(_centres([images], size))


def flip_translate(images: Array, size: int = 0) -> Array:
    """As `flip`, also of the image shifted by a pixel up and left, and down and right: 6 views."""
    return _mirrored(_centres([images, *_shifted(images, 1, [(0, 0), (2, 2)])], size))


def ten_crop(images: Array, padding: int, size: int = 0, fill: str = "reflect") -> Array:
    """The four corners and the centre of each image, and their mirror images: 10 views.

    Args:
        images: uint8[B, H, W, C].
        padding: Pixels of border that the image gets first; of no account with `size`.
        size: Side of the crops; 0 is that of the image.
        fill: Of the border, as of `augment.with_border`.

    Returns:
        uint8[10, B, h, w, C].
    """
    if size:
        bottom, right = (side - size for side in images.shape[1:3])
        corners = [(0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2)]
        return _mirrored([images[:, y : y + size, x : x + size] for y, x in corners])
    far = 2 * padding
    corners = [(0, 0), (0, far), (far, 0), (far, far), (padding, padding)]
    return _mirrored(_shifted(images, padding, corners, fill))


def mean_logits(weights: tuple[float, ...]) -> Callable[[Array], Array]:
    """Averages logits float32[V, B, classes] with weights of the views, which sum to 1."""
    return lambda logits: jnp.tensordot(np.array(weights, np.float32), logits, 1)


def mean_softmax(logits: Array) -> Array:
    """Averages the probabilities of logits float32[V, B, classes], and returns logarithms."""
    return jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=0) - np.log(len(logits))


def create_views(config: ConfigDict) -> Views | None:
    """Returns the views that a config names; None for "none".

    "flip" and "flip_translate" are levels 1 and 2 of airbench (Jordan, 2024): logits are averaged,
    with half of the weight on the image that is not shifted. "ten_crop" is that of Krizhevsky,
    Sutskever and Hinton (2012): the softmax is averaged; its crops are of `data.crop_size`, or of
    images with the border that they had in training.

    Args:
        config: The whole config; `eval.tta`, `data.crop_size` and the border of `augment` are
            used.
    """
    size, augment = config.data.crop_size, config.augment
    match config.eval.tta:
        case "flip":
            return Views(lambda images: flip(images, size), mean_logits((1 / 2,) * 2))
        case "flip_translate":
            weights = (1 / 4,) * 2 + (1 / 8,) * 4
            return Views(lambda images: flip_translate(images, size), mean_logits(weights))
        case "ten_crop":
            return Views(
                lambda images: ten_crop(images, augment.crop_padding, size, augment.pad_mode),
                mean_softmax,
            )
    return None
