"""Lookahead (Zhang et al., 2019), with slow weights in its state.

`optax.lookahead` takes pairs of parameters, which the network and the checkpoints would have to
know, and a constant step size.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array


class LookaheadState(NamedTuple):
    """State of `lookahead`.

    Attributes:
        inner: State of the inner optimizer.
        slow: The slow weights.
        made: int32[], updates so far.
    """

    inner: optax.OptState
    slow: Any
    made: Array


def lookahead(
    inner: optax.GradientTransformation, period: int, decay: Callable[[Array], Array], updates: int
) -> optax.GradientTransformation:
    """Moves slow weights towards the fast ones every few updates, and sets the fast ones to them.

    Args:
        inner: Optimizer of the fast weights; its state is kept when they are set.
        period: Updates between two updates of the slow weights.
        decay: Fraction of the slow weights that is kept, by the number of updates so far. It may
            change, as that of airbench (Jordan, 2024), which averages batch statistics, too.
        updates: Updates of the whole run; the last one ends on the slow weights as well.
    """

    def init(params: Any) -> LookaheadState:
        # Copies, because a buffer that is in a state twice cannot be donated.
        slow = jax.tree.map(jnp.copy, params)
        return LookaheadState(inner.init(params), slow, jnp.zeros((), jnp.int32))

    def update(
        gradients: Any, state: LookaheadState, params: Any = None
    ) -> tuple[Any, LookaheadState]:
        steps, inner_state = inner.update(gradients, state.inner, params)
        count = state.made + 1
        now = (count % period == 0) | (count == updates)
        kept = jnp.asarray(decay(count), jnp.float32)
        fast = optax.apply_updates(params, steps)
        slow = jax.tree.map(
            lambda s, f: jnp.where(now, (kept * s + (1 - kept) * f).astype(s.dtype), s),
            state.slow,
            fast,
        )
        steps = jax.tree.map(lambda u, s, p: jnp.where(now, s - p, u), steps, slow, params)
        return steps, LookaheadState(inner_state, slow, count)

    return optax.GradientTransformation(init, update)
