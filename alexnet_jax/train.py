"""A run from its config to its results: load, restore, train, evaluate, report."""

import logging
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from alexnet_jax import evaluation
from alexnet_jax.checkpoint import initialize_from
from alexnet_jax.checkpoint.manager import Checkpoints
from alexnet_jax.config import Config, validate
from alexnet_jax.data.load import RunData, load_data
from alexnet_jax.distributed import collectives, sharding, watchdog
from alexnet_jax.distributed.preemption import stop_requests
from alexnet_jax.environment import package_versions
from alexnet_jax.errors import Interrupted
from alexnet_jax.experiments.report import finish, inputs
from alexnet_jax.hooks import (
    Hook,
    LogMetrics,
    Save,
    StepInfo,
    Validate,
    call_hooks,
    restore_hook_states,
)
from alexnet_jax.models import Description, describe
from alexnet_jax.optim.muon import muon_share
from alexnet_jax.run.directory import RunDirectory
from alexnet_jax.run.writers import MetricWriter
from alexnet_jax.state import TrainState
from alexnet_jax.steps import order_key
from alexnet_jax.trainer import Trainer, restore_or_init

log = logging.getLogger(__name__)


def run(
    config: ConfigDict,
    workdir: str | Path,
    *,
    hooks: Sequence[Hook] = (),
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Trains the network of a config, or resumes where it stopped, and evaluates it at the end.

    With many processes (see `distributed.initialize`) all of them call this alike and get the same
    results, but for each one's own time and hardware; the first alone writes files.

    Args:
        config: As `alexnet_jax.config.default_config` makes it.
        workdir: The run folder; see `alexnet_jax.run.directory`.
        hooks: Called between the steps; see `alexnet_jax.hooks`.
        notes: Sentences for the log, on how the program was set up.

    Returns:
        What ``results.json`` holds: for "validation", "test" and their like, where evaluated, a
        dictionary of loss, accuracy and confusion matrix; beside them the step, the epochs, the
        seconds of training, the number of parameters, FLOPs, seeds, hardware and versions.

    Raises:
        InputError: Something given cannot be used.
        Diverged: The loss, or what is to be saved, is no longer finite.
        SaveFailed: The end of the run could not be saved.
        Interrupted: SIGINT or SIGTERM came, and the run has been saved.
    """
    mesh = sharding.make_mesh()
    checked = _check(config, mesh)
    with RunDirectory.open(workdir, checked) as folder:
        for note in notes:
            log.info("%s", note)
        if folder.results is None:
            folder.write_results(_train(checked, folder, mesh, hooks))
        else:
            log.info("This run is finished; nothing is left to do.")
        results = folder.results
        assert results is not None
        folder.write(finish.make_report)
        folder.write(finish.log_results, results)
        return results


@collectives.fail_together()
def _check(config: ConfigDict, mesh: Mesh) -> Config:
    checked = validate(config)
    sharding.check_batch_size(checked.train.batch_size, mesh.size)
    return checked


def _train(
    config: Config, folder: RunDirectory, mesh: Mesh, user_hooks: Sequence[Hook]
) -> dict[str, Any]:
    data = load_data(config, mesh)
    source = initialize_from.read_initial_weights(config, folder.path)
    data = data._replace(info=data.info | source.info)
    folder.check_dataset(data.info)
    trainer = Trainer.create(config, data, mesh)
    with ExitStack() as stack:
        checkpoints = stack.enter_context(closing(Checkpoints(folder.checkpoints)))
        stack.enter_context(watchdog.exit_on_error())  # closing would wait for other processes
        state, progress = restore_or_init(trainer, checkpoints, data, source)
        restore_hook_states(user_hooks, progress.get("hooks", {}))
        network = _describe(config, trainer, data, state, folder, mesh)
        writer = MetricWriter(
            folder.path,
            step=state.steps_taken,
            total_steps=config.train.epochs * data.steps_per_epoch,
            steps_per_epoch=data.steps_per_epoch,
            seconds_before=progress["train_seconds"],
            tensorboard=config.writers.tensorboard,
        )
        stack.enter_context(writer)
        log_metrics = LogMetrics(trainer, writer, config.train.batch_size)
        save = Save(checkpoints, trainer, writer, user_hooks, config.checkpoint.every_seconds, mesh)
        evaluate = Validate(trainer, data, writer)
        before: list[Hook] = [save.poll, log_metrics, save.decide, log_metrics.flush_before_save]
        hooks: list[Hook] = [*before, evaluate, *user_hooks, save.save]
        key, step = order_key(state.key), state.steps_taken
        with stop_requests() as save.stop_requested, data.train.feeds(key, step) as feeds:
            for step, feed in feeds if not progress.get("stopped") else ():
                state, metrics = trainer.step(state, feed)
                info = StepInfo(step, feed.num_steps, data.steps_per_epoch, state, metrics)
                call_hooks(hooks, info)
                state = info.state
                if info.stop or info.preempted:
                    break
            preempted = save.finish()
        log_metrics.flush()
        results = {"flops": network.flops, "best_step": checkpoints.best_step}
        if not preempted:
            results |= _evaluate(config, trainer, data, state, writer, folder, mesh)
    folder.write(finish.plot_curves)
    if preempted:
        raise Interrupted(state.steps_taken)
    return results


def _describe(
    config: Config,
    trainer: Trainer,
    data: RunData,
    state: TrainState,
    folder: RunDirectory,
    mesh: Mesh,
) -> Description:
    """Logs and writes down what is trained, on what."""
    variables = trainer.variables_of_one(state)
    network = describe(trainer.model, trainer.image_shape, variables)
    hardware, processes = sharding.hardware(mesh), jax.process_count()
    folder.write(inputs.write_environment, str(network), hardware, processes)
    log.info("%s", network)
    if share := muon_share(config.optimizer, variables["params"]):
        log.info("%s", share)
    log.info(
        "Training on %s images, %s steps of %d an epoch, %d epochs, on %s%s.",
        f"{data.train_size:,}",
        f"{data.steps_per_epoch:,}",
        config.train.batch_size,
        config.train.epochs,
        hardware,
        f" in {processes} processes" if processes > 1 else "",
    )
    return network


def _evaluate(
    config: Config,
    trainer: Trainer,
    data: RunData,
    state: TrainState,
    writer: MetricWriter,
    folder: RunDirectory,
    mesh: Mesh,
) -> dict[str, Any]:
    """Evaluates the trained network; returns the results, and writes what the report needs."""
    results: dict[str, Any] = {
        "step": state.steps_taken,
        "epochs": config.train.epochs,
        "train_seconds": round(writer.seconds, 3),
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)) // config.num_seeds,
        "seeds": list(trainer.seeds),
        "devices": sharding.hardware(mesh),
        "versions": package_versions(("jax", "flax", "optax", "numpy")),
    }
    predictions = inputs.Predictions()
    evaluated = evaluation.evaluate_at_end(trainer, state, data, predictions.add)
    for split, values in evaluated.items():
        if split.startswith("test") or "_tta" in split:  # the others are written already
            scalars = {name: value for name, value in values.items() if name != "confusion"}
            writer.write_eval(results["step"], split, scalars)
    folder.write(
        inputs.write_inputs,
        predictions,
        samples=data.examples(inputs.SAMPLES),
        augment=trainer.augment,
        variables=evaluation.state_to_report(trainer, state).variables,
        seed=config.seed,
    )
    return results | evaluated
