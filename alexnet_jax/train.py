"""A run from its config to its results: build, resume, loop, evaluate, save, report."""

import functools
import importlib.metadata
import logging
import math
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from alexnet_jax import ops, steps
from alexnet_jax.checkpoint import checksums, initialize_from
from alexnet_jax.checkpoint.manager import Checkpoints
from alexnet_jax.config import input_size, validate
from alexnet_jax.data import augment, sampling, streaming
from alexnet_jax.data.load import RunData, load_data
from alexnet_jax.data.tta import Views, create_views
from alexnet_jax.distributed import collectives, replicas, sharding, watchdog
from alexnet_jax.distributed.preemption import stop_requests
from alexnet_jax.errors import Diverged, InputError, Interrupted, SaveFailed
from alexnet_jax.evaluation import evaluate, measures_of
from alexnet_jax.experiments import report
from alexnet_jax.experiments.report import inputs
from alexnet_jax.metrics import EvalMetrics, TrainMetrics
from alexnet_jax.models import create_model, describe, measure_fixed
from alexnet_jax.optim.optimizers import (
    after_validation,
    create_optimizer,
    create_schedule,
    muon_share,
    plateau_factor,
)
from alexnet_jax.run import directory, writers
from alexnet_jax.state import TrainState, create_state, find_not_finite

log = logging.getLogger(__name__)

# Enough to hide the cost of a dispatch from an accelerator's steps, which take milliseconds; a
# CPU's take long enough to need one each, and would be compiled one after the other.
ACCELERATOR_STEPS_PER_DISPATCH = 32


class Programs(NamedTuple):
    """The compiled functions of a run."""

    create: Callable[..., TrainState]  # not compiled: also evaluated for its shapes alone
    fixed: Callable[[], dict[str, Any]]  # what `create` takes that is measured on the images
    advance: Callable[[int], Callable[..., tuple[TrainState, TrainMetrics]]]  # by number of steps
    measure: dict[
        str, Callable[[TrainState, sampling.Batch], EvalMetrics]
    ]  # by suffix of the split
    judge: Callable[[TrainState, sampling.Batch], tuple[EvalMetrics, dict[str, jax.Array]]]
    validated: Callable[[TrainState, np.ndarray], TrainState]  # by the validation accuracy
    placement: NamedSharding  # of the state


def train_and_evaluate(
    config: ConfigDict, workdir: str | Path, notes: Sequence[str] = ()
) -> dict[str, Any]:
    """Trains the network of a config, or goes on where it stopped, and measures it at the end.

    With many processes (see `initialize.initialized`) all of them call this alike and get the same
    results, but for each one's own time and hardware; the first alone writes files.

    Args:
        config: As `alexnet_jax.config.default_config` makes it.
        workdir: The run folder; see `alexnet_jax.run.directory`.
        notes: Sentences for the log, on how the program was set up.

    Returns:
        What ``results.json`` holds: for "validation", "test" and their like, where measured, a
        dictionary of loss, accuracy and confusion matrix; beside them the step, the epochs, the
        seconds of training, the number of parameters, FLOPs, seeds, hardware and versions.

    Raises:
        InputError: Something given cannot be used.
        Diverged: The loss, or what is to be saved, is no longer finite.
        SaveFailed: The end of the run could not be saved.
        Interrupted: SIGINT or SIGTERM came, and the run has been saved.
    """
    mesh = sharding.make_mesh()
    first = jax.process_index() == 0
    with ExitStack() as closing_all:
        with collectives.fail_together():
            validate(config)
            sharding.check_batch_size(config.train.batch_size, mesh.size)
            folder = (
                closing_all.enter_context(directory.open_run_folder(Path(workdir), config))
                if first
                else Path(workdir).expanduser().absolute()
            )
        collectives.check_equal(directory.fixed_options(config), "the config")
        with collectives.fail_together():
            directory.check_shared(folder)
            results = directory.read_json(folder / directory.RESULTS)
        if first:
            closing_all.enter_context(writers.log_to_file(folder / "log.txt"))
        for note in notes:
            log.info("%s", note)
        if results is None:
            results = _train(config, folder, mesh)
        else:
            log.info("This run is finished; nothing is left to do.")
        with collectives.fail_together():
            if first:
                _make_report(folder)
        if first:
            _tell_results(results, folder)
        return results


