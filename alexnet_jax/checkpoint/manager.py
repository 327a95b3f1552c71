"""Saves the state of a run without stopping it, and restores it: Orbax, asynchronous.

Importing Orbax takes a quarter of a second, so functions import it where they need it.
"""

import functools
import json
import logging
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Sharding

from alexnet_jax.checkpoint import checksums
from alexnet_jax.checkpoint.reader import METRIC, best_step, read_checkpoint, reason, saved_steps
from alexnet_jax.errors import InputError, SaveFailed
from alexnet_jax.run.directory import SAVED
from alexnet_jax.run.files import read_json, write_json
from alexnet_jax.state import TrainState

log = logging.getLogger(__name__)

# The newest two are kept, so that one damaged file does not lose a run, and the best one. Orbax's
# own `max_to_keep` with `best_fn` may delete the newest.
NEWEST_KEPT = 2

# How often the last save of a run is tried, and the seconds between. An earlier save that fails is
# not repeated, as the next one replaces it.
LAST_ATTEMPTS = 3
ATTEMPT_SECONDS = 2.0


class Checkpoints:
    """The checkpoints of one run.

    Each holds three items: `params`; `rest`, the other fields of the state; and `progress`, a JSON
    dictionary with the checksums of all arrays. ``saved.json`` beside the folder holds the newest
    saved step, so that a lost checkpoint is noticed.
    """

    def __init__(self, directory: Path) -> None:
        """Takes the folder, which `open`, or the first method that needs it, opens."""
        self.directory = directory.absolute()  # a relative path fails later, on Orbax's thread
        self._marker = self.directory.with_name(SAVED)
        self._manager: Any = None
        self._saving: int | None = None  # the step
        self._failure: tuple[int, str] | None = None  # of the last save: its step, and why
        self._save: Callable[[], bool]  # starts the last save, again if need be
        self._writes = jax.process_index() == 0

    def open(self) -> Any:
        """Creates the folder, removes half-written checkpoints, and returns Orbax's manager.

        Takes a quarter of a second the first time, and nothing later.
        """
        if self._manager is not None:
            return self._manager
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policies

        def score(metrics: dict[str, Any]) -> float:
            return -1.0 if metrics[METRIC] is None else metrics[METRIC]

        if self._writes:
            self._remove_damaged_metrics()
        keep = [
            policies.LatestN(NEWEST_KEPT),
            policies.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False),
        ]
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keep),
                best_fn=score,  # metrics are not written without it
                cleanup_tmp_directories=True,
                # Otherwise, where a folder cannot be made, threads wait five minutes for it.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            ),
        )
        return self._manager

    def _remove_damaged_metrics(self) -> None:
        """Removes a damaged accuracy, which would keep Orbax from opening the folder."""
        for path in self.directory.glob("*/metrics/metrics"):
            try:
                checksums.unseal(json.loads(path.read_text()))
            except (OSError, ValueError) as error:
                step = path.parent.parent.name
                log.warning("the accuracy of checkpoint %s is damaged (%s).", step, error)
                shutil.rmtree(path.parent)

    def save(
        self, state: TrainState, progress: dict[str, Any], accuracy: float | None = None
    ) -> None:
        """Starts saving; returns as soon as the state may be donated.

        A failure is logged, here or by `poll`.

        Args:
            state: Saved under its step.
            progress: JSON, returned by `restore`.
            accuracy: On the validation images, from 0 to 1; decides which checkpoint is the best.

        Raises:
            RuntimeError: The folder already holds this or a later step.
        """
        import orbax.checkpoint as ocp

        self._wait()
        step, manager = state.steps_taken, self.open()
        latest = manager.latest_step()
        if latest is not None and step <= latest:
            raise RuntimeError(
                f"checkpoint {step} was not saved: {self.directory} holds step {latest}"
            )
        items = _items(state)
        content = {"progress": progress, "arrays": checksums.fingerprints(items)}
        self._save = functools.partial(
            manager.save,
            step,
            args=ocp.args.Composite(
                progress=ocp.args.JsonSave(checksums.seal(content)),
                **{item: ocp.args.StandardSave(tree) for item, tree in items.items()},
            ),
            metrics=checksums.seal({METRIC: accuracy}),
            force=True,
        )
        self._start(step)

    def _start(self, step: int) -> None:
        try:
            if not self._save():
                raise RuntimeError("Orbax declined")
            self._saving = step
        except Exception as error:  # OSError, or whatever TensorStore makes of one
            self._failed(step, error)

    def poll(self) -> None:
        """Logs how the current save has ended, if it has; costs nothing."""
        if self._saving is not None and not self.open().is_saving_in_progress():
            self._wait()

    def _wait(self) -> None:
        """Waits for the current save, and logs how it has ended."""
        step, self._saving = self._saving, None
        if step is None:
            return
        try:
            self.open().wait_until_finished()
        except Exception as error:  # OSError, or whatever TensorStore makes of one
            self._failed(step, error)
        else:
            if self._failure:
                log.info("Checkpoint %d is saved; the disk can be written again.", step)
            self._failure = None
            self._mark(step)

    def _failed(self, step: int, error: Exception) -> None:
        self._failure = step, reason(error)
        log.warning(
            "Checkpoint %d could not be saved (%s); training continues, and tries again at the "
            "next save.",
            *self._failure,
        )
        if self._writes:  # half-written files may be what fills the disk
            for half_written in self.directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(half_written, ignore_errors=True)
        self.open().reload()  # Orbax has forgotten those that the new one was to replace

    def _mark(self, step: int) -> None:
        if not self._writes:
            return
        try:
            write_json(self._marker, {"step": step})
        except SaveFailed as error:
            log.warning("%s", error)

    def restore(
        self, template: Callable[[], TrainState], sharding: Sharding
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """Reads the newest undamaged checkpoint, and logs which newer ones are damaged.

        Args:
            template: Returns a state whose structure, shapes and dtypes are expected; called only
                if there is a checkpoint.
            sharding: Of the restored arrays.

        Returns:
            The state and the progress saved with it; None if the run has never saved.

        Raises:
            InputError: The checkpoint is of another network, all are damaged or gone, or the memory
                is too small.
        """
        steps = saved_steps(self.directory)
        known = (read_json(self._marker) or {}).get("step")
        if known is not None and not steps:
            raise InputError(
                f"{self.directory} is empty, and held step {known} of this run; restore it from a "
                "copy, or start over with another --workdir."
            )
        if known is not None and known > steps[0]:
            log.warning("checkpoint %d is gone; trying %d.", known, steps[0])
        for index, step in enumerate(steps):
            try:
                found = self._restore_step(step, template(), sharding)
            except InputError:
                raise
            except (MemoryError, jax.errors.JaxRuntimeError) as error:
                # Not the checkpoint's fault, so it must not be deleted: another process may hold
                # the memory of the GPU.
                raise InputError(
                    f"checkpoint {step} in {self.directory} could not be placed in memory "
                    f"({reason(error)}); nothing is lost: rerun the same command to try again."
                ) from error
            except Exception as error:  # Orbax and TensorStore raise many kinds on damaged files
                log.warning(
                    "checkpoint %d is damaged (%s); trying the one before.", step, reason(error)
                )
                continue
            for damaged in steps[:index]:  # their steps could not be saved again otherwise
                self.open().delete(damaged)
            self._mark(step)
            return found
        if steps:
            raise InputError(
                f"none of the checkpoints in {self.directory} can be read; restore them from a "
                "copy, or start over with another --workdir."
            )
        return None

    def _restore_step(
        self, step: int, template: TrainState, sharding: Sharding
    ) -> tuple[TrainState, dict[str, Any]]:
        wanted = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            jax.eval_shape(_items, template),
        )
        progress, found = read_checkpoint(self.directory / str(step), wanted, whole=True)
        fields = found["rest"] | {"key": jax.random.wrap_key_data(found["rest"]["key"])}
        state: TrainState = template.replace(params=found["params"], **fields)
        if state.steps_taken != step:
            raise ValueError(f"it holds step {state.steps_taken}")
        return state, progress

    def finish(self) -> None:
        """Waits until the last save is on disk, and repeats it if it has failed.

        The state saved last must not have been donated.

        Raises:
            SaveFailed: It cannot be saved.
        """
        self._wait()
        # Of many processes, only some may have failed, and Orbax saves with all or none.
        for _ in range(LAST_ATTEMPTS - 1 if jax.process_count() == 1 else 0):
            if self._failure is None:
                return
            time.sleep(ATTEMPT_SECONDS)
            self._start(self._failure[0])
            self._wait()
        if self._failure is not None:
            step, why = self._failure
            newest = self.open().latest_step()
            kept = "none is saved" if newest is None else f"the newest is of step {newest:,}"
            raise SaveFailed(
                f"the last checkpoint, of step {step:,}, could not be saved in {self.directory} "
                f"({why}); {kept}. Fix this and rerun the same command to resume from there."
            )

    def close(self) -> None:
        """Waits for the current save, and closes the folder."""
        self._wait()
        for _ in range(2):  # the first try may raise again what a save that failed had raised
            with suppress(Exception):
                if self._manager is not None:
                    self._manager.close()
                break

    @property
    def best_step(self) -> int | None:
        """The saved step with the highest validation accuracy, the later of equals."""
        self._wait()
        return best_step(self.directory)


def _items(state: TrainState) -> dict[str, Any]:
    """Returns what is saved of a state, with the key as numbers that any format can hold."""
    rest = {name: getattr(state, name) for name in ("step", "model_state", "opt_state", "ema")}
    return {"params": state.params, "rest": rest | {"key": jax.random.key_data(state.key)}}
