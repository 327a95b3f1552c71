"""Networks by name. To add one, put its class beside this file and a line into `MODELS`."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from alexnet_jax.errors import InputError, show
from alexnet_jax.models import whitening
from alexnet_jax.models.alexnet import AlexNet, AlexNet2012, AlexNetOWT
from alexnet_jax.models.network import Network
from alexnet_jax.models.resnet import ResNet
from alexnet_jax.models.summary import Description as Description
from alexnet_jax.models.summary import describe as describe
from alexnet_jax.models.vgg import VGG
from alexnet_jax.ops import PLAIN, Ops
from alexnet_jax.options import Option, options_of

MODELS: dict[str, type[Network]] = {
    "alexnet": AlexNet,
    "alexnet_2012": AlexNet2012,
    "alexnet_owt": AlexNetOWT,
    "resnet": ResNet,
    "vgg": VGG,
}

# 8 GiB in float32, and Adam holds three times as much; AlexNet has 61 million.
MAX_PARAMETERS = 2**31


def _model_class(name: Any) -> type[Network]:
    if not isinstance(name, str) or name not in MODELS:
        raise InputError(
            f"config.model.name is {show(name)}; it must be one of {', '.join(MODELS)}."
        )
    return MODELS[name]


def model_options(name: str) -> dict[str, Option]:
    """Returns the options of a network, by name; an unknown network raises an InputError."""
    return options_of(_model_class(name))


def create_model(
    config: Any, num_classes: int, *, axis_name: str | None = None, ops: Ops = PLAIN
) -> Network:
    """Builds the network that a `config.model` section describes; see `Network`.

    Under `pmap` or `shard_map`, `axis_name` is the mapped device axis; under `jit`, where a batch
    statistic is global by itself, None. An impossible option raises an InputError.
    """
    fields = getattr(config, "fields", config)  # of the typed section, or a ConfigDict
    options = {key: value for key, value in fields.items() if key != "name"}
    model_class = _model_class(config.name)
    return model_class(num_classes=num_classes, axis_name=axis_name, ops=ops, **options)


def check_model(config: Any, image_size: int) -> dict[str, Any]:
    """Checks that a network can be built for images of so many pixels a side; builds none.

    Returns:
        The shapes of its variables, by collection.

    Raises:
        InputError: An option has an impossible value, or one too large for the images.
    """
    model = create_model(config, num_classes=2)
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    variables = jax.eval_shape(
        lambda images: model.init(jax.random.key(0), images, train=False), images
    )
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))
    if parameters > MAX_PARAMETERS:
        pool = ", or pool more before the first of config.model.hidden" * hasattr(model, "hidden")
        raise InputError(
            f"config.model describes a network of {parameters:,} parameters; the maximum is "
            f"{MAX_PARAMETERS:,}: make its layers narrower{pool}."
        )
    return variables


def init_from_data(
    model: nn.Module,
    read_images: Callable[[int], np.ndarray],
    mean: Sequence[float],
    std: Sequence[float],
) -> dict[str, Any]:
    """Returns the initial variables that are measured on training images, by collection.

    Args:
        model: A network; most measure nothing.
        read_images: Returns at most so many training images, uint8[N, H, W, C]; called if needed.
        mean: Of each channel, on the scale 0..1, as the network's input is normalized by.
        std: Standard deviation of each channel, likewise.
    """
    side = getattr(model, "whitening", 0)
    if not side:
        return {}
    images = read_images(whitening.MAX_IMAGES)
    kernels = whitening.whitening_kernels(images, mean, std, side)
    return {whitening.COLLECTION: {whitening.NAME: {"kernel": kernels}}}