def _train(config: ConfigDict, folder: Path, mesh: Mesh) -> dict[str, Any]:
    first = jax.process_index() == 0
    with collectives.fail_together():
        data = load_data(config, mesh)
        start = initialize_from.open_start(config, folder)
        data = data._replace(info=data.info | start.info)
        if first:
            directory.check_dataset(folder, data.info)
    collectives.check_equal(data.info, "the data set")
    # By the memory of each, unless config.data.in_memory says so; the programs would not meet.
    collectives.check_equal(data.in_memory, "which of the images fit into the memory")
    steps_per_epoch = data.steps_per_epoch

    platform = mesh.devices.flat[0].platform
    chosen = ops.choose(config.cpu_kernels, platform, config.model.dtype, devices=mesh.size)
    model = create_model(config.model, num_classes=len(data.info["class_names"]), ops=chosen)
    schedule = create_schedule(config.optimizer, steps_per_epoch, config.train.epochs)
    programs = _build(config, model, schedule, data, mesh)
    with ExitStack() as closing_all:
        checkpoints = closing_all.enter_context(
            closing(Checkpoints(folder / directory.CHECKPOINTS))
        )
        closing_all.enter_context(watchdog.exit_on_error())  # not even by closing
        with collectives.fail_together():
            state, progress = _restore_or_create(config, checkpoints, programs, start, mesh)
        collectives.check_equal(state.steps_taken, "the newest readable checkpoint")
        if "whitening" in state.model_state:  # measured by each process for itself
            measured = checksums.fingerprints(state.model_state["whitening"])
            collectives.check_equal(measured, "the whitening of the images")
        shapes = _shapes_of_one(config, state).variables
        description = describe(model, _input_shape(config), shapes)
        log.info("%s", description)
        if share := muon_share(config.optimizer, shapes["params"]):
            log.info("%s", share)
        with collectives.fail_together():
            if first:
                inputs.write_environment(
                    folder, str(description), sharding.hardware(mesh), jax.process_count()
                )
        log.info(
            "Training on %s images, %s steps of %d an epoch, %d epochs, on %d %s%s.",
            f"{data.train_size:,}",
            f"{steps_per_epoch:,}",
            config.train.batch_size,
            config.train.epochs,
            mesh.size,
            f"{mesh.devices.flat[0].device_kind} device{'s' * (mesh.size > 1)}",
            f" of {jax.process_count()} processes" if jax.process_count() > 1 else "",
        )
        writer = writers.MetricWriter(
            folder,
            step=state.steps_taken,
            total_steps=config.train.epochs * steps_per_epoch,
            steps_per_epoch=steps_per_epoch,
            seconds_before=progress["train_seconds"],
            tensorboard=config.writers.tensorboard,
        )
        closing_all.enter_context(writer)
        stopped, state = _loop(config, data, programs, schedule, state, checkpoints, writer, mesh)
        if not stopped:
            results, answers = _measure_at_the_end(config, data, programs, state, writer, mesh)
            results["flops"] = description.flops
            results["best_step"] = checkpoints.best_step
            with collectives.fail_together():
                if first:
                    inputs.write_inputs(
                        folder,
                        answers,
                        samples=data.examples(inputs.SAMPLES),
                        augment=_changed_as_in_training(config, data),
                        variables=_reported(state, config.num_seeds).variables,
                        seed=config.seed,
                    )
    # All is written now, also by the threads and the process that write behind the run's back.
    with collectives.fail_together():
        if first:
            from alexnet_jax.experiments.report.page import plot_curves  # 0.5 s of Matplotlib

            records = writers.read_metrics(folder / directory.METRICS)
            title = f"{config.model.name} on {config.data.name}: {folder.name}"
            plot_curves(records, folder / "curves.png", title)
            if not stopped:
                # One of these results does not exist yet, whatever an earlier end has left.
                (folder / directory.REPORT).unlink(missing_ok=True)
                directory.write_json(folder / directory.RESULTS, results)
    if stopped:
        raise Interrupted(state.steps_taken)
    return results


