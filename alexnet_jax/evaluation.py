"""How good a network is: evaluated on every image of a split, each once."""

import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from alexnet_jax.data.load import RunData
from alexnet_jax.data.sampling import Batch
from alexnet_jax.metrics import EvalMetrics, compute, summarize
from alexnet_jax.state import TrainState
from alexnet_jax.trainer import Trainer

log = logging.getLogger(__name__)

Evaluate = Callable[[Batch], EvalMetrics]

SCALARS = ("loss", "accuracy")  # of EvalMetrics, in metrics.jsonl and results.json


def evaluate(
    functions: Mapping[str, Evaluate], batches: Iterable[Batch]
) -> dict[str, dict[str, Any]]:
    """Evaluates networks on every image, which is read once for all of them.

    Returns:
        By the names of the functions: mean `loss` and `accuracy` over the images, and `confusion`
        int32[classes, classes]; of R replicas with a first dimension R. {} without batches.
    """
    totals: dict[str, EvalMetrics] = {}
    for batch in batches:
        before = dict(totals)
        for name, function in functions.items():
            metrics = function(batch)
            totals[name] = before[name].merge(metrics) if before else metrics
        jax.block_until_ready(before)  # else batches that are read fast pile up on the device
    return {name: compute(total) for name, total in totals.items()}


def by_name(
    evals: Mapping[str, Callable[[TrainState, Batch], EvalMetrics]], state: TrainState, split: str
) -> dict[str, Evaluate]:
    """Names what is evaluated on a split: the weights, and their average if it is kept.

    `evals` are those of `Trainer.eval`.
    """
    versions = {"": state} | ({"_ema": state.averaged()} if state.ema else {})
    return {
        f"{split}{suffix}{version}": functools.partial(function, weights)
        for suffix, function in evals.items()
        for version, weights in versions.items()
    }


def validate(trainer: Trainer, state: TrainState, data: RunData) -> dict[str, dict[str, Any]]:
    """Evaluates on the validation images, without test-time augmentation.

    Returns:
        What `metrics.summarize` makes of loss and accuracy, by name of the split; the last is of
        the averaged weights, where they are kept.
    """
    functions = by_name({"": trainer.eval[""]}, state, "validation")
    results = evaluate(functions, data.validation)
    return {name: summarize(_scalars(result)) for name, result in results.items()}


def evaluate_at_end(
    trainer: Trainer,
    state: TrainState,
    data: RunData,
    keep_predictions: Callable[[Mapping[str, Any]], None],
) -> dict[str, dict[str, Any]]:
    """Evaluates the trained network on the validation and the test images.

    `keep_predictions` is called with what `steps.eval_step_with_predictions` keeps of each batch of
    the test set, or of the validation images where the run has no test set; of the averaged weights
    where they are kept, and of the first seed.

    Returns:
        By name of the split, what `metrics.summarize` makes of loss and accuracy, and the confusion
        matrix of all seeds together.
    """
    last = "test" if data.test else "validation"
    functions = by_name(trainer.eval, state, last)
    judged = f"{last}_ema" if state.ema else last
    evaluate_all, network = functions[judged], state_to_report(trainer, state)

    def evaluate_and_keep(batch: Batch) -> EvalMetrics:
        metrics, predictions = trainer.predict(network, batch)
        keep_predictions(predictions)
        return metrics if len(trainer.seeds) == 1 else evaluate_all(batch)

    functions[judged] = evaluate_and_keep
    if data.test:
        log.info("Evaluating on the test set.")
        results = evaluate(by_name(trainer.eval, state, "validation"), data.validation)
        results |= evaluate(functions, data.test())
    else:
        results = evaluate(functions, data.validation)
    return {
        name: summarize(_scalars(result)) | {"confusion": _total_confusion(result)}
        for name, result in results.items()
    }


def state_to_report(trainer: Trainer, state: TrainState) -> TrainState:
    """Returns the averaged weights, where they are kept, of the first seed."""
    return trainer.pick(state.averaged().replace(ema={}, opt_state=()), 0)


def _scalars(result: dict[str, Any]) -> dict[str, Any]:
    return {name: result[name] for name in SCALARS}


def _total_confusion(result: dict[str, Any]) -> list[list[int]]:
    confusion = np.asarray(result["confusion"])
    total: list[list[int]] = confusion.reshape(-1, *confusion.shape[-2:]).sum(0).tolist()
    return total
