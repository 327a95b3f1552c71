"""The weights of a run, to use them: read alone, verified, and without a change to the run folder.

`checkpoint.manager` is for the run itself: it removes what a kill has left, and falls back. Here a
run may be going on in the folder, or it may be a copy that cannot be written.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax

from alexnet_jax.checkpoint import checksums
from alexnet_jax.checkpoint.manager import (
    METRIC,
    hide_records_of_orbax,
    reason,
    saved_steps,
    unseal,
)
from alexnet_jax.errors import InputError, show

NEWEST, BEST = "newest", "best"


class Weights(NamedTuple):
    """What a checkpoint has of a network.

    Attributes:
        step: Steps of training that made them.
        accuracy: On the validation images, from 0 to 1, by which the best checkpoint is told (of
            the averaged weights where they are kept); None if it was not measured.
        params: Trained parameters.
        model_state: The network's other collections by name.
        ema: {"params", "model_state"}, averaged over the steps, or {} if they are not kept.
    """

    step: int
    accuracy: float | None
    params: Any
    model_state: Any
    ema: Any


def read_weights(
    directory: Path, which: str | int, variables: dict[str, Any], *, ema: bool
) -> Weights:
    """Reads the weights of one checkpoint; the optimizer's arrays stay where they are.

    Args:
        directory: Folder ``checkpoints`` of a run folder.
        which: "newest", "best" (by the accuracy on the validation images; of equals the newest),
            or the step of a checkpoint.
        variables: What the network's `init` returns, or its shapes alone; the values are not used.
        ema: Whether the run keeps averaged weights.

    Raises:
        InputError: There is no such checkpoint, it is damaged, or it is of another network.
    """
    directory = directory.absolute()  # as Orbax wants it
    step = _find(directory, which)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), variables
    )
    params = wanted["params"]
    model_state = {name: value for name, value in wanted.items() if name != "params"}
    kept = {"params": params, "model_state": model_state} if ema else {}
    rest = {"model_state": model_state, "ema": kept}
    hide_records_of_orbax()
    try:
        return _read(directory / str(step), params, rest)
    except InputError:
        raise
    except Exception as error:  # whatever damage makes Orbax and TensorStore raise
        others = ", ".join(f"{other}" for other in saved_steps(directory) if other != step)
        raise InputError(
            f"checkpoint {step} in {directory} is damaged ({reason(error)}); "
            + (f"choose another: {others}." if others else "put back a copy.")
        ) from error


def _read(folder: Path, params: Any, rest: dict[str, Any]) -> Weights:
    import orbax.checkpoint as ocp  # takes a quarter of a second

    content = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(folder / "progress")
    _, saved = unseal(content, folder)
    if saved is not None:
        for path, wanted in checksums.types({"params": params, "rest": rest}).items():
            have = saved[path]["type"] if path in saved else "missing"
            if have != wanted:
                raise InputError(
                    f"checkpoint {folder.name} in {folder.parent} is of another network: {path} is "
                    f"{have} there and {wanted} by the run's config; use the code that wrote it."
                )
    found = {"params": _restore(folder / "params", params), "rest": _restore(folder / "rest", rest)}
    if saved is not None:
        checksums.check(found, saved)
    return Weights(
        step=int(folder.name),
        accuracy=_accuracy(folder),
        params=found["params"],
        model_state=found["rest"]["model_state"],
        ema=found["rest"]["ema"],
    )


def _restore(item: Path, wanted: Any) -> Any:
    if not jax.tree.leaves(wanted):  # Orbax does not open an item for nothing
        return wanted
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler()
    return ocp.Checkpointer(handler).restore(
        item,
        args=ocp.args.PyTreeRestore(
            item=wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=True,
        ),
    )


def _accuracy(folder: Path) -> float | None:
    try:
        text = (folder / "metrics" / "metrics").read_text()
        return float(checksums.unsealed(json.loads(text))[METRIC])
    except (OSError, ValueError, KeyError):  # a damaged one is as good as none
        return None


def _find(directory: Path, which: str | int) -> int:
    steps = saved_steps(directory)
    if not steps:
        raise InputError(f"{directory} holds no checkpoint; train the network first.")
    if which == NEWEST:
        return steps[0]
    if which == BEST:
        scored = {step: _accuracy(directory / str(step)) for step in steps}
        measured = {step: value for step, value in scored.items() if value is not None}
        if not measured:
            raise InputError(
                f"no checkpoint in {directory} was measured on validation images, so that none is "
                "known as the best; choose 'newest'."
            )
        return max(measured, key=lambda step: (measured[step], step))
    if which not in steps:
        raise InputError(
            f"the checkpoint {show(which)} is not in {directory}; choose '{NEWEST}', '{BEST}' or "
            f"one of {', '.join(map(str, steps))}."
        )
    return int(which)
