"""What a network consists of and costs: its parameters and FLOPs."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from clu.parameter_overview import get_parameter_overview
from flax import linen as nn

from alexnet_jax.ops import PLAIN


class Description(NamedTuple):
    """A table of the parameters' names, shapes and sizes; the FLOPs of one image's forward pass."""

    parameters: str
    flops: float  # two per multiplication and addition

    def __str__(self) -> str:
        millions = f"{self.flops / 1e6:,.1f} million FLOPs"
        return f"{self.parameters}\nForward pass of one image: {millions}"


def describe(
    model: nn.Module, image_shape: tuple[int, ...], variables: Mapping[str, Any] | None = None
) -> Description:
    """Lists the parameters and counts the FLOPs of a network, which is not run.

    Args:
        model: A network.
        image_shape: (H, W, C).
        variables: Its variables or their shapes, where at hand.
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
