"""What happens between the steps of a run: log, validate, save, stop.

A hook is a function of a `StepInfo`, called after each compiled call of some steps; an attribute
`every` (steps, or "epoch") makes it rarer. An attribute `state`, a dictionary of JSON, is saved
with each checkpoint and restored on resume. docs/hooks.md has an example. All processes of a run
call their hooks alike, and must decide alike.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from alexnet_jax import evaluation
from alexnet_jax.checkpoint.manager import Checkpoints
from alexnet_jax.data.load import RunData
from alexnet_jax.distributed.collectives import AnyProcess, fail_together
from alexnet_jax.errors import Diverged
from alexnet_jax.metrics import TrainMetrics, compute, format_accuracy, summarize
from alexnet_jax.run.writers import MetricWriter, duration
from alexnet_jax.state import TrainState, find_nonfinite
from alexnet_jax.trainer import Trainer

log = logging.getLogger(__name__)


@dataclasses.dataclass
class StepInfo:
    """Where a run is after a compiled call.

    Attributes:
        step: Steps taken so far.
        num_steps: Steps of this call.
        steps_per_epoch: Steps of an epoch.
        state: After this call; a hook may replace it.
        train_metrics: Of this call, on the device.
        validation: Loss and accuracy on the validation images, of the averaged weights where they
            are kept; {} except at the end of an epoch.
        save: Whether a checkpoint is saved at this step.
        stop: Whether training ends here; a hook that sets it ends the run early, with all that
            follows the last step.
        preempted: Whether the run exits here, to be resumed later.
    """

    step: int
    num_steps: int
    steps_per_epoch: int
    state: TrainState
    train_metrics: TrainMetrics
    validation: dict[str, Any] = dataclasses.field(default_factory=dict)
    save: bool = False
    stop: bool = False
    preempted: bool = False

    @property
    def epoch_ends(self) -> bool:
        """Whether this is the last step of an epoch."""
        return self.step % self.steps_per_epoch == 0

    @property
    def metrics(self) -> dict[str, Any]:
        """Mean loss and accuracy of the training batches of this call; waits for the device."""
        return summarize(compute(self.train_metrics))


Hook = Callable[[StepInfo], None]


def call_hooks(hooks: Sequence[Hook], info: StepInfo) -> None:
    """Calls those hooks that are due, in their order."""
    for hook in hooks:
        every = getattr(hook, "every", 1)
        if every == "epoch":
            due = info.epoch_ends
        else:
            due = info.step // every > (info.step - info.num_steps) // every
        if due:
            hook(info)


class LogMetrics:
    """Writes the training metrics, one call late, so that the device always has work."""

    def __init__(self, trainer: Trainer, writer: MetricWriter, batch_size: int) -> None:
        self._trainer = trainer
        self._writer = writer
        self._images_per_step = batch_size * len(trainer.seeds)
        self._pending: tuple[int, int, TrainMetrics, float] | None = None
        self._first = True

    def __call__(self, info: StepInfo) -> None:
        """Writes the metrics of the call before; of the first call at once, for a sign of life."""
        self.flush()
        rate = self._trainer.learning_rate(info.state, info.step)
        self._pending = info.step, info.num_steps, info.train_metrics, rate
        if self._first:
            self.flush()
            self._first = False

    def flush_before_save(self, info: StepInfo) -> None:
        """Writes this call's metrics, too, if a checkpoint follows; comes after `Save.decide`."""
        if info.save:
            self.flush()

    def flush(self) -> None:
        """Writes what is pending.

        Raises:
            Diverged: The loss is not finite.
        """
        if self._pending is None:
            return
        (step, num_steps, train_metrics, rate), self._pending = self._pending, None
        metrics = summarize(compute(train_metrics))
        if not math.isfinite(metrics["loss"]):
            each = metrics.get("loss_each", [metrics["loss"]])
            seeds = _of_seeds(self._trainer, [not math.isfinite(loss) for loss in each])
            raise _diverged(f"the loss{seeds} is {metrics['loss']}", step, rate)
        metrics["learning_rate"] = rate
        self._writer.write_train(step, num_steps * self._images_per_step, metrics)


