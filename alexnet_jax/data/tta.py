"""Test-time augmentation: several views of each image, whose predictions are averaged."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Num

from alexnet_jax.data.augment import center_crop, pad
from alexnet_jax.data.options import AugmentConfig

Images = Num[Array, "batch height width channels"]
Views = Num[Array, "views batch height2 width2 channels"]
Logits = Float[Array, "views batch classes"]


class TTA(NamedTuple):
    """How images are viewed, and how the predictions are combined."""

    views: Callable[[Array], Array]  # uint8[B, H, W, C] to uint8[V, B, h, w, C]
    combine: Callable[[Array], Array]  # logits float32[V, B, classes] to float32[B, classes]


def with_flips(views: list[Array], size: int = 0) -> Views:
    """Stacks images, or their centers of `size` pixels, each before its horizontal flip."""
    if size:  # Before the flip: with an odd margin the center of a flipped image is another.
        views = [center_crop(view, size) for view in views]
    return jnp.stack([flipped for view in views for flipped in (view, view[:, :, ::-1])])


def flip_translate(images: Images, size: int = 0) -> Views:
    """Returns images, also shifted by a pixel up and left, and down and right, with their flips."""
    padded, (height, width) = pad(images, 1), images.shape[1:3]
    return with_flips([images, padded[:, :height, :width], padded[:, 2:, 2:]], size)


def ten_crop(images: Images, padding: int, size: int = 0, pad_mode: str = "reflect") -> Views:
    """Returns the corners and the center of each image, and their horizontal flips: 10 views.

    The crops are of `size` pixels, or, if that is 0, as large as the image, which is padded first.
    """
    height, width = (size, size) if size else images.shape[1:3]
    if not size:
        images = pad(images, padding, pad_mode)
    bottom, right = images.shape[1] - height, images.shape[2] - width
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2)]
    return with_flips([images[:, y : y + height, x : x + width] for y, x in corners])


def mean_logits(weights: tuple[float, ...]) -> Callable[[Logits], Float[Array, "batch classes"]]:
    """Returns the function that averages logits with weights of the views, which sum to 1."""
    return lambda logits: jnp.tensordot(np.array(weights, np.float32), logits, 1)


def mean_softmax(logits: Logits) -> Float[Array, "batch classes"]:
    """Averages the probabilities, and returns their logarithms."""
    return jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=0) - np.log(len(logits))


def create_tta(name: str, augment: AugmentConfig, crop_size: int = 0) -> TTA | None:
    """Returns the test-time augmentation that `config.eval.tta` names; None for "none".

    "flip" and "flip_translate" are levels 1 and 2 of airbench (Jordan, 2024): logits are averaged,
    with half of the weight on the image that is not shifted. "ten_crop" is that of Krizhevsky,
    Sutskever and Hinton (2012): the softmax is averaged; its crops are of `crop_size`, or of images
    padded as they were in training.
    """
    match name:
        case "flip":
            return TTA(lambda images: with_flips([images], crop_size), mean_logits((1 / 2,) * 2))
        case "flip_translate":
            weights = (1 / 4,) * 2 + (1 / 8,) * 4
            return TTA(lambda images: flip_translate(images, crop_size), mean_logits(weights))
        case "ten_crop":
            padding, mode = augment.crop_padding, augment.pad_mode
            return TTA(lambda images: ten_crop(images, padding, crop_size, mode), mean_softmax)
    return None
