"""Saving a run without stopping it, and finding it again: Orbax, asynchronous.

Orbax restores a flipped bit or another dtype without a word, so every array is saved with a
checksum, dtype and shape, and none is used that does not agree with them.

Orbax takes a quarter of a second to import, so every import of it stands inside a function.
"""

import functools
import json
import logging
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Sharding

from alexnet_jax.checkpoint import checksums
from alexnet_jax.errors import InputError, SaveFailed
from alexnet_jax.run.directory import SAVED, read_json, write_json
from alexnet_jax.state import TrainState

log = logging.getLogger(__name__)

# Kept are the newest ones, of which two so that one damaged file does not lose a run, and the
# best. Orbax's own `max_to_keep` with `best_fn` may delete the newest.
NEWEST_KEPT = 2
METRIC = "validation_accuracy"

ITEMS = ("params", "rest")

# How often the last save of a run is tried, and the seconds between; those before it are tried
# again whenever the next is due.
LAST_ATTEMPTS = 3
ATTEMPT_SECONDS = 2.0


def saved_steps(directory: Path) -> list[int]:
    """Returns the steps of all checkpoints that were saved whole, the newest first."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())[::-1]


class Checkpoints:
    """The checkpoints of one run folder.

    Each holds three items: `params`, which can be restored alone; `rest`, the other fields of the
    state; and `progress`, a JSON dictionary with the checksums of all. Beside the folder lies
    ``saved.json`` with the newest step that is safe, by which a lost checkpoint is missed.
    """

    def __init__(self, directory: Path) -> None:
        """Takes the folder, which `open`, or the first need of it, opens."""
        quieten_orbax()
        self.directory = directory.absolute()  # a relative path fails later, on Orbax's thread
        self._marker = self.directory.with_name(SAVED)
        self._under_way: int | None = None  # the step being saved
        self._failure: tuple[int, str] | None = None  # of the last save: its step, and why
        self._again: Callable[[], bool] | None = None  # starts the last save anew
        self._writes = jax.process_index() == 0
        self._opened: Any = None

    def open(self) -> None:
        """Creates the folder if need be, and removes what a kill left half-written.

        It takes a quarter of a second at first, and nothing once it has been done.
        """
        if self._opened is not None:
            return
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policies

        keep = policies.AnyPreservationPolicy(
            [
                policies.LatestN(NEWEST_KEPT),
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics[METRIC],
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        if self._writes:
            self._drop_damaged_metrics()
        self._opened = ocp.CheckpointManager(
            self.directory,
            item_handlers={  # told beforehand, so that shapes can be read without the arrays
                "params": ocp.StandardCheckpointHandler(),
                "rest": ocp.StandardCheckpointHandler(),
                "progress": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=keep,
                best_fn=lambda metrics: metrics[METRIC],  # without it they are not written
                cleanup_tmp_directories=True,
                # Else, where a folder cannot be made, threads wait five minutes for it.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            ),
        )

    @property
    def _manager(self) -> Any:
        self.open()
        return self._opened

    def save(
        self, state: TrainState, progress: dict[str, Any], accuracy: float | None = None
    ) -> None:
        """Starts saving; returns as soon as the state may be changed.

        A save that fails is told of in the log, at once or by `look`, and not repeated: the next
        one stands in for it.

        Args:
            state: Saved under its step.
            progress: Whatever else is to be found again; JSON.
            accuracy: On the validation images, from 0 to 1, to tell the best checkpoint by.

        Raises:
            RuntimeError: The folder already holds this or a later step.
        """
        import orbax.checkpoint as ocp

        self._settle()
        step = state.steps_taken
        latest = self._manager.latest_step()
        if latest is not None and step <= latest:
            raise RuntimeError(
                f"checkpoint {step} was not saved: {self.directory} holds step {latest}"
            )
        items = {"params": state.params, "rest": _rest(state)}
        content = {"progress": progress, "arrays": checksums.fingerprints(items)}
        score = {METRIC: accuracy}
        self._again = functools.partial(
            self._manager.save,
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(items["params"]),
                rest=ocp.args.StandardSave(items["rest"]),
                progress=ocp.args.JsonSave(checksums.sealed(content)),
            ),
            metrics=None if accuracy is None else checksums.sealed(score),
            force=True,
        )
        self._start(step)

    def _start(self, step: int) -> None:
        assert self._again is not None
        try:
            if not self._again():  # Orbax says so by this alone
                raise RuntimeError("Orbax declined")
            self._under_way = step
        except Exception as error:  # OSError, or whatever TensorStore makes of one
            self._failed(step, error)

    def look(self) -> None:
        """Tells how the save under way has ended, if it has; costs nothing."""
        if self._under_way is not None and not self._manager.is_saving_in_progress():
            self._settle()

    def _settle(self) -> None:
        """Waits for the save under way, and tells how it has ended."""
        step, self._under_way = self._under_way, None
        if step is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # OSError, or whatever TensorStore makes of one
            self._failed(step, error)
        else:
            if self._failure:
                log.info("Checkpoint %d is saved; all is well again.", step)
            self._failure = None
            self._mark(step)

    def _failed(self, step: int, error: Exception) -> None:
        self._failure = step, reason(error)
        log.warning(
            "Checkpoint %d could not be saved (%s); the run goes on and tries again at its next "
            "save.",
            *self._failure,
        )
        if self._writes:  # what is half-written may be what fills the disk
            for half_written in self.directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(half_written, ignore_errors=True)
        self._manager.reload()  # Orbax has crossed out those that the new one was to replace

    def _mark(self, step: int) -> None:
        """Notes that the run has something to lose."""
        if not self._writes:
            return
        try:
            write_json(self._marker, {"step": step})
        except SaveFailed as error:
            log.warning("%s", error)

    def restore(
        self, template: Callable[[], TrainState], sharding: Sharding
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """Reads the newest checkpoint that is undamaged, and says which others are not.

        Args:
            template: Returns a state of the right structure, shapes and dtypes, if there is a
                checkpoint; its values are not used, and its arrays may be ShapeDtypeStructs.
            sharding: Where the arrays are to lie.

        Returns:
            The state and the progress saved with it; None if there is no checkpoint, and none
            has ever been.

        Raises:
            InputError: A checkpoint is of another network, none can be read, all are gone, or
                there is no memory for it.
        """
        steps = []
        if saved_steps(self.directory):
            steps = sorted(self._manager.all_steps(), reverse=True)
        known = (read_json(self._marker) or {}).get("step")
        if known is not None and known not in steps:
            if not steps:
                raise InputError(
                    f"{self.directory} is empty, and held step {known} of this run; put back a "
                    "copy, or start anew with another --workdir."
                )
            if known > steps[0]:
                log.warning("checkpoint %d is gone; trying %d.", known, steps[0])
        for step in steps:
            try:
                found = self._restore_step(step, template(), sharding)
            except InputError:
                raise
            except (MemoryError, jax.errors.JaxRuntimeError) as error:
                # Says nothing of the checkpoint, which must not go away for it: the memory of a
                # GPU may still be another process's.
                raise InputError(
                    f"checkpoint {step} in {self.directory} could not be placed in memory "
                    f"({reason(error)}); nothing is lost: the same command tries again."
                ) from error
            except Exception as error:  # whatever damage makes Orbax and TensorStore raise
                log.warning(
                    "checkpoint %d is damaged (%s); trying the one before.", step, reason(error)
                )
                continue
            for damaged in steps[: steps.index(step)]:  # else their steps could not be saved again
                self._manager.delete(damaged)
            self._mark(step)
            return found
        if steps:
            raise InputError(
                f"none of the checkpoints in {self.directory} can be read; put back a copy, or "
                "start anew with another --workdir."
            )
        return None

    def _restore_step(
        self, step: int, template: TrainState, sharding: Sharding
    ) -> tuple[TrainState, dict[str, Any]]:
        import orbax.checkpoint as ocp

        def abstract(tree: Any) -> Any:
            return jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
            )

        wanted = {
            "params": abstract(template.params),
            "rest": abstract(jax.eval_shape(_rest, template)),
        }
        content = self._manager.restore(
            step, args=ocp.args.Composite(progress=ocp.args.JsonRestore())
        ).progress
        progress, saved = unseal(content, self.directory / str(step))
        if saved is None:
            have = self._types_by_orbax(step)
        else:
            have = {path: fingerprint["type"] for path, fingerprint in saved.items()}
        self._check_structure(step, wanted, have)
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(wanted["params"]),
                rest=ocp.args.StandardRestore(wanted["rest"]),
            ),
        )
        if saved is not None:
            checksums.check({"params": found.params, "rest": found.rest}, saved)
        fields = dict(found.rest)
        fields["key"] = jax.random.wrap_key_data(fields["key"])
        state = template.replace(params=found.params, **fields)
        if state.steps_taken != step:
            raise ValueError(f"it holds step {state.steps_taken}")
        return state, progress

    def _types_by_orbax(self, step: int) -> dict[str, str]:
        """Returns what Orbax notes of each array, which nothing protects from damage."""
        metadata = self._manager.item_metadata(step)
        for item in ITEMS:
            if metadata[item] is None:
                raise ValueError(f"item {item} is missing")
        trees = {item: getattr(metadata[item], "tree", metadata[item]) for item in ITEMS}
        return checksums.types(trees)

    def _check_structure(self, step: int, wanted: dict[str, Any], have: dict[str, str]) -> None:
        """Refuses a checkpoint of another network, naming the first array that differs."""
        want = checksums.types(wanted)
        for path in sorted(have.keys() | want.keys()):
            if have.get(path) != want.get(path):
                raise InputError(
                    f"checkpoint {step} in {self.directory} is of another network or "
                    f"optimizer: {path} is {have.get(path, 'missing')} there and "
                    f"{want.get(path, 'missing')} here; use the code that wrote it, or "
                    "another --workdir."
                )

    def _drop_damaged_metrics(self) -> None:
        """Takes a damaged accuracy off its checkpoint, which is then as good as one without."""
        for path in self.directory.glob("*/metrics/metrics"):
            try:
                checksums.unsealed(json.loads(path.read_text()))
            except (OSError, ValueError) as error:
                step = path.parent.parent.name
                log.warning("the accuracy of checkpoint %s is damaged (%s).", step, error)
                shutil.rmtree(path.parent)

    def finish(self) -> None:
        """Returns once the last save that was started is safely on disk.

        The state saved last must still be there, for a save that failed is tried again.

        Raises:
            SaveFailed: It cannot be saved.
        """
        self._settle()
        # Of many processes some may have failed, and Orbax saves with all or none.
        for _ in range(LAST_ATTEMPTS - 1 if jax.process_count() == 1 else 0):
            if self._failure is None:
                return
            time.sleep(ATTEMPT_SECONDS)
            self._start(self._failure[0])
            self._settle()
        if self._failure is not None:
            step, reason = self._failure
            newest = self._manager.latest_step()
            kept = "none is saved" if newest is None else f"the newest is of step {newest:,}"
            raise SaveFailed(
                f"the last checkpoint, of step {step:,}, could not be saved in {self.directory} "
                f"({reason}); {kept}. Mend that and give the same command again, which goes on "
                "from there."
            )

    def close(self) -> None:
        """Waits for the saves under way and lets the folder go."""
        self._settle()
        if self._opened is None:
            return
        for _ in range(2):  # a second time where a save that failed, which was told of, stops it
            with suppress(Exception):
                self._manager.close()
                break

    @property
    def best_step(self) -> int | None:
        """The step with the highest validation accuracy among those kept."""
        infos = self._manager.all_steps()
        scored = {s: (self._manager.metrics(s) or {}).get(METRIC) for s in infos}
        scored = {s: value for s, value in scored.items() if value is not None}
        return max(scored, key=lambda s: (scored[s], s)) if scored else None


def unseal(
    content: dict[str, Any], folder: Path
) -> tuple[dict[str, Any], dict[str, dict[str, str]] | None]:
    """Takes apart what a checkpoint holds as `progress`.

    Args:
        content: That JSON.
        folder: The checkpoint's.

    Returns:
        What was given to `save`, and the fingerprints of the arrays; None where an earlier version
        wrote it.

    Raises:
        ValueError: It is damaged.
    """
    if not content.keys() & {"progress", "arrays", "checksum"}:
        log.warning(
            "checkpoint %s is of an earlier version and has no checksums; a damaged array "
            "would not be noticed.",
            folder.name,
        )
        return content, None
    content = checksums.unsealed(content)
    if not (folder / "commit_success.txt").exists():
        raise ValueError("its commit marker is missing")
    return content["progress"], content["arrays"]


def _rest(state: TrainState) -> dict[str, Any]:
    """All fields but the parameters, with the key as numbers that any format can hold."""
    return {
        "step": state.step,
        "model_state": state.model_state,
        "opt_state": state.opt_state,
        "ema": state.ema,
        "key": jax.random.key_data(state.key),
    }


def reason(error: Exception) -> str:
    """Says in a few words what went wrong; TensorStore adds its whole specification."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip() or type(error).__name__
    system = re.search(r"os_error_code='(\d+)'", text)
    return os.strerror(int(system[1])) if system else text.split("\n")[0][:200]


