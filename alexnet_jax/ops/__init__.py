"""Convolution and pooling, by XLA or in ways that are faster on a CPU; one switch chooses."""

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array, lax

from alexnet_jax.ops import convolution, pooling

log = logging.getLogger(__name__)


class Ops(NamedTuple):
    """What a network computes with.

    Attributes:
        conv_general_dilated: As `jax.lax.conv_general_dilated`; for `flax.linen.Conv`'s field of
            that name.
        max_pool: As `flax.linen.max_pool` with a window, strides, and no padding.
    """

    conv_general_dilated: Callable[..., Array] = lax.conv_general_dilated
    max_pool: Callable[..., Array] = nn.max_pool


PLAIN = Ops()
CPU = Ops(convolution.conv_general_dilated, pooling.max_pool)

SWITCH = ("auto", "on", "off")


def choose(switch: str, platform: str) -> Ops:
    """Chooses what the networks of this run compute with, and says so in the log.

    Args:
        switch: "off" takes XLA's own operations. "auto" takes those of this package where they
            are the faster ones, on a CPU, if they prove right there. "on" takes them anywhere.
        platform: Of the devices: "cpu", "gpu", "tpu".
    """
    if switch == "off" or (switch == "auto" and platform != "cpu"):
        return PLAIN
    error = _largest_error(CPU)
    if error > 1e-4:
        log.warning(
            "The CPU's kernels differ from XLA's by %.1g here; the run goes on without them.", error
        )
        return PLAIN
    log.info("Convolution and pooling by the CPU's kernels (config.cpu_kernels is %r).", switch)
    return CPU


def _largest_error(ops: Ops) -> float:
    """Compares the results and gradients of a small network with those of XLA's operations."""
    draw = np.random.default_rng(0).standard_normal
    images = jnp.asarray(draw((2, 6, 6, 16)), jnp.float32)
    kernel = jnp.asarray(draw((3, 3, 16, 16)), jnp.float32)

    def example(ops: Ops, images: Array, kernel: Array) -> Array:
        conv = nn.Conv(16, (3, 3), conv_general_dilated=ops.conv_general_dilated, use_bias=False)
        x = conv.apply({"params": {"kernel": kernel}}, images)
        return jnp.sum(jnp.sin(ops.max_pool(x, (2, 2), (2, 2))))

    @jax.jit
    def compare(images: Array, kernel: Array) -> Array:
        ours, plain = (
            jax.value_and_grad(functools.partial(example, each), argnums=(0, 1))(images, kernel)
            for each in (ops, PLAIN)
        )
        differences = jax.tree.map(
            lambda a, b: jnp.abs(a - b).max() / jnp.abs(b).max(), ours, plain
        )
        return jnp.max(jnp.stack(jax.tree.leaves(differences)))

    return float(compare(images, kernel))
