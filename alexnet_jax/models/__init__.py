"""Networks by name. To add one, put its linen class beside this file and a line into `MODELS`."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from clu.parameter_overview import get_parameter_overview
from flax import linen as nn
from ml_collections import ConfigDict

from alexnet_jax.errors import InputError, show
from alexnet_jax.models import whitening
from alexnet_jax.models.alexnet import AlexNet, AlexNet2012, AlexNetOWT
from alexnet_jax.models.resnet import ResNet
from alexnet_jax.models.vgg import VGG
from alexnet_jax.ops import PLAIN, Ops
from alexnet_jax.options import Option, options_of

# The contract of each class: fields `num_classes`, `axis_name`, `ops` and `dtype` as AlexNet has
# them, fields with defaults for all that varies, and
# __call__(images: float[B, H, W, 3], *, train: bool) -> logits float32[B, num_classes].
MODELS: dict[str, type[nn.Module]] = {
    "alexnet": AlexNet,
    "alexnet_2012": AlexNet2012,
    "alexnet_owt": AlexNetOWT,
    "resnet": ResNet,
    "vgg": VGG,
}

# 8 GiB in float32, and Adam holds three times as much; AlexNet has 61 million.
MAX_PARAMETERS = 2**31

_NOT_OPTIONS = ("num_classes", "axis_name", "ops", "parent", "name")


def _model_class(name: Any) -> type[nn.Module]:
    if not isinstance(name, str) or name not in MODELS:
        raise InputError(
            f"config.model.name is {show(name)}; it must be one of {', '.join(MODELS)}."
        )
    return MODELS[name]


def model_options(name: str) -> dict[str, Option]:
    """Returns the options of a network: the fields of its linen class.

    Raises:
        InputError: No network has this name.
    """
    declared = options_of(_model_class(name))
    return {
        field.name: declared.get(field.name, Option(field.default, "", type=field.type))
        for field in dataclasses.fields(_model_class(name))
        if field.init and field.name not in _NOT_OPTIONS
    }


def create_model(
    config: ConfigDict, num_classes: int, *, axis_name: str | None = None, ops: Ops = PLAIN
) -> nn.Module:
    """Builds the network that a `config.model` section describes.

    Args:
        config: `name` and the options of that network.
        num_classes: Length of the logits.
        axis_name: Name of the mapped device axis when the network runs under `pmap` or
            `shard_map`; None under `jit`, where a batch statistic is global by itself.
        ops: What it convolves and pools with; see `alexnet_jax.ops`.

    Raises:
        InputError: An option has an impossible value.
    """
    fields = getattr(config, "fields", config)  # of the typed section, or a ConfigDict
    options = {key: value for key, value in fields.items() if key != "name"}
    model_class = _model_class(config.name)
    return model_class(num_classes=num_classes, axis_name=axis_name, ops=ops, **options)


def check_model(config: ConfigDict, image_size: int) -> dict[str, Any]:
    """Refuses options that the network cannot be built with, without building it.

    Args:
        config: The section `config.model`.
        image_size: Side of the images, in pixels.

    Returns:
        The shapes of its variables, by collection.

    Raises:
        InputError: Names the option, its value, and what would be right.
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
            f"config.model describes a network of {parameters:,} parameters; the most are "
            f"{MAX_PARAMETERS:,}: make its layers narrower{pool}."
        )
    return variables


def measure_fixed(
    model: nn.Module,
    sample: Callable[[int], np.ndarray],
    mean: tuple[float, ...],
    deviation: tuple[float, ...],
) -> dict[str, Any]:
    """Measures what a network takes from the training images and never trains.

    Args:
        model: A network.
        sample: Returns at most so many training images, uint8[N, H, W, C]; called if need be.
        mean: Of each channel, on the scale 0..1, as the network's input is normalised by.
        deviation: Likewise.

    Returns:
        Collections of variables for `state.create_state`, by name; mostly none.
    """
    side = getattr(model, "whitening", 0)
    if not side:
        return {}
    images = sample(whitening.MOST_IMAGES)
    kernels = whitening.whitening_kernels(images, mean, deviation, side)
    return {whitening.COLLECTION: {whitening.NAME: {"kernel": kernels}}}


class Description(NamedTuple):
    """What a network consists of, and what it costs; as a text it is both.

    Attributes:
        parameters: A table of their names, shapes and number.
        flops: Of the forward pass of one image, two for each product.
    """

    parameters: str
    flops: float

    def __str__(self) -> str:
        return (
            f"{self.parameters}\nForward pass of one image: {self.flops / 1e6:,.1f} million FLOPs"
        )


def describe(
    model: nn.Module, image_shape: tuple[int, ...], variables: Mapping[str, Any] | None = None
) -> Description:
    """Lays out the parameters, and counts the FLOPs.

    Args:
        model: A network.
        image_shape: (H, W, C) of one image.
        variables: The network's, where they are at hand; their shapes suffice.
    """
    images = jnp.zeros((1, *image_shape))
    if variables is None:
        variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    plain = model.clone(ops=PLAIN)  # the same number whatever computes it
    forward = jax.jit(lambda variables: plain.apply(variables, images, train=False))
    cost = forward.lower(variables).cost_analysis() or {}
    return Description(
        parameters=get_parameter_overview(variables["params"], include_stats=False),
        flops=float(cost.get("flops", math.nan)),
    )