def hide_records_of_orbax() -> None:
    """Keeps Orbax's own records from the log: about 70 lines a save, one for each file.

    Those of others stay, so a library may do it.
    """
    logging.getLogger("absl").addFilter(_not_of_orbax)  # once, however often it is added


@functools.cache
def quieten_orbax() -> None:
    """Keeps Orbax from the terminal; what it has to tell is raised, too, and said in one line.

    It warns of saves that, rightly, have no accuracy. Where one array fails, it leaves the others
    to end behind its back, and their errors are printed with tracebacks: from asyncio, from threads
    that find its event loop closed, and from coroutines when they are collected. All this changes
    the process, which therefore should be a program of this library.
    """
    hide_records_of_orbax()
    logging.getLogger("absl").setLevel(logging.ERROR)
    logging.getLogger("asyncio").addFilter(_not_left_behind)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    excepthook, unraisablehook = sys.excepthook, sys.unraisablehook

    def left_behind(error: BaseException | None) -> bool:
        return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"

    sys.excepthook = lambda kind, error, trace: (
        None if left_behind(error) else excepthook(kind, error, trace)
    )
    sys.unraisablehook = lambda args: (
        None
        if left_behind(args.exc_value)
        or "orbax" in getattr(getattr(args.object, "cr_code", None), "co_filename", "")
        else unraisablehook(args)
    )


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


def _not_left_behind(record: logging.LogRecord) -> bool:
    # Where one array fails, Orbax forgets the others, whose errors are the same.
    return "exception was never retrieved" not in record.getMessage()
