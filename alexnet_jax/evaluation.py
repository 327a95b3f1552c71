"""How good a network is: measured on every image of a split, each once."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from alexnet_jax import ops, parallel, steps
from alexnet_jax.data import batches
from alexnet_jax.data.resident import load_split
from alexnet_jax.errors import InputError
from alexnet_jax.inference import Network
from alexnet_jax.metrics import EvalMetrics
from alexnet_jax.state import TrainState


def evaluate(
    measure: Callable[[TrainState, batches.Batch], EvalMetrics],
    states: dict[str, TrainState],
    batched: Iterable[batches.Batch],
) -> dict[str, dict[str, Any]]:
    """Measures networks on every image, which is read once for all of them.

    Args:
        measure: `steps.eval_step`, compiled, with all but state and batch given.
        states: By name; their `variables` are measured.
        batched: Batches with masks.

    Returns:
        By the same names: mean `loss` and `accuracy` over the images, and `confusion`
        int32[classes, classes]. Nothing if there are no batches.
    """
    totals: dict[str, EvalMetrics] = {}
    for batch in batched:
        before = dict(totals)
        for name, state in states.items():
            metrics = measure(state, batch)
            totals[name] = before[name].merge(metrics) if before else metrics
        jax.block_until_ready(before)  # else batches that are read fast pile up on the device
    return {name: total.compute() for name, total in jax.device_get(totals).items()}


def versions(state: TrainState, split: str) -> dict[str, TrainState]:
    """Returns what is to be measured on a split: the weights, and their average if it is kept."""
    return {split: state} | ({f"{split}_ema": state.averaged()} if state.ema else {})


class Evaluation(NamedTuple):
    """How good a network is on a split.

    Attributes:
        data: Name of the data set.
        split: What was asked for.
        images: How many it has.
        results: As `evaluate` returns them: by the split's name for the weights of the last step,
            and by the same with "_ema" for their average, where the run keeps it.
    """

    data: str
    split: str
    images: int
    results: dict[str, dict[str, Any]]


def evaluate_network(
    network: Network, split: str = "test", data: ConfigDict | None = None
) -> Evaluation:
    """Measures a network as its training run does; on the same split it gets the same numbers.

    Args:
        network: Of `alexnet_jax.load`; both its weights are measured, whichever it answers with.
        split: "test", "train" or "validation" as the run has them, or a TFDS split, "test[:50%]".
        data: A section `config.data` that names another prepared set; None takes the run's own.

    Raises:
        InputError: The data cannot be had, their classes are others, or the run's own have
            changed since it began.
    """
    config = network.config.copy_and_resolve_references()
    if data is not None:
        config.data = data
    mesh = parallel.make_mesh()
    opened = load_split(config, mesh, split)
    if opened.class_names != network.class_names:
        raise InputError(_other_classes(config.data.name, opened.class_names, network))
    before = network.info.get("checksums", {}).get(opened.part)
    if config.data.name == network.info["name"] and before and opened.checksum() != before:
        raise InputError(
            f"the {opened.part} files of {config.data.name} have changed since the run in "
            f"{network.folder} began: they were {before} and are {opened.checksum()}; put the old "
            "ones back, or prepare these under another name."
        )
    platform = mesh.devices.flat[0].platform
    chosen = ops.choose(config.cpu_kernels, platform, config.model.dtype, devices=mesh.size)
    measure = parallel.compile_reading(
        functools.partial(
            steps.eval_step, model=network.module.clone(ops=chosen), normalize=network.normalize
        ),
        mesh,
    )
    state = jax.device_put(network.state, parallel.replicated(mesh))
    return Evaluation(
        data=config.data.name,
        split=split,
        images=opened.size,
        results=evaluate(measure, versions(state, split), opened.batches),
    )


def _other_classes(name: str, found: tuple[str, ...], network: Network) -> str:
    wanted = network.class_names
    if len(found) != len(wanted):
        difference = f"it has {len(found)} and the network {len(wanted)}"
    else:
        first = int(np.argmax([one != other for one, other in zip(found, wanted, strict=True)]))
        difference = f"number {first} is {found[first]!r} there and {wanted[first]!r} here"
    return f"{name} has other classes than the network: {difference}; name a set with the same."