def _input_shape(config: ConfigDict) -> tuple[int, int, int]:
    return (input_size(config.data), input_size(config.data), 3)


def _build(
    config: ConfigDict, model: nn.Module, schedule: optax.Schedule, data: RunData, mesh: Mesh
) -> Programs:
    """Ties the pure functions of `steps` and `state` to this run's options and devices."""
    optimizer = create_optimizer(
        config.optimizer, schedule, steps=config.train.epochs * data.steps_per_epoch
    )
    crop_size = config.data.crop_size
    normalize = augment.create_normalize(data.info["mean"], data.info["deviation"], crop_size)
    one_step = functools.partial(
        steps.train_step,
        model=model,
        optimizer=optimizer,
        normalize=normalize,
        augment=_augment(config, data),
        alternate_every=data.steps_per_epoch if config.augment.alternating_flip else 0,
        label_smoothing=config.train.label_smoothing,
        ema_decay=config.train.ema_decay,
    )

    count, in_turn = config.num_seeds, sharding.on_cpu(mesh)
    if count > 1:
        log.info(
            "%d seeds from %d on, %s.", count, config.seed, "in turn" if in_turn else "all at once"
        )
    streams = isinstance(data.train, streaming.StreamedDataset)
    if count > 1 and streams:
        raise InputError(
            f"config.num_seeds is {count}, and the images are streamed, in one order; many seeds "
            "need them on the devices (config.data.in_memory), or a run each."
        )
    if streams:
        compiled = sharding.jit_update(one_step, mesh)

    @functools.cache
    def advance(num_steps: int) -> Callable[..., tuple[TrainState, TrainMetrics]]:
        if streams:
            return functools.partial(streaming.advance, step_fn=compiled, num_steps=num_steps)
        whole = count > 1 and replicas.spread(count, mesh)  # a batch on one device
        several = functools.partial(
            steps.train_steps,
            step_fn=one_step,
            num_steps=num_steps,
            batch_size=config.train.batch_size,
            constrain=(lambda batch: batch) if whole else sharding.split_batch(mesh),
            unroll=sharding.on_cpu(mesh),
        )
        if count > 1:
            return replicas.compile_update(several, count, mesh, in_turn=in_turn)
        return sharding.jit_update(several, mesh)

    def measure(views: Views | None) -> Callable[[TrainState, sampling.Batch], EvalMetrics]:
        step = functools.partial(steps.eval_step, model=model, normalize=normalize, views=views)
        if count > 1:
            return replicas.compile_reading(step, count, mesh, in_turn=in_turn)
        return sharding.jit_eval(step, mesh)

    placement = replicas.state_sharding(count, mesh) if count > 1 else sharding.replicated(mesh)

    def create(
        fixed: Mapping[str, Any] | None = None, begin: Mapping[str, Any] | None = None
    ) -> TrainState:
        create_one = functools.partial(
            create_state,
            model,
            optimizer,
            _input_shape(config),
            ema=config.train.ema_decay > 0,
            fixed=fixed,
            begin=begin,
        )
        if count > 1:
            return replicas.create(create_one, replicas.seeds(config.seed, count))
        return create_one(config.seed)

    measures = {"": measure(None)}
    if views := create_views(config):
        measures["_tta"] = measure(views)
    return Programs(
        create=create,
        fixed=functools.partial(
            measure_fixed, model, data.examples, data.info["mean"], data.info["deviation"]
        ),
        advance=advance,
        measure=measures,
        judge=sharding.jit_eval(
            functools.partial(steps.judge_step, model=model, normalize=normalize), mesh
        ),
        validated=_compile_validated(config, placement),
        placement=placement,
    )


