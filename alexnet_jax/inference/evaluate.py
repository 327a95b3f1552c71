"""Evaluates the network of a run on any split, as its training run does."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from alexnet_jax import ops, steps
from alexnet_jax.data.load import load_split
from alexnet_jax.data.options import DataConfig
from alexnet_jax.data.tta import create_tta
from alexnet_jax.distributed import sharding
from alexnet_jax.errors import InputError, show
from alexnet_jax.evaluation import by_name, evaluate
from alexnet_jax.inference.predictor import Network


class Evaluation(NamedTuple):
    """How good a network is on a split.

    Attributes:
        data: Name of the data set.
        split: What was asked for.
        images: How many it has.
        results: As `evaluation.evaluate` returns them: by the split's name for the weights of the
            last step, and by the same with "_ema" for their average, where the run keeps it; with
            "_tta" before that, with test-time augmentation.
    """

    data: str
    split: str
    images: int
    results: dict[str, dict[str, Any]]


def evaluate_network(
    network: Network,
    split: str = "test",
    data: DataConfig | None = None,
    tta: str | None = None,
) -> Evaluation:
    """Evaluates a network as its training run does; on the same split it gets the same numbers.

    Args:
        network: Of `alexnet_jax.load`; its averaged weights and the others are both evaluated.
        split: "test", "train" or "validation" as the run has them, or a TFDS split, "test[:50%]".
        data: Another prepared set; None takes the run's own.
        tta: Test-time augmentation, as `config.eval.tta`; None takes the run's own.

    Raises:
        InputError: There is no such test-time augmentation, the data is not available, has images
            of another size than the network's, or other classes, or the run's own data has changed
            since it began.
    """
    config = network.config
    if data is not None:
        for name in ("image_size", "crop_size", "normalization"):
            given, trained = getattr(data, name), getattr(config.data, name)
            if given != trained:
                raise InputError(
                    f"config.data.{name} is {show(given)}; the network was trained with "
                    f"{show(trained)}, and takes no other."
                )
        config = dataclasses.replace(config, data=data)
    if tta is not None:
        config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, tta=tta))  # type: ignore[arg-type]
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
    platform, dtype = mesh.devices.flat[0].platform, config.model.fields["dtype"]
    kernels = ops.choose(config.cpu_kernels, platform, dtype, devices=mesh.size)
    eval_step = functools.partial(
        steps.eval_step, model=network.module.clone(ops=kernels), normalize=network.normalize
    )
    evals = {"": sharding.jit_eval(eval_step, mesh)}
    if several := create_tta(config.eval.tta, config.augment, config.data.crop_size):
        evals["_tta"] = sharding.jit_eval(functools.partial(eval_step, tta=several), mesh)
    state = jax.device_put(network.state, sharding.replicated(mesh))
    return Evaluation(
        data=config.data.name,
        split=split,
        images=opened.size,
        results=evaluate(by_name(evals, state, split), opened.batches),
    )


def _other_classes(name: str, found: tuple[str, ...], network: Network) -> str:
    wanted = network.class_names
    if len(found) != len(wanted):
        difference = f"it has {len(found)} and the network {len(wanted)}"
    else:
        first = int(np.argmax([one != other for one, other in zip(found, wanted, strict=True)]))
        difference = f"number {first} is {found[first]!r} there and {wanted[first]!r} here"
    return f"{name} has other classes than the network: {difference}; name a set with the same."