class Validate:
    """Evaluates on the validation images, by which the schedule "plateau" goes."""

    every = "epoch"

    def __init__(self, trainer: Trainer, data: RunData, writer: MetricWriter) -> None:
        self._trainer, self._data, self._writer = trainer, data, writer

    def __call__(self, info: StepInfo) -> None:
        """Writes loss and accuracy of the weights, and of their average if it is kept."""
        check_finite(self._trainer, info)
        for split, values in evaluation.validate(self._trainer, info.state, self._data).items():
            self._writer.write_eval(info.step, split, values)
            log.info(
                "step %s, %s: loss %.4f, accuracy %s; %s left",
                f"{info.step:,}",
                split,
                values["loss"],
                format_accuracy(values),
                duration(self._writer.progress.seconds_left(info.step)),
            )
            info.validation = values  # the average comes last
        if info.validation:
            accuracy = info.validation.get("accuracy_each", info.validation["accuracy"])
            info.state = self._trainer.after_validation(info.state, np.array(accuracy, np.float32))


class Save:
    """Decides when to save, alike in all processes, and saves.

    At the end of each epoch, every so many seconds, when a hook stops the run, and when SIGTERM or
    Ctrl-C asks for it.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        trainer: Trainer,
        writer: MetricWriter,
        hooks: Sequence[Hook],
        every_seconds: float,
        mesh: Mesh,
    ) -> None:
        """Takes what it needs; `hooks` are those whose state is saved."""
        self.stop_requested: Callable[[], bool] = lambda: False
        self._checkpoints, self._trainer, self._writer = checkpoints, trainer, writer
        self._hooks, self._every_seconds = hooks, every_seconds
        self._any_process = AnyProcess(mesh)
        self._last = time.monotonic()
        self._preempted = False

    def poll(self, info: StepInfo) -> None:
        """Opens the folder, and logs how the last save ended, while the device computes."""
        self._checkpoints.open()
        self._checkpoints.poll()

    def decide(self, info: StepInfo) -> None:
        """Sets `save` and `preempted`."""
        due = 0 < self._every_seconds <= time.monotonic() - self._last
        info.preempted, due = self._any_process(self.stop_requested(), due)
        info.save = info.epoch_ends or due or info.preempted
        self._preempted = info.preempted

    def save(self, info: StepInfo) -> None:
        """Starts to save; a hook that comes last."""
        info.save |= info.stop
        if not info.save:
            return
        if not info.epoch_ends:  # else done before validation
            check_finite(self._trainer, info)
        progress = {
            "train_seconds": self._writer.seconds,
            "stopped": info.stop,
            "hooks": hook_states(self._hooks),
        }
        self._checkpoints.save(info.state, progress, info.validation.get("accuracy"))
        self._last = time.monotonic()
        self._any_process.forget()

    def finish(self) -> bool:
        """Waits for the last save; returns whether the run is to exit, to be resumed later."""
        with fail_together():
            self._checkpoints.finish()
        if not self._preempted:  # for what was requested during the last step, or its validation
            # Twice, since wishes are answered at the call after (`AnyProcess`).
            self._any_process(self.stop_requested(), False)
            self._preempted, _ = self._any_process(self.stop_requested(), False)
        return self._preempted


def check_finite(trainer: Trainer, info: StepInfo) -> None:
    """Raises `Diverged` where the state holds NaN or infinity.

    The loss of a step is of the parameters before it: those after it may be worse.
    """
    if path := find_nonfinite(info.state):
        states = [trainer.pick(info.state, i) for i in range(len(trainer.seeds))]
        seeds = _of_seeds(trainer, [find_nonfinite(state) is not None for state in states])
        rate = trainer.learning_rate(info.state, info.step)
        raise _diverged(f"{path}{seeds} is not finite", info.step, rate)


def hook_states(hooks: Sequence[Hook]) -> dict[str, Any]:
    """Returns the states of the hooks that have one, by place and class."""
    return {
        f"{i}_{type(hook).__name__}": hook.state
        for i, hook in enumerate(hooks)
        if hasattr(hook, "state")
    }


def restore_hook_states(hooks: Sequence[Hook], states: dict[str, Any]) -> None:
    """Gives hooks the states that `hook_states` returned when a checkpoint was saved."""
    for i, hook in enumerate(hooks):
        name = f"{i}_{type(hook).__name__}"
        if name in states:
            hook.state = states[name]  # type: ignore[attr-defined]


def _diverged(what: str, step: int, rate: float) -> Diverged:
    return Diverged(
        f"{what} at step {step:,}, with a learning rate of {rate:.3g}; the last checkpoint before "
        "is kept. Lower config.optimizer.learning_rate, or set config.optimizer.clip_norm, with "
        "another --workdir."
    )


def _of_seeds(trainer: Trainer, broken: list[bool]) -> str:
    """Returns " of seed 3", or nothing where there is only one."""
    if len(trainer.seeds) == 1:
        return ""
    names = [str(seed) for seed, bad in zip(trainer.seeds, broken, strict=True) if bad]
    return f" of seed{'s' * (len(names) > 1)} {', '.join(names)}"
