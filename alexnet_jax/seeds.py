"""How the functions of a run are compiled: for one seed, or for several that train in one run.

The states of several seeds are one `TrainState` whose arrays have one more dimension, the first, of
R replicas; so whatever works on the arrays of a state, such as saving it, works on theirs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from alexnet_jax.data.feed import InMemoryFeed
from alexnet_jax.distributed import sharding
from alexnet_jax.state import TrainState

Function = Callable[..., Any]


class SingleSeed:
    """Compiles for one seed.

    Attributes:
        seeds: The only one.
        mesh: The devices.
        sharding: Of the state.
        split_batch: Spreads a batch over the devices, inside of jit.
    """

    def __init__(self, seeds: Sequence[int], mesh: Mesh) -> None:
        self.seeds = tuple(seeds)
        self.mesh = mesh
        self.sharding = sharding.replicated(mesh)
        self.split_batch = sharding.split_batch(mesh)

    def init(self, create: Callable[[int | Array], TrainState]) -> TrainState:
        """Calls a function from a seed to its state."""
        return create(self.seeds[0])

    def step(self, function: Function) -> Function:
        """Compiles a function from a state, which is donated, and a feed to a state and metrics."""
        return sharding.jit_update(function, self.mesh)

    def eval(self, function: Function) -> Function:
        """Compiles a function from a state and a batch to metrics."""
        return sharding.jit_eval(function, self.mesh)

    def update(self, function: Function) -> Function:
        """Compiles a function from a state, which is donated, and a value to a state."""
        return sharding.jit_update(function, self.mesh)

    def pick(self, tree: Any, index: int) -> Any:
        """Returns the arrays of one seed."""
        return tree


class SequentialSeeds(SingleSeed):
    """Trains one seed after the other, each by the program that its own run has.

    So each is what its own run is, to the bit. On a CPU that costs nothing beside runs of their
    own, and about a fifth beside `vmap`: docs/results.md. Feeds have rows int32[R, K, B], values
    one more dimension R; the seeds share batches to evaluate on.
    """

    def init(self, create: Callable[[int | Array], TrainState]) -> TrainState:
        """Calls the function for each seed, by one program."""
        return jax.lax.map(create, jnp.asarray(self.seeds, jnp.uint32))

    def step(self, function: Function) -> Function:
        """Compiles for all seeds."""
        # Three programs and not one, which XLA would fuse, and round, in another way.
        take = sharding.jit_eval(lambda trees, index: pick(trees, index), self.mesh)
        compiled = sharding.jit_update(function, self.mesh)
        put = sharding.jit_update(_put, self.mesh)

        def step(states: TrainState, feed: InMemoryFeed) -> Any:
            measured = []
            for index in range(len(self.seeds)):
                state, rows = take((states, feed.rows), np.int32(index))
                state, metrics = compiled(state, feed.replace(rows=rows))
                states = put(states, state, np.int32(index))
                measured.append(metrics)
            return states, _stack(measured)

        return step

    def eval(self, function: Function) -> Function:
        """Compiles for all seeds."""
        take, compiled = (sharding.jit_eval(each, self.mesh) for each in (pick, function))

        def evaluate(states: TrainState, batch: Any) -> Any:
            indices = range(len(self.seeds))
            return _stack([compiled(take(states, np.int32(i)), batch) for i in indices])

        return evaluate

    def update(self, function: Function) -> Function:
        """Compiles for all seeds."""
        return jax.jit(jax.vmap(function), donate_argnums=0, out_shardings=self.sharding)

    def pick(self, tree: Any, index: int) -> Any:
        """Returns the arrays of one seed."""
        return pick(tree, index)


class VectorizedSeeds(SequentialSeeds):
    """Trains all seeds at once, by `vmap`; for accelerators.

    Where the devices can share out the seeds equally, each trains its own on whole batches.
    """

    def __init__(self, seeds: Sequence[int], mesh: Mesh) -> None:
        super().__init__(seeds, mesh)
        if len(seeds) % mesh.size == 0 and jax.process_count() == 1:
            self.sharding = sharding.split(mesh)
            self.split_batch = lambda batch: batch

    def step(self, function: Function) -> Function:
        """Compiles for all seeds."""
        axes: Any = InMemoryFeed(image=None, label=None, rows=0)  # type: ignore[arg-type]
        everywhere = sharding.replicated(self.mesh)
        return jax.jit(
            jax.vmap(function, in_axes=(0, axes)),
            donate_argnums=0,
            out_shardings=(self.sharding, everywhere),
        )

    def eval(self, function: Function) -> Function:
        """Compiles for all seeds."""
        return sharding.jit_eval(jax.vmap(function, in_axes=(0, None)), self.mesh)


def choose(first: int, count: int, mesh: Mesh) -> SingleSeed:
    """Returns what compiles for the seeds `first`, `first` + 1, ... on the devices."""
    seeds = numbers(first, count)
    if count == 1:
        return SingleSeed(seeds, mesh)
    return SequentialSeeds(seeds, mesh) if sharding.on_cpu(mesh) else VectorizedSeeds(seeds, mesh)


def numbers(first: int, count: int) -> list[int]:
    """Returns the seeds of a run: its own, and those after it, below 2**32."""
    return [(first + i) % 2**32 for i in range(count)]


def pick(tree: Any, index: Any) -> Any:
    """Returns one replica of arrays whose first dimension is that of replicas, without it."""
    return jax.tree.map(lambda x: x[index], tree)


def _put(states: TrainState, state: TrainState, index: Array) -> TrainState:
    """Writes one replica over, in place; its key stays as it is."""
    new = jax.tree.map(
        lambda all_, x: jax.lax.dynamic_update_index_in_dim(all_, x, index, 0),
        states.replace(key=()),
        state.replace(key=()),
    )
    return new.replace(key=states.key)


@jax.jit
def _stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
