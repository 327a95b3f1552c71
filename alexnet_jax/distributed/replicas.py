"""Several runs at once that differ in nothing but their seed: replicas.

Their states are one `TrainState` whose arrays have one more dimension, the first, of R replicas; so
whatever works on the arrays of a state, such as saving it, works on theirs.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics
from jax import Array
from jax.sharding import Mesh, NamedSharding

from alexnet_jax.distributed import sharding
from alexnet_jax.state import TrainState, find_not_finite

# What differs between the replicas in the data set that `steps.train_steps` draws from.
_FEED_AXES = {"image": None, "label": None, "order": 0}


def seeds(first: int, count: int) -> np.ndarray:
    """Returns uint32[count], the seed of each replica: that of the run, and those after it."""
    return ((first + np.arange(count)) % 2**32).astype(np.uint32)


def create(create_one: Callable[[Array], TrainState], seeds: np.ndarray) -> TrainState:
    """Initialises the state of every seed, by one program that does them in turn.

    Args:
        create_one: From a seed, uint32[], to its state.
        seeds: uint32[R].

    Returns:
        The state with R replicas: each array has one more dimension, its first, of length R.
    """
    return jax.lax.map(create_one, jnp.asarray(seeds))


def pick(tree: Any, index: Any) -> Any:
    """Returns one replica of arrays whose first dimension is that of replicas, without it."""
    return jax.tree.map(lambda x: x[index], tree)


def spread(count: int, mesh: Mesh) -> bool:
    """Whether each device gets replicas of its own, in place of a part of every batch."""
    return not sharding.on_cpu(mesh) and count % mesh.size == 0 and jax.process_count() == 1


def state_sharding(count: int, mesh: Mesh) -> NamedSharding:
    """Says where the arrays of all replicas lie."""
    return sharding.split(mesh) if spread(count, mesh) else sharding.replicated(mesh)


def compile_update(
    function: Callable[..., Any], count: int, mesh: Mesh, *, in_turn: bool
) -> Callable[..., Any]:
    """Compiles a function of a state and a data set for all replicas.

    Args:
        function: From the state of one replica, and what it draws batches from (image, label, and
            the order of its epoch), to a new state and metrics.
        count: R, replicas.
        mesh: The devices.
        in_turn: One replica after the other, by one program, which does to each what a run of its
            own does, to the same bits; not all at once by `vmap`. On a CPU that costs nothing
            beside runs of their own, and about a fifth beside `vmap`: docs/results.md.

    Returns:
        From the states of all, which are given up, and image, label and order[R, N], to the same of
        the new states and metrics.
    """
    if not in_turn:
        everywhere = sharding.replicated(mesh)
        return jax.jit(
            jax.vmap(function, in_axes=(0, _FEED_AXES)),
            donate_argnums=0,
            out_shardings=(state_sharding(count, mesh), everywhere),
        )

    # Three programs and not one, which XLA would fuse, and round, in another way.
    take = sharding.jit_eval(lambda states, orders, index: pick((states, orders), index), mesh)
    compiled = sharding.jit_update(function, mesh)
    put = sharding.jit_update(_put, mesh)

    def update(states: TrainState, feed: dict[str, Array]) -> Any:
        measured = []
        for index in range(count):
            state, order = take(states, feed["order"], np.int32(index))
            state, figures = compiled(state, feed | {"order": order})
            states = put(states, state, np.int32(index))
            measured.append(figures)
        return states, _stacked(measured)

    return update


def compile_reading(
    function: Callable[..., Any], count: int, mesh: Mesh, *, in_turn: bool
) -> Callable[..., Any]:
    """Compiles a function of a state and a batch for all replicas, which share the batch.

    Args:
        function: From the state of one replica and a batch to metrics.
        count: R, replicas.
        mesh: The devices.
        in_turn: As of `compile_update`.
    """
    if not in_turn:
        return sharding.jit_eval(jax.vmap(function, in_axes=(0, None)), mesh)
    take, compiled = (sharding.jit_eval(each, mesh) for each in (pick, function))

    def read(states: TrainState, batch: Any) -> Any:
        return _stacked([compiled(take(states, np.int32(index)), batch) for index in range(count)])

    return read


def _put(states: TrainState, state: TrainState, index: Array) -> TrainState:
    """Writes one replica over, in place; its key stays as it is."""
    new = jax.tree.map(
        lambda all_, x: jax.lax.dynamic_update_index_in_dim(all_, x, index, 0),
        states.replace(key=()),
        state.replace(key=()),
    )
    return new.replace(key=states.key)


@jax.jit
def _stacked(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def compute(collection: metrics.Collection) -> dict[str, np.ndarray]:
    """Computes metrics on the host, of one run or, one by one, of all replicas.

    Returns:
        By name, the figure, or figures of R replicas along the first dimension.
    """
    collection = jax.device_get(collection)
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(collection._reduction_counter)}
    if sizes == {()}:
        return collection.compute()
    ((count,),) = sizes
    each = [pick(collection, index).compute() for index in range(count)]
    return {name: np.stack([figures[name] for figures in each]) for name in each[0]}


def summary(figures: dict[str, Any]) -> dict[str, Any]:
    """Makes numbers of JSON of what was measured.

    Args:
        figures: By name, float[], or float[R] of replicas.

    Returns:
        Of each name the number; of replicas the mean, "NAME_deviation", the standard deviation of a
        sample (over R - 1), and "NAME_each", the list.
    """
    found: dict[str, Any] = {}
    for name, value in figures.items():
        values = np.asarray(value, np.float64)
        if values.ndim:
            found[name] = float(values.mean())
            found[f"{name}_deviation"] = float(values.std(ddof=1))
            found[f"{name}_each"] = values.tolist()
        else:
            found[name] = float(values)
    return found


def show_accuracy(figures: dict[str, Any]) -> str:
    """Writes the accuracy of a `summary`: "85.10%", of replicas "85.10% (deviation 0.31)"."""
    text = f"{100 * figures['accuracy']:.2f}%"
    if "accuracy_deviation" not in figures:
        return text
    return f"{text} (deviation {100 * figures['accuracy_deviation']:.2f})"


def not_finite(values: Any, first_seed: int) -> str:
    """Says whose figures, float[R], are NaN or infinite: " of seed 3", or nothing of a single."""
    values = np.asarray(values)
    if not values.ndim:
        return ""
    return _of_seeds(np.flatnonzero(~np.isfinite(values)).tolist(), first_seed, len(values))


def states_not_finite(states: TrainState, first_seed: int) -> str:
    """Says which states hold NaN or infinity, as `not_finite` does; for when some do."""
    count = np.size(jax.device_get(states.step))
    if not np.ndim(states.step):
        return ""
    broken = [index for index in range(count) if find_not_finite(pick(states, index))]
    return _of_seeds(broken, first_seed, count)


def _of_seeds(indices: list[int], first_seed: int, count: int) -> str:
    named = ", ".join(str(seeds(first_seed, count)[index]) for index in indices)
    return f" of seed{'s' * (len(indices) > 1)} {named}"
