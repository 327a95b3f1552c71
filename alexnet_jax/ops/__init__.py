"""Convolution, pooling and matrix products: by XLA, or by kernels that are faster on a CPU."""

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
        conv_general_dilated: As `jax.lax.conv_general_dilated`; a field of `flax.linen.Conv`.
        max_pool: As `flax.linen.max_pool` with a window, strides, and no padding.
        conv_relu_pool: As `reference.conv_relu_pool`.
        dot_general: As `jax.lax.dot_general`; a field of `flax.linen.Dense`.
        promote_dtype: As `flax.linen.dtypes.promote_dtype`; a field of `flax.linen.Dense`.
    """

    conv_general_dilated: Callable[..., Array] = lax.conv_general_dilated
    max_pool: Callable[..., Array] = nn.max_pool
    conv_relu_pool: Callable[..., Array] = reference.conv_relu_pool
    dot_general: Callable[..., Array] = lax.dot_general
    promote_dtype: Callable[..., list[Any]] = dtypes.promote_dtype


def _float32(conv: Callable[..., Array]) -> Ops:
    max_pool = pooling.max_pool
    fused = functools.partial(
        reference.conv_relu_pool, conv_general_dilated=conv, max_pool=max_pool
    )
    return Ops(conv, max_pool, fused)


PLAIN = Ops()
CPU = _float32(convolution.conv_general_dilated)
FEW_CORES = _float32(convolution.conv_in_chunks)
AMX = Ops(
    amx.conv_general_dilated,
    pooling.max_pool,
    amx.conv_relu_pool,
    bfloat16.dot_general,
    bfloat16.promote_dtype,
)

SWITCH = ("auto", "on", "off")

# Up to so many cores, a batch is best convolved a few images at a time. XLA writes the results of
# such a loop by one core, and many cores have more memory bandwidth.
_FEW = 2

# By dtype: the largest `relative_error`. Values in bfloat16 are rounded to 8 bits a few times.
_TOLERANCES = {"float32": 1e-4, "bfloat16": 0.03}


def choose(switch: str, platform: str, dtype: str, *, devices: int = 1) -> Ops:
    """Chooses what the networks of this run compute with, and logs it.

    Args:
        switch: "off" is XLA's own operations. "auto" is those of this package where they are
            faster: on a CPU, and for bfloat16 on a single device with instructions for it. "on"
            is those of this package anywhere. They are used only if they pass a self-check.
        platform: Of the devices: "cpu", "gpu", "tpu".
        dtype: Of the network's arithmetic: "float32", "bfloat16".
        devices: Number of devices that share a batch.
    """
    if switch == "off" or (switch == "auto" and platform != "cpu"):
        return PLAIN
    kernels, why = "the CPU kernels", f"config.cpu_kernels is {switch!r}"
    few = platform == "cpu" and devices == 1 and cpu_info.cores() <= _FEW
    ops = FEW_CORES if few else CPU
    if dtype == "bfloat16":
        found = sorted(cpu_info.BFLOAT16 & cpu_info.instruction_sets())
        if switch == "auto" and not found:
            log.warning(
                "Convolution and pooling by XLA: this CPU has no AMX and no AVX-512 for bfloat16, "
                "and is slow without them; config.model.dtype 'float32' is faster here."
            )
            return PLAIN
        if switch == "auto" and devices > 1:
            log.info(
                "Convolution and pooling by XLA: with the CPU kernels for bfloat16, each of %d "
                "devices would compute the whole batch.",
                devices,
            )
            return PLAIN
        ops, kernels = AMX, "the CPU kernels for bfloat16"
        why += f"; this CPU has {' and '.join(found) or 'no instructions for them'}"
    error = relative_error(ops, dtype)
    if not error <= _TOLERANCES[dtype]:
        log.warning("The CPU kernels differ from XLA's by %.1g; they are not used.", error)
        return PLAIN
    log.info("Convolution and pooling by %s (%s).", kernels, why)
    return ops


@functools.cache
def relative_error(ops: Ops, dtype: str) -> float:
    """Compares results and gradients of a small network with those of XLA in float32.

    Returns:
        The largest difference, relative to the largest value of the same array.
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
        x = ops.conv_relu_pool(images.astype(dtype), kernel, bias, stride=1, pool=(2, 2))
        nhwc = ("NHWC", "HWIO", "NHWC")
        narrowing = narrowing.astype(dtype)
        x = ops.conv_general_dilated(x, narrowing, (1, 1), "SAME", dimension_numbers=nhwc)
        x = x.reshape(-1, matrix.shape[0])
        x = ops.dot_general(x, matrix.astype(dtype), (((1,), (0,)), ((), ())))
        return x.astype(jnp.float32)

    @jax.jit
    def compare(operands: list[Array]) -> Array:
        pairs = []
        for each, precision in ((ops, dtype), (PLAIN, "float32")):
            results, vjp = jax.vjp(functools.partial(network, each, precision), operands)
            pairs.append((results, *vjp(jnp.sin(results))))
        differences = jax.tree.map(lambda a, b: jnp.abs(a - b).max() / jnp.abs(b).max(), *pairs)
        return jnp.max(jnp.stack(jax.tree.leaves(differences)))

    return float(compare(operands))
