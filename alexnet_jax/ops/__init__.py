"""Convolution and pooling, by XLA or in ways that are faster on a CPU; one switch chooses."""

import functools
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import dtypes
from jax import Array, lax

from alexnet_jax.ops import amx, bfloat16, convolution, cpu_info, pooling, reference

log = logging.getLogger(__name__)


class Ops(NamedTuple):
    """What a network computes with.

    Attributes:
        conv_general_dilated: As `jax.lax.conv_general_dilated`; for `flax.linen.Conv`'s field of
            that name.
        max_pool: As `flax.linen.max_pool` with a window, strides, and no padding.
        conv_relu_pool: As `composed.conv_relu_pool`.
        dot_general: As `jax.lax.dot_general`; for `flax.linen.Dense`'s field of that name.
        promote_dtype: As `flax.linen.dtypes.promote_dtype`; for `flax.linen.Dense`, likewise.
    """

    conv_general_dilated: Callable[..., Array] = lax.conv_general_dilated
    max_pool: Callable[..., Array] = nn.max_pool
    conv_relu_pool: Callable[..., Array] = reference.conv_relu_pool
    dot_general: Callable[..., Array] = lax.dot_general
    promote_dtype: Callable[..., list[Any]] = dtypes.promote_dtype


PLAIN = Ops()


def _by_products(conv_general_dilated: Callable[..., Array]) -> Ops:
    return Ops(
        conv_general_dilated,
        pooling.max_pool,
        functools.partial(
            reference.conv_relu_pool,
            conv_general_dilated=conv_general_dilated,
            max_pool=pooling.max_pool,
        ),
    )


CPU = _by_products(convolution.conv_general_dilated)
FEW_CORES = _by_products(convolution.conv_in_chunks)
AMX = Ops(
    amx.conv_general_dilated,
    pooling.max_pool,
    amx.conv_relu_pool,
    bfloat16.dot_general,
    bfloat16.promote_dtype,
)

SWITCH = ("auto", "on", "off")

# Up to so many a batch is best convolved a few images at a time. XLA writes the results of such a
# loop by one core, and many cores have more memory bandwidth.
_FEW = 2

# By dtype: how much of the largest value results and gradients of two layers may be off. Those of
# bfloat16 are rounded to 8 bits a few times on the way.
_TOLERANCES = {"float32": 1e-4, "bfloat16": 0.03}


def choose(switch: str, platform: str, dtype: str, *, devices: int = 1) -> Ops:
    """Chooses what the networks of this run compute with, and says so in the log.

    Args:
        switch: "off" takes XLA's own operations. "auto" takes those of this package where they
            are the faster ones, if they prove right there: on a CPU, and those for bfloat16 on
            one device alone, with instructions for it. "on" takes them anywhere, if they prove
            right.
        platform: Of the devices: "cpu", "gpu", "tpu".
        dtype: Of the network's arithmetic: "float32", "bfloat16".
        devices: Number of devices that share a batch.
    """
    if switch == "off" or (switch == "auto" and platform != "cpu"):
        return PLAIN
    how, why = "the CPU's kernels", f"config.cpu_kernels is {switch!r}"
    few = platform == "cpu" and devices == 1 and cpu_info.cores() <= _FEW
    ops = FEW_CORES if few else CPU
    if dtype == "bfloat16":
        found = sorted(cpu_info.BFLOAT16 & cpu_info.instruction_sets())
        if switch == "auto" and not found:
            log.warning(
                "Convolution and pooling by XLA: this CPU has no AMX and no AVX-512 for bfloat16, "
                "which is slow without; config.model.dtype 'float32' is faster here."
            )
            return PLAIN
        if switch == "auto" and devices > 1:
            log.info(
                "Convolution and pooling by XLA: of %d devices each would compute the whole batch "
                "with the CPU's kernels for bfloat16.",
                devices,
            )
            return PLAIN
        ops, how = AMX, "the CPU's kernels for bfloat16"
        why += f"; this CPU has {' and '.join(found) or 'no instructions for them'}"
    error = _largest_error(ops, dtype)
    if not error <= _TOLERANCES[dtype]:
        log.warning(
            "The CPU's kernels differ from XLA's by %.1g here; the run goes on without them.", error
        )
        return PLAIN
    log.info("Convolution and pooling by %s (%s).", how, why)
    return ops


def _largest_error(ops: Ops, dtype: str) -> float:
    """Compares results and gradients of a small network with those of XLA in float32.

    Returns:
        The largest difference, as a share of the largest value of the same array.
    """
    draw = np.random.default_rng(0).standard_normal
    # The second kernel has fewer channels out than in, and too few for Winograd's algorithm.
    shapes = [(2, 4, 4, 16), (24,), (24, 8), (3, 3, 16, 24), (3, 3, 24, 6)]
    # About 1 in each layer, and the same numbers in each dtype.
    operands = [
        jnp.asarray(draw(shape) / math.prod(shape[:-1]) ** 0.5, dtype).astype(jnp.float32)
        for shape in shapes
    ]

    def network(ops: Ops, dtype: str, operands: list[Array]) -> Array:
        images, bias, matrix, kernel, narrowing = operands
        x: Any = images.astype(dtype)
        x = ops.conv_relu_pool(x, kernel, bias, stride=1, pool=(2, 2))
        conv = nn.Conv(
            narrowing.shape[-1],
            (3, 3),
            use_bias=False,
            dtype=dtype,
            conv_general_dilated=ops.conv_general_dilated,
        )
        x = conv.apply({"params": {"kernel": narrowing}}, x)
        x = x.reshape(-1, matrix.shape[0])
        x = ops.dot_general(x, matrix.astype(dtype), (((1,), (0,)), ((), ())))
        return x.astype(jnp.float32)

    @jax.jit
    def compare(operands: list[Array]) -> Array:
        pairs = []
        for each, precision in ((ops, dtype), (PLAIN, "float32")):
            results, pull_back = jax.vjp(functools.partial(network, each, precision), operands)
            pairs.append((results, *pull_back(jnp.sin(results))))
        differences = jax.tree.map(lambda a, b: jnp.abs(a - b).max() / jnp.abs(b).max(), *pairs)
        return jnp.max(jnp.stack(jax.tree.leaves(differences)))

    return float(compare(operands))
