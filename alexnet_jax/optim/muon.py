"""Muon (Jordan et al., 2024) for kernels of convolutions, as airbench94_muon (Jordan, 2024)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers
from optax.contrib import muon as optax_muon

from alexnet_jax.optim.options import OptimizerConfig
from alexnet_jax.optim.patterns import matching


def muon(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Builds Muon, which orthogonalizes a matrix with a row for each filter.

    Args:
        config: The options.
        schedule: That of the other parameters; Muon's is in proportion.
    """

    def dimensions(params: Any) -> Any:
        return jax.tree.map(
            lambda leaf: MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1), params
        )

    relative = config.muon_learning_rate / config.learning_rate
    return optax_muon(
        lambda count: relative * schedule(count),
        beta=config.muon_momentum,
        weight_decay=config.muon_weight_decay,
        muon_weight_dimension_numbers=dimensions,
    )


def normalize_filters(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Rescales kernels, before each update, to the norm of as many unit filters as they have.

    With a normalization behind them their scale has no effect but on the size of relative updates,
    which so stays the same; else it shrinks as they grow.

    Args:
        inner: Makes the updates of kernels [..., O], with all that scales these: outside, it would
            scale the change of the norm, too.
    """

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        units = jax.tree.map(
            lambda p: p * (p.shape[-1] ** 0.5 / jnp.maximum(jnp.linalg.norm(p), 1e-12)), params
        )
        steps, state = inner.update(gradients, state, units)
        return jax.tree.map(lambda u, n, p: u + (n - p), steps, units, params), state

    return optax.GradientTransformation(inner.init, update)


def muon_share(config: OptimizerConfig, params: Any) -> str:
    """Says how many of the trained parameters Muon trains; "" if it is off."""
    if not config.muon_learning_rate:
        return ""
    frozen = jax.tree.leaves(matching(params, *config.frozen))
    sizes = [
        0 if still else math.prod(leaf.shape)
        for leaf, still in zip(jax.tree.leaves(params), frozen, strict=True)
    ]
    marks = jax.tree.leaves(matching(params, config.muon_pattern))
    share = sum(size for size, mark in zip(sizes, marks, strict=True) if mark)
    return (
        f"Muon trains {share:,} of {sum(sizes):,} parameters, those of {config.muon_pattern!r}; "
        f"{config.name!r} the rest."
    )
