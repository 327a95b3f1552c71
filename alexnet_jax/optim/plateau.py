"""The schedule "plateau": a learning rate that falls when the validation accuracy stops improving.

`optax.contrib.reduce_on_plateau` takes the value to watch in each update; here it is known once an
epoch, outside of the compiled step.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from alexnet_jax.optim.options import OptimizerConfig


class PlateauState(NamedTuple):
    """State of `scale_by_plateau`.

    Attributes:
        factor: float32[], factor of the learning rate.
        best: float32[], highest validation accuracy so far.
        waited: int32[], epochs since then, or since the factor last changed.
    """

    factor: Array
    best: Array
    waited: Array


def scale_by_plateau() -> optax.GradientTransformation:
    """Scales updates by a factor in the state, which `after_validation` lowers."""

    def init(params: Any) -> PlateauState:
        del params
        return PlateauState(jnp.float32(1), jnp.float32(-1), jnp.int32(0))

    def update(updates: Any, state: PlateauState, params: Any = None) -> tuple[Any, PlateauState]:
        del params
        return jax.tree.map(lambda u: u * state.factor.astype(u.dtype), updates), state

    return optax.GradientTransformation(init, update)


def after_validation(opt_state: Any, accuracy: Array | float, config: OptimizerConfig) -> Any:
    """Multiplies the learning rate by `step_factor` after `plateau_patience` epochs in vain.

    Krizhevsky, Sutskever and Hinton (2012), section 5, do so by hand.

    Args:
        opt_state: State of the optimizer; that of another schedule is returned as it is.
        accuracy: Accuracy on the validation images after an epoch.
        config: The options.
    """

    def lower(node: Any) -> Any:
        if not _is_plateau(node):
            return node
        waited = jnp.where(accuracy > node.best, 0, node.waited + 1)
        over = waited >= config.plateau_patience
        return PlateauState(
            factor=jnp.where(over, node.factor * config.step_factor, node.factor),
            best=jnp.maximum(node.best, accuracy),
            waited=jnp.where(over, 0, waited),
        )

    return jax.tree.map(lower, opt_state, is_leaf=_is_plateau)


def plateau_factor(opt_state: Any) -> float:
    """Returns the factor of the learning rate, its mean over replicas; 1 for other schedules."""
    nodes = [node for node in jax.tree.leaves(opt_state, is_leaf=_is_plateau) if _is_plateau(node)]
    return float(jax.device_get(nodes[0].factor).mean()) if nodes else 1.0


def _is_plateau(node: Any) -> bool:
    return isinstance(node, PlateauState)
