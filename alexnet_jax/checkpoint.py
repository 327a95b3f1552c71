"""Saving a run without stopping it, and finding it again: Orbax, asynchronous."""

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Sharding
from orbax.checkpoint import checkpoint_managers as policies

from alexnet_jax.errors import InputError
from alexnet_jax.state import TrainState

log = logging.getLogger(__name__)

# Kept are the newest ones, of which two so that one damaged file does not lose a run, and the
# best. Orbax's own `max_to_keep` with `best_fn` may delete the newest.
NEWEST_KEPT = 2
METRIC = "validation_accuracy"


class Checkpoints:
    """The checkpoints of one run folder.

    Each holds three items: `params`, which can be restored alone; `rest`, the other fields of the
    state; and `progress`, a JSON dictionary.
    """

    def __init__(self, directory: Path) -> None:
        """Opens the folder, creating it if need be, and removes what a kill left half-written."""
        # Orbax tells of each file at INFO, about 70 lines a save, and warns of saves that, rightly,
        # have no accuracy.
        logging.getLogger("absl").setLevel(logging.ERROR)
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
        self.directory = directory.absolute()  # a relative path fails later, on Orbax's thread
        self._manager = ocp.CheckpointManager(
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
            ),
        )

    def save(
        self, state: TrainState, progress: dict[str, Any], accuracy: float | None = None
    ) -> None:
        """Starts saving; returns as soon as the state may be changed.

        Args:
            state: Saved under its step.
            progress: Whatever else is to be found again; JSON.
            accuracy: On the validation images, from 0 to 1, to tell the best checkpoint by.

        Raises:
            RuntimeError: The folder already holds this or a later step.
        """
        step = int(state.step)
        latest = self._manager.latest_step()
        if latest is not None and step <= latest:
            raise RuntimeError(
                f"checkpoint {step} was not saved: {self.directory} holds step {latest}"
            )
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                rest=ocp.args.StandardSave(_rest(state)),
                progress=ocp.args.JsonSave(progress),
            ),
            metrics=None if accuracy is None else {METRIC: accuracy},
            force=True,
        )
        if not saved:  # Orbax says so by this alone
            raise RuntimeError(f"checkpoint {step} was not saved in {self.directory}")

    def restore(
        self, template: TrainState, sharding: Sharding
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """Reads the newest checkpoint that can be read; older ones stand in for damaged ones.

        Args:
            template: A state of the right structure, shapes and dtypes; its values are not used,
                and its arrays may be ShapeDtypeStructs.
            sharding: Where the arrays are to lie.

        Returns:
            The state and the progress saved with it; None if there is no checkpoint.

        Raises:
            InputError: A checkpoint is of another network, or none can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                found = self._restore_step(step, template, sharding)
            except InputError:
                raise
            except Exception as error:  # whatever damage makes Orbax and TensorStore raise
                reason = str(error).strip().split("\n")[0][:200]  # TensorStore adds its whole spec
                log.warning("checkpoint %d is damaged (%s); trying the one before.", step, reason)
                continue
            for damaged in steps[: steps.index(step)]:  # else their steps could not be saved again
                self._manager.delete(damaged)
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
        def abstract(tree: Any) -> Any:
            return jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
            )

        params = abstract(template.params)
        rest = abstract(jax.eval_shape(_rest, template))
        self._check_structure(step, {"params": params, "rest": rest})
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(params),
                rest=ocp.args.StandardRestore(rest),
                progress=ocp.args.JsonRestore(),
            ),
        )
        fields = dict(found.rest)
        fields["key"] = jax.random.wrap_key_data(fields["key"])
        return template.replace(params=found.params, **fields), found.progress

    def _check_structure(self, step: int, wanted: dict[str, Any]) -> None:
        """Refuses a checkpoint of another network, naming the first array that differs."""
        metadata = self._manager.item_metadata(step)
        for item, tree in wanted.items():
            if metadata[item] is None:
                raise ValueError(f"item {item} is missing")
            have = _shapes(
                metadata[item].tree if hasattr(metadata[item], "tree") else metadata[item]
            )
            want = _shapes(tree)
            for path in sorted(have.keys() | want.keys()):
                if have.get(path) != want.get(path):
                    raise InputError(
                        f"checkpoint {step} in {self.directory} is of another network or "
                        f"optimizer: {item}{path} is {have.get(path, 'missing')} there and "
                        f"{want.get(path, 'missing')} here; use the code that wrote it, or "
                        "another --workdir."
                    )

    def wait(self) -> None:
        """Returns once every save that was started is safely on disk; raises if one failed."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the saves under way and lets the folder go."""
        self._manager.close()

    @property
    def best_step(self) -> int | None:
        """The step with the highest validation accuracy among those kept."""
        infos = self._manager.all_steps()
        scored = {s: (self._manager.metrics(s) or {}).get(METRIC) for s in infos}
        scored = {s: value for s, value in scored.items() if value is not None}
        return max(scored, key=lambda s: (scored[s], s)) if scored else None


def _rest(state: TrainState) -> dict[str, Any]:
    """All fields but the parameters, with the key as numbers that any format can hold."""
    return {
        "step": state.step,
        "model_state": state.model_state,
        "opt_state": state.opt_state,
        "ema": state.ema,
        "key": jax.random.key_data(state.key),
    }


def _shapes(tree: Any) -> dict[str, str]:
    """Returns "dtype[shape]" of each array by its path, whatever containers it lies in."""

    def name(path: Any) -> str:
        parts = (
            str(next(getattr(key, a) for a in ("key", "name", "idx") if hasattr(key, a)))
            for key in path
        )
        return "".join(f"/{part}" for part in parts)

    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        name(path): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
        if hasattr(leaf, "shape")
    }
