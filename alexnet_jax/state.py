"""What a run *is*: every array that a step reads and writes, and nothing else."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array


class TrainState(flax.struct.PyTreeNode):
    """The arrays of a run; immutable, one pytree.

    Attributes:
        step: int32[], steps taken so far.
        params: Trained parameters.
        model_state: The network's other collections by name, e.g. {"batch_stats": ...}.
        opt_state: Optax state.
        ema: {"params", "model_state"} averaged over the steps (Polyak and Juditsky, 1992), or {}.
        key: The run's random key. It never changes: a draw is a function of (key, step).
    """

    step: Array
    params: Any
    model_state: Any
    opt_state: optax.OptState
    ema: Any
    key: Array

    @property
    def steps_taken(self) -> int:
        """`step` as a number on the host; replicas have taken as many each."""
        return int(np.ravel(jax.device_get(self.step))[0])

    @property
    def variables(self) -> dict[str, Any]:
        """The argument of `module.apply`."""
        return {"params": self.params, **self.model_state}

    def averaged(self) -> "TrainState":
        """Returns the state with the averaged weights, where they are kept."""
        return self.replace(**self.ema) if self.ema else self


@jax.jit
def _finite(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.isfinite(x).all(), tree)


def find_nonfinite(state: TrainState) -> str | None:
    """Returns the path of an array that holds NaN or infinity, "params/fc/bias", or None."""
    finite = jax.device_get(_finite(state.replace(key=())))
    for path, is_finite in jax.tree_util.tree_flatten_with_path(finite)[0]:
        if not is_finite:
            return jax.tree_util.keystr(path, simple=True, separator="/")
    return None


def create_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    seed: int | Array,
    *,
    ema: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> TrainState:
    """Initializes a run at step 0. Pure: the same seed gives the same state.

    Args:
        model: A network with the contract of `alexnet_jax.models`.
        optimizer: Optax transformation of the gradients.
        image_shape: (H, W, C) of one image.
        seed: Of every random draw of the run.
        ema: Whether to keep averaged weights.
        variables: Part of the tree that `model.init` makes, to replace its arrays: what was
            measured on images (`models.init_from_data`) or trained before.
    """
    init_key, run_key = jax.random.split(jax.random.key(seed))
    initial = model.init(init_key, jnp.zeros((1, *image_shape)), train=False)
    replaced = flatten_dict(jax.tree.map(jnp.asarray, dict(variables or {})))
    initial = unflatten_dict(flatten_dict(initial) | replaced)
    model_state = {name: value for name, value in initial.items() if name != "params"}
    params = initial["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=model_state,
        opt_state=optimizer.init(params),
        # Copies, because a buffer that stands in a state twice cannot be donated.
        ema=jax.tree.map(jnp.copy, {"params": params, "model_state": model_state}) if ema else {},
        key=run_key,
    )
