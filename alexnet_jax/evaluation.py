"""How good a network is: measured on every image of a split, each once."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from alexnet_jax import ops, steps
from alexnet_jax.config import validate
from alexnet_jax.data import sampling
from alexnet_jax.data.load import load_split
from alexnet_jax.data.tta import Views, create_views
from alexnet_jax.distributed import replicas, sharding
from alexnet_jax.errors import InputError, show
from alexnet_jax.inference.predictor import Network
from alexnet_jax.metrics import EvalMetrics
from alexnet_jax.state import TrainState

Measure = Callable[[sampling.Batch], EvalMetrics]


def evaluate(
    measures: dict[str, Measure], batched: Iterable[sampling.Batch]
) -> dict[str, dict[str, Any]]:
    """Measures networks on every image, which is read once for all of them.

    Args:
        measures: By name, `steps.eval_step`, compiled, with all but the batch given.
        batched: Batches with masks.

    Returns:
        By the same names: mean `loss` and `accuracy` over the images, and `confusion`
        int32[classes, classes], or of R replicas with a first dimension of these. Nothing if there
        are no batches.
    """
    totals: dict[str, EvalMetrics] = {}
    for batch in batched:
        before = dict(totals)
        for name, measure in measures.items():
            metrics = measure(batch)
            totals[name] = before[name].merge(metrics) if before else metrics
        jax.block_until_ready(before)  # else batches that are read fast pile up on the device
    return {name: replicas.compute(total) for name, total in totals.items()}


def measures_of(
    programs: dict[str, Callable[[TrainState, sampling.Batch], EvalMetrics]],
    state: TrainState,
    split: str,
) -> dict[str, Measure]:
    """Names what is to be measured on a split: the weights, and their average if it is kept.

    Args:
        programs: `steps.eval_step`, compiled, by what its names end in: "", and "_tta" for
            several views of each image.
        state: Whose weights are measured.
        split: What the names begin with.
    """
    versions = {"": state} | ({"_ema": state.averaged()} if state.ema else {})
    return {
        f"{split}{suffix}{version}": functools.partial(measure, weights)
        for suffix, measure in programs.items()
        for version, weights in versions.items()
    }


class Evaluation(NamedTuple):
    """How good a network is on a split.

    Attributes:
        data: Name of the data set.
        split: What was asked for.
        images: How many it has.
        results: As `evaluate` returns them: by the split's name for the weights of the last step,
            and by the same with "_ema" for their average, where the run keeps it; with "_tta"
            before that, of several views of each image.
    """

    data: str
    split: str
    images: int
    results: dict[str, dict[str, Any]]


def evaluate_network(
    network: Network,
    split: str = "test",
    data: ConfigDict | None = None,
    views: str | None = None,
) -> Evaluation:
    """Measures a network as its training run does; on the same split it gets the same numbers.

    Args:
        network: Of `alexnet_jax.load`; both its weights are measured, whichever it answers with.
        split: "test", "train" or "validation" as the run has them, or a TFDS split, "test[:50%]".
        data: A section `config.data` that names another prepared set; None takes the run's own.
        views: One of `data.views.VIEWS`, measured beside; None takes the run's own.

    Raises:
        InputError: There are no such views, the data cannot be had, they are to have another size
            than the network's, or other classes, or the run's own have changed since it began.
    """
    config = network.config.copy_and_resolve_references()
    if data is not None:
        for name in ("image_size", "crop_size", "normalization"):
            if data[name] != config.data[name]:
                raise InputError(
                    f"config.data.{name} is {show(data[name])}; the network was trained with "
                    f"{show(config.data[name])}, and takes no other."
                )
        config.data = data
    if views is not None:
        config.eval.tta = views
    validate(config)
    mesh = sharding.make_mesh()
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
    looks: dict[str, Views | None] = {"": None}
    if several := create_views(config):
        looks["_tta"] = several
    module = network.module.clone(ops=chosen)
    programs = {
        suffix: sharding.jit_eval(
            functools.partial(
                steps.eval_step, model=module, normalize=network.normalize, views=each
            ),
            mesh,
        )
        for suffix, each in looks.items()
    }
    state = jax.device_put(network.state, sharding.replicated(mesh))
    return Evaluation(
        data=config.data.name,
        split=split,
        images=opened.size,
        results=evaluate(measures_of(programs, state, split), opened.batches),
    )


def _other_classes(name: str, found: tuple[str, ...], network: Network) -> str:
    wanted = network.class_names
    if len(found) != len(wanted):
        difference = f"it has {len(found)} and the network {len(wanted)}"
    else:
        first = int(np.argmax([one != other for one, other in zip(found, wanted, strict=True)]))
        difference = f"number {first} is {found[first]!r} there and {wanted[first]!r} here"
    return f"{name} has other classes than the network: {difference}; name a set with the same."