def _augment(config: ConfigDict, data: RunData) -> augment.Augment:
    colours = data.info.get("principal_colours", ())
    return augment.create_augment(config.augment, data.info["mean"], config.data.crop_size, colours)


def _changed_as_in_training(config: ConfigDict, data: RunData) -> augment.Augment:
    """Returns all that training does to images, for pictures of it."""
    change = _augment(config, data)
    if not config.augment.alternating_flip:
        return change
    # As in the first epoch; from one key to the next it mirrors others.
    return lambda key, images: change(key, augment.alternating_flip(key, jnp.int32(0), images))


def _compile_validated(
    config: ConfigDict, placement: NamedSharding
) -> Callable[[TrainState, np.ndarray], TrainState]:
    """Returns what changes the state once the accuracy after an epoch, of each seed, is known."""

    def validated(state: TrainState, accuracy: jax.Array) -> TrainState:
        lowered = after_validation(state.opt_state, accuracy, config.optimizer)
        return state.replace(opt_state=lowered)

    if config.optimizer.schedule != "plateau":
        return lambda state, _: state
    function = jax.vmap(validated) if config.num_seeds > 1 else validated
    return jax.jit(function, donate_argnums=0, out_shardings=placement)


def _restore_or_create(
    config: ConfigDict,
    checkpoints: Checkpoints,
    programs: Programs,
    start: initialize_from.Start,
    mesh: Mesh,
) -> tuple[TrainState, dict[str, Any]]:
    # The shapes say all that a restore needs, so nothing is initialised in vain.
    blank = functools.cache(lambda: jax.eval_shape(programs.create))
    restored = checkpoints.restore(blank, programs.placement)
    if restored is None:
        create = functools.partial(programs.create, fixed=programs.fixed())
        begin = {}
        if start.variables:
            shapes = _shapes_of_one(config, blank()).variables
            # As an argument, since what a compiled function closes over becomes a part of it.
            begin = sharding.place(start.fitting(shapes), sharding.replicated(mesh))
        created = jax.jit(create, out_shardings=programs.placement)(begin=begin)
        return created, {"train_seconds": 0.0}
    log.info("Going on from step %s.", f"{restored[0].steps_taken:,}")
    return restored


def _shapes_of_one(config: ConfigDict, state: TrainState) -> TrainState:
    """Returns the shapes in the state of a single seed."""
    count = config.num_seeds
    shapes: TrainState = jax.eval_shape(lambda x: replicas.pick(x, 0) if count > 1 else x, state)
    return shapes


