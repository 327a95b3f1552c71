"""A run from its config to its results: build, resume, loop, evaluate, save, report."""

import functools
import importlib.metadata
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from alexnet_jax import parallel, report, run_folder, steps, writers
from alexnet_jax.checkpoint import Checkpoints
from alexnet_jax.config import validate
from alexnet_jax.data import augment, batches
from alexnet_jax.data.sources import Source, load_source
from alexnet_jax.errors import Diverged, InputError, Interrupted
from alexnet_jax.metrics import EvalMetrics
from alexnet_jax.models import create_model, describe
from alexnet_jax.optimizers import create_optimizer, create_schedule
from alexnet_jax.state import TrainState, create_state

log = logging.getLogger(__name__)

# Enough to hide the cost of a dispatch from an accelerator's steps, which take milliseconds; a
# CPU's take long enough to need one each, and would be compiled one after the other.
ACCELERATOR_STEPS_PER_DISPATCH = 32


class Data(NamedTuple):
    """The images of a run: resident on the devices, except the test set, which is not yet read."""

    train: batches.Dataset
    train_size: int
    validation: list[batches.Batch]
    test: Source
    info: dict[str, Any]  # what dataset.json holds


def train_and_evaluate(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Trains the network of a config, or goes on where it stopped, and measures it at the end.

    Args:
        config: As `alexnet_jax.config.default_config` makes it.
        workdir: The run folder; see `alexnet_jax.run_folder`.

    Returns:
        What ``results.json`` holds: loss, accuracy, and confusion matrix of validation and test.

    Raises:
        InputError: Something given cannot be used.
        Diverged: The loss is no longer finite.
        Interrupted: SIGINT or SIGTERM came, and the run has been saved.
    """
    validate(config)
    mesh = parallel.make_mesh()
    parallel.check_batch_size(config.train.batch_size, mesh.size)
    folder = run_folder.open_run_folder(Path(workdir), config)
    handler = writers.log_to_file(folder / "log.txt")
    try:
        results = run_folder.read_json(folder / run_folder.RESULTS)
        if results is None:
            results = _train(config, folder, mesh)
        else:
            log.info("This run is finished; nothing is left to do.")
        _tell_results(results, folder)
        return results
    finally:
        logging.getLogger("alexnet_jax").removeHandler(handler)
        handler.close()


def _train(config: ConfigDict, folder: Path, mesh: Mesh) -> dict[str, Any]:
    data = _load_data(config, mesh)
    run_folder.write_json(folder / run_folder.DATASET, data.info)
    batch_size, epochs = config.train.batch_size, config.train.epochs
    steps_per_epoch = data.train_size // batch_size
    total_steps = epochs * steps_per_epoch

    model = create_model(config.model, num_classes=len(data.info["class_names"]))
    schedule = create_schedule(config.optimizer, steps_per_epoch, epochs)
    optimizer = create_optimizer(config.optimizer, schedule)
    image_shape = tuple(data.info["image_shape"])
    create = functools.partial(
        create_state, model, optimizer, image_shape, config.seed, ema=config.train.ema_decay > 0
    )
    normalize = augment.create_normalize(data.info["mean"], data.info["deviation"])
    one_step = functools.partial(
        steps.train_step,
        model=model,
        optimizer=optimizer,
        normalize=normalize,
        augment=augment.create_augment(config.augment),
        label_smoothing=config.train.label_smoothing,
        ema_decay=config.train.ema_decay,
    )
    on_cpu = mesh.devices.flat[0].platform == "cpu"

    @functools.cache
    def compiled_steps(count: int) -> Callable[..., Any]:
        several = functools.partial(
            steps.train_steps,
            step_fn=one_step,
            num_steps=count,
            batch_size=batch_size,
            constrain=parallel.split_batch(mesh),
            unroll=on_cpu,
        )
        return parallel.compile_update(several, mesh)

    measure = parallel.compile_reading(
        functools.partial(steps.eval_step, model=model, normalize=normalize), mesh
    )

    log.info("%s", describe(model, image_shape))
    checkpoints = Checkpoints(folder / "checkpoints")
    # Without building it: the shapes say all that a restore needs.
    restored = checkpoints.restore(jax.eval_shape(create), parallel.replicated(mesh))
    if restored is None:
        state = jax.jit(create, out_shardings=parallel.replicated(mesh))()
        progress = {"train_seconds": 0.0}
    else:
        state, progress = restored
    step = int(state.step)
    if step:
        log.info("Going on from step %s of %s.", f"{step:,}", f"{total_steps:,}")
    log.info(
        "Training on %s images, %s steps of %d an epoch, %d epochs, on %d %s.",
        f"{data.train_size:,}",
        f"{steps_per_epoch:,}",
        batch_size,
        epochs,
        mesh.size,
        f"{mesh.devices.flat[0].device_kind} device{'s' * (mesh.size > 1)}",
    )

    per_dispatch = config.train.steps_per_dispatch or (
        1 if on_cpu else ACCELERATOR_STEPS_PER_DISPATCH
    )
    metrics_file = writers.MetricsFile(folder / run_folder.METRICS, last_step=step)
    tensorboard = writers.TensorBoard(folder) if config.writers.tensorboard else None
    bar = writers.Progress(total_steps, step, batch_size)
    clock = _Clock(progress["train_seconds"])
    last_save = time.monotonic()

    def finish_dispatch(last: int, count: int, metrics: Any) -> None:
        """Waits for a dispatch that ended at step `last`, and tells of it."""
        figures = {name: float(value) for name, value in jax.device_get(metrics).compute().items()}
        rate = float(schedule((last - 1) // config.optimizer.accumulate_steps))
        if not math.isfinite(figures["loss"]):
            raise Diverged(
                f"the loss is {figures['loss']} at step {last:,}, with a learning rate of "
                f"{rate:.3g}; the last checkpoint before is kept. Lower "
                "config.optimizer.learning_rate, or set config.optimizer.clip_norm."
            )
        record = {
            "step": last,
            "epoch": last / steps_per_epoch,
            "split": "train",
            "images": count * batch_size,
            **figures,
            "learning_rate": rate,
            "images_per_second": count * batch_size / clock.lap(),
        }
        metrics_file.write(record)
        bar.update(record)

    def validation_round(state: TrainState, step: int) -> float | None:
        """Measures the network on the validation images; returns the accuracy to judge it by."""
        if not data.validation:
            return None
        accuracy = None
        for split, measured in _versions(state, "validation"):
            result = evaluate(measure, measured, data.validation)
            figures = {name: float(result[name]) for name in ("loss", "accuracy")}
            where = {"step": step, "epoch": step / steps_per_epoch, "split": split}
            metrics_file.write(where | figures)
            accuracy = figures["accuracy"]  # in the end that of the averaged weights, if kept
            log.info(
                "epoch %d of %d: %s loss %.4f, accuracy %.2f%%, %s left",
                step // steps_per_epoch,
                epochs,
                split.replace("_ema", " (averaged weights)"),
                figures["loss"],
                100 * accuracy,
                writers.duration(bar.seconds_left(step)),
            )
        return accuracy

    with _stop_requests() as stop_requested:
        pending: tuple[int, int, Any] | None = None
        while step < total_steps:
            # Dispatches end at the same steps whether or not the run was interrupted.
            position = step % steps_per_epoch
            count = min(per_dispatch - position % per_dispatch, steps_per_epoch - position)
            state, metrics = compiled_steps(count)(state, data.train)
            step += count
            if pending:  # one dispatch late, so that the device always has work
                finish_dispatch(*pending)
            pending = (step, count, metrics)

            epoch_ends = step % steps_per_epoch == 0
            every = config.checkpoint.every_seconds
            save_is_due = bool(every) and time.monotonic() - last_save >= every
            if epoch_ends or save_is_due or stop_requested():
                finish_dispatch(*pending)
                pending = None
                accuracy = validation_round(state, step) if epoch_ends else None
                checkpoints.save(state, {"train_seconds": clock.total()}, accuracy)
                last_save = time.monotonic()
                clock.lap()  # what was done here is not part of the next dispatch
            if stop_requested() and step < total_steps:
                break
    bar.close()
    checkpoints.wait()
    if step < total_steps:
        _close(checkpoints, metrics_file, tensorboard)
        _draw(folder, config)
        raise Interrupted(step)

    log.info("Reading the test set, for the first and only time.")
    results: dict[str, Any] = {
        "config": folder.name,
        "step": step,
        "epochs": epochs,
        "train_seconds": round(clock.total(), 3),
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "best_step": checkpoints.best_step,
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        "versions": {
            name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "numpy")
        },
    }
    test = _eval_batches(*data.test.read_all(), config.train.eval_batch_size, mesh)
    for split, batched in (("validation", data.validation), ("test", test)):
        for name, measured in _versions(state, split):
            if not batched:
                continue
            result = evaluate(measure, measured, batched)
            results[name] = {
                "loss": float(result["loss"]),
                "accuracy": float(result["accuracy"]),
                "confusion": np.asarray(result["confusion"]).tolist(),
            }
            if split == "test":
                figures = {key: results[name][key] for key in ("loss", "accuracy")}
                metrics_file.write({"step": step, "epoch": float(epochs), "split": name, **figures})
    _close(checkpoints, metrics_file, tensorboard)
    _draw(folder, config)
    run_folder.write_json(folder / run_folder.RESULTS, results)
    return results


def _load_data(config: ConfigDict, mesh: Mesh) -> Data:
    """Reads the training images, holds the validation images out of them, and places both."""
    started = time.monotonic()
    source = load_source(config.data, config.data.train_split)
    test = load_source(config.data, config.data.test_split)  # opened now, to know that it is there
    images, labels = source.read_all()
    first, second = batches.stratified_split(labels, config.data.validation_fraction)
    if len(first) < config.train.batch_size:
        raise InputError(
            f"config.train.batch_size is {config.train.batch_size}; {config.data.name} has "
            f"{len(first):,} images to train on, so it must be at most that."
        )
    train = {"image": images[first], "label": labels[first]}
    mean, deviation = augment.channel_statistics(train["image"])
    log.info(
        "Read %s: %s images to train on, %s to validate, %s to test, %d classes (%.1f s).",
        config.data.name,
        f"{len(first):,}",
        f"{len(second):,}",
        f"{len(test):,}",
        len(source.class_names),
        time.monotonic() - started,
    )
    return Data(
        train=jax.device_put(train, parallel.replicated(mesh)),
        train_size=len(first),
        validation=_eval_batches(
            images[second], labels[second], config.train.eval_batch_size, mesh
        ),
        test=test,
        info={
            "name": config.data.name,
            "class_names": list(source.class_names),
            "image_shape": list(source.image_shape),
            "mean": mean,
            "deviation": deviation,
            "images": {"train": len(first), "validation": len(second), "test": len(test)},
        },
    )


def _eval_batches(
    images: np.ndarray, labels: np.ndarray, batch_size: int, mesh: Mesh
) -> list[batches.Batch]:
    """Places all images on the devices, as batches that these can share equally."""
    batch_size = -(-min(batch_size, max(1, len(labels))) // mesh.size) * mesh.size
    return [
        jax.device_put(batch, parallel.split(mesh))
        for batch in batches.padded_batches(images, labels, batch_size)
    ]


def evaluate(
    measure: Callable[[TrainState, batches.Batch], EvalMetrics],
    state: TrainState,
    batched: list[batches.Batch],
) -> dict[str, Any]:
    """Measures a network on every image.

    Args:
        measure: `steps.eval_step`, compiled, with all but state and batch given.
        state: Whose `variables` are measured.
        batched: Batches with masks.

    Returns:
        Mean `loss` and `accuracy` over the images, and `confusion` int32[classes, classes].
    """
    total = functools.reduce(EvalMetrics.merge, (measure(state, batch) for batch in batched))
    return jax.device_get(total).compute()


def _versions(state: TrainState, split: str) -> Iterator[tuple[str, TrainState]]:
    """Yields what is to be measured on a split: the weights, and their average if it is kept."""
    yield split, state
    if state.ema:
        yield f"{split}_ema", state.averaged()


class _Clock:
    """Seconds of training over all sessions of a run, and between dispatches."""

    def __init__(self, before: float) -> None:
        self._before = before
        self._start = self._last = time.monotonic()

    def lap(self) -> float:
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        return max(seconds, 1e-9)

    def total(self) -> float:
        return self._before + time.monotonic() - self._start


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Turns the first SIGINT or SIGTERM into a request to stop; a second one ends the process."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread gets signals
        return
    requested = threading.Event()
    old: dict[int, Any] = {}

    def on_signal(number: int, frame: Any) -> None:
        log.info("%s: saving; once more to stop at once.", signal.Signals(number).name)
        requested.set()
        restore()

    def restore() -> None:
        for each, handler in old.items():
            signal.signal(each, handler)

    for each in (signal.SIGINT, signal.SIGTERM):
        old[each] = signal.signal(each, on_signal)
    try:
        yield requested.is_set
    finally:
        restore()


def _close(
    checkpoints: Checkpoints,
    metrics_file: writers.MetricsFile,
    tensorboard: writers.TensorBoard | None,
) -> None:
    checkpoints.close()
    metrics_file.close()
    if tensorboard:
        tensorboard.close()


def _draw(folder: Path, config: ConfigDict) -> None:
    records = writers.read_metrics(folder / run_folder.METRICS)
    title = f"{config.model.name} on {config.data.name}: {folder.name}"
    report.plot_curves(records, folder / "curves.png", title)


def _tell_results(results: dict[str, Any], folder: Path) -> None:
    """Tells how good the network is, on what, and where everything lies."""
    names = run_folder.read_json(folder / run_folder.DATASET)["class_names"]
    tested = "test_ema" if "test_ema" in results else "test"
    table = report.class_table(np.array(results[tested]["confusion"]), tuple(names))
    log.info("\nTest set, class by class:\n%s\n", table)
    for split in ("validation", "validation_ema", "test", "test_ema"):
        if split in results:
            log.info(
                "%-14s loss %.4f  accuracy %.2f%%",
                split,
                results[split]["loss"],
                100 * results[split]["accuracy"],
            )
    log.info(
        "\n%s steps, %d epochs, %s of training. Everything lies in %s:\n"
        "  curves.png (loss and accuracy), results.json, metrics.jsonl, log.txt, checkpoints/",
        f"{results['step']:,}",
        results["epochs"],
        writers.duration(results["train_seconds"]),
        folder,
    )