def _loop(
    config: ConfigDict,
    data: RunData,
    programs: Programs,
    schedule: optax.Schedule,
    state: TrainState,
    checkpoints: Checkpoints,
    writer: writers.MetricWriter,
    mesh: Mesh,
) -> tuple[bool, TrainState]:
    """Trains to the end or until asked to stop; returns whether it was, and the state, saved."""
    steps_per_epoch = data.steps_per_epoch
    total_steps = config.train.epochs * steps_per_epoch
    per_dispatch = config.train.steps_per_dispatch or (
        1 if sharding.on_cpu(mesh) else ACCELERATOR_STEPS_PER_DISPATCH
    )
    step = state.steps_taken
    if step < total_steps:
        log.info("Compiling the training step, which takes some seconds.")
    last_save = time.monotonic()
    pending: tuple[int, int, TrainMetrics] | None = None
    agree = collectives.AnyProcess(mesh)

    factor = plateau_factor(state.opt_state)  # constant within an epoch

    def rate_at(last: int) -> float:
        return factor * float(schedule((last - 1) // config.optimizer.accumulate_steps))

    def tell(last: int, count: int, metrics: TrainMetrics) -> None:
        """Waits for a dispatch that ended at step `last`, and writes what it measured."""
        measured = replicas.compute(metrics)
        figures = replicas.summary(measured)
        rate = rate_at(last)
        if not math.isfinite(figures["loss"]):
            whose = replicas.not_finite(measured["loss"], config.seed)
            raise _diverged(f"the loss{whose} is {figures['loss']}", last, rate)
        figures["learning_rate"] = rate
        writer.write_train(last, count * config.train.batch_size * config.num_seeds, figures)

    feeding = data.train.feed(steps.order_key(state.key), step)
    with stop_requests() as stop_requested, feeding as feed:
        stopping, begun = False, False
        while step < total_steps and not stopping:
            # Dispatches end at the same steps whether or not the run was interrupted.
            position = step % steps_per_epoch
            count = min(per_dispatch - position % per_dispatch, steps_per_epoch - position)
            state, metrics = programs.advance(count)(state, feed(step))
            step += count
            if not begun:
                checkpoints.open()  # while the device computes
            checkpoints.look()
            if pending:  # one dispatch late, so that the device always has work
                tell(*pending)
            pending = (step, count, metrics)
            if not begun:  # the first at once: somebody waits for a sign of life
                tell(*pending)
                pending, begun = None, True

            epoch_ends = step % steps_per_epoch == 0
            every = config.checkpoint.every_seconds
            save_is_due = bool(every) and time.monotonic() - last_save >= every
            stopping, save_is_due = agree(stop_requested(), save_is_due)
            if epoch_ends or save_is_due or stopping:
                if pending:
                    tell(*pending)
                    pending = None
                # A loss is of the parameters before its step: those after may be worse.
                if broken := find_not_finite(state):
                    whose = replicas.states_not_finite(state, config.seed)
                    raise _diverged(f"{broken}{whose} is not finite", step, rate_at(step))
                measured = _validate(data, programs, state, writer) if epoch_ends else {}
                accuracy = measured.get("accuracy")
                if accuracy is not None:
                    each = np.array(measured.get("accuracy_each", accuracy), np.float32)
                    state = programs.validated(state, each)
                    factor = plateau_factor(state.opt_state)
                checkpoints.save(state, {"train_seconds": writer.seconds}, accuracy)
                last_save = time.monotonic()
                agree.forget()
        with collectives.fail_together():
            checkpoints.finish()  # while signals are still ours: the save is what they ask for
        if not stopping:  # for what was asked during the last step, or its validation
            agree(stop_requested(), False)
            stopping, _ = agree(stop_requested(), False)
    return stopping, state


def _diverged(what: str, step: int, rate: float) -> Diverged:
    return Diverged(
        f"{what} at step {step:,}, with a learning rate of {rate:.3g}; the last checkpoint before "
        "is kept. Lower config.optimizer.learning_rate, or set config.optimizer.clip_norm, with "
        "another --workdir."
    )


def _validate(
    data: RunData, programs: Programs, state: TrainState, writer: writers.MetricWriter
) -> dict[str, Any]:
    """Measures the network on the validation images; returns the figures to judge it by."""
    if not data.validation:
        return {}
    step = state.steps_taken
    measures = measures_of({"": programs.measure[""]}, state, "validation")
    results = evaluate(measures, data.validation)
    for split, result in results.items():
        figures = replicas.summary({name: result[name] for name in ("loss", "accuracy")})
        writer.write_eval(step, split, figures)
        log.info(
            "step %s, %s: loss %.4f, accuracy %s; %s left",
            f"{step:,}",
            split,
            figures["loss"],
            replicas.show_accuracy(figures),
            writers.duration(writer.progress.seconds_left(step)),
        )
    return figures  # of the averaged weights, where they are kept


def _measure_at_the_end(
    config: ConfigDict,
    data: RunData,
    programs: Programs,
    state: TrainState,
    writer: writers.MetricWriter,
    mesh: Mesh,
) -> tuple[dict[str, Any], inputs.Predictions]:
    """Measures the finished network on the validation and test images; returns the results.

    With them come the answers for the test images, of the averaged weights where they are kept; of
    a run that is not to see the test set, those for the validation images.
    """
    results: dict[str, Any] = {
        "step": state.steps_taken,
        "epochs": config.train.epochs,
        "train_seconds": round(writer.seconds, 3),
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)) // config.num_seeds,
        "seeds": replicas.seeds(config.seed, config.num_seeds).tolist(),
        "devices": sharding.hardware(mesh),
        "versions": {
            name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "numpy")
        },
    }
    answers = inputs.Predictions()
    last = "test" if data.read_test else "validation"
    tested = measures_of(programs.measure, state, last)
    judged = f"{last}_ema" if state.ema else last
    measure, network = tested[judged], _reported(state, config.num_seeds)

    def judge(batch: sampling.Batch) -> EvalMetrics:
        metrics, judgement = programs.judge(network, batch)
        answers.add(judgement)
        return metrics if config.num_seeds == 1 else measure(batch)

    tested[judged] = judge
    if data.read_test:
        log.info("Reading the test set, for the first and only time.")
        measured = evaluate(measures_of(programs.measure, state, "validation"), data.validation)
        measured |= evaluate(tested, data.read_test())
    else:
        measured = evaluate(tested, data.validation)
    for name, result in measured.items():
        figures = replicas.summary({key: result[key] for key in ("loss", "accuracy")})
        confusion = np.asarray(result["confusion"])  # of all replicas together
        confusion = confusion.reshape(-1, *confusion.shape[-2:]).sum(0)
        results[name] = figures | {"confusion": confusion.tolist()}
        if name.startswith("test") or "_tta" in name:  # the others stand there already
            writer.write_eval(results["step"], name, figures)
    return results, answers


def _reported(state: TrainState, num_seeds: int) -> TrainState:
    """Returns what the report looks at: the averaged weights, where they are kept; of many, one."""
    state = state.averaged().replace(ema={}, opt_state=())
    return replicas.pick(state, 0) if num_seeds > 1 else state


def _make_report(folder: Path) -> None:
    """Makes the report of a finished run that has none; the results are safe whatever happens."""
    if (folder / directory.REPORT).exists():
        return
    log.info("Making the report.")
    try:
        from alexnet_jax.experiments.report.page import write_report

        write_report(folder)
    except (InputError, SaveFailed):
        raise
    except Exception as error:
        log.warning(
            "The report could not be made (%s: %s); the results are safe, and "
            "`alexnet-jax report %s` tries again.",
            type(error).__name__,
            error,
            shlex.quote(str(folder)),
        )


def _tell_results(results: dict[str, Any], folder: Path) -> None:
    """Tells how good the network is, on what, and where everything lies."""
    names = directory.read_dataset(folder)["class_names"]
    tested = report.reported_split(results)
    table = report.class_table(np.array(results[tested]["confusion"]), tuple(names))
    which = "Test" if tested.startswith("test") else "Validation"
    log.info("\n%s set, class by class:\n%s\n", which, table)
    for split in directory.SPLITS:
        if split in results:
            log.info(
                "%-18s loss %.4f  accuracy %s",
                split,
                results[split]["loss"],
                replicas.show_accuracy(results[split]),
            )
    log.info(
        "\n%s steps, %d epochs, %s of training. Everything lies in %s:\n"
        "  report.html (open it in a browser), figures/, results.json, metrics.jsonl, checkpoints/",
        f"{results['step']:,}",
        results["epochs"],
        writers.duration(results["train_seconds"]),
        folder,
    )
