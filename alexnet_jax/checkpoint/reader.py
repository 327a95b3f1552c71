"""Reads checkpoints, verified by their checksums, without changing anything in the run folder.

The run may still be training, or the folder may be a copy on a read-only disk. Importing Orbax
takes a quarter of a second, so functions import it where they need it.
"""

import json
import logging
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from alexnet_jax import seeds
from alexnet_jax.checkpoint import checksums
from alexnet_jax.config import Config
from alexnet_jax.data.options import input_size
from alexnet_jax.errors import InputError, show
from alexnet_jax.models import create_model
from alexnet_jax.run import directory
from alexnet_jax.state import TrainState

log = logging.getLogger(__name__)

NEWEST, BEST = "newest", "best"
METRIC = "validation_accuracy"


class SavedNetwork(NamedTuple):
    """A trained network, as a run folder holds it.

    Attributes:
        folder: The run folder.
        config: Of the run.
        info: Content of ``dataset.json``.
        module: The linen network, with XLA's own operations.
        state: Parameters, model state and, where the run keeps them, averaged weights.
        accuracy: Of the checkpoint on the validation images (of the averaged weights where they
            are kept), from 0 to 1; None if unknown, and of a run of many seeds, whose checkpoints
            have a mean.
        replica: Index of the seed among the run's seeds.
    """

    folder: Path
    config: Config
    info: dict[str, Any]
    module: nn.Module
    state: TrainState
    accuracy: float | None
    replica: int


def read_network(
    run: str | os.PathLike[str], checkpoint: str | int = NEWEST, seed: int | None = None
) -> SavedNetwork:
    """Reads the network of a run; the arrays of its optimizer are not read.

    Args:
        run: The run folder.
        checkpoint: "newest", "best" (by validation accuracy, the later of equals), or a step.
        seed: Of a run of many seeds, which one's network; None is the first.

    Raises:
        InputError: The run, the checkpoint or the seed does not exist, is damaged, or belongs to
            another network than its config describes.
    """
    try:
        folder = Path(run).expanduser().absolute()
        exists = folder.is_dir()
    except (RuntimeError, ValueError):  # the home of an unknown user, or a zero byte
        exists = False
    if not exists:
        raise InputError(
            f"the run folder {os.fspath(run)} does not exist; name one, such as runs/digits."
        )
    config, info = directory.read_config(folder), directory.read_dataset(folder)
    numbers = seeds.numbers(config.seed, config.num_seeds)
    if seed is not None and seed not in numbers:
        raise InputError(
            f"the run in {folder} has no network of seed {show(seed)}; it has {numbers[0]}"
            + (f" to {numbers[-1]}." if len(numbers) > 1 else ".")
        )
    replica = 0 if seed is None else numbers.index(seed)
    module = create_model(config.model, num_classes=len(info["class_names"]))
    side = input_size(config.data)
    shapes = jax.eval_shape(
        lambda: module.init(jax.random.key(0), jnp.zeros((1, side, side, 3)), train=False)
    )
    leading = (len(numbers),) if len(numbers) > 1 else ()
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((*leading, *x.shape), x.dtype, sharding=device), shapes
    )
    params = wanted.pop("params")
    ema = {"params": params, "model_state": wanted} if config.train.ema_decay > 0 else {}
    items = {"params": params, "rest": {"model_state": wanted, "ema": ema}}
    step, found = _read(folder / directory.CHECKPOINTS, checkpoint, items)
    if leading:
        found = seeds.pick(found, replica)
    state = TrainState(
        step=jnp.int32(step),
        params=found["params"],
        opt_state=(),
        key=jax.random.key(numbers[replica]),
        **found["rest"],
    )
    measured = None if leading else accuracy(folder / directory.CHECKPOINTS / str(step))
    return SavedNetwork(folder, config, info, module, state, measured, replica)


def _read(
    checkpoints: Path, which: str | int, wanted: dict[str, Any]
) -> tuple[int, dict[str, Any]]:
    steps = saved_steps(checkpoints)
    if not steps:
        raise InputError(f"{checkpoints} holds no checkpoint; train the network first.")
    step: Any = steps[0] if which == NEWEST else which
    if which == BEST:
        step = best_step(checkpoints)
        if step is None:
            raise InputError(
                f"no checkpoint in {checkpoints} has a validation accuracy, so the best is not "
                f"known; choose '{NEWEST}'."
            )
    if step not in steps:
        raise InputError(
            f"the checkpoint {show(which)} is not in {checkpoints}; choose '{NEWEST}', '{BEST}' or "
            f"one of {', '.join(map(str, steps))}."
        )
    try:
        _, found = read_checkpoint(checkpoints / str(step), wanted)
    except InputError:
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds where a file is damaged
        others = ", ".join(str(other) for other in steps if other != step)
        raise InputError(
            f"checkpoint {step} in {checkpoints} is damaged ({reason(error)}); "
            + (f"choose another: {others}." if others else "restore it from a copy.")
        ) from error
    return int(step), found


def saved_steps(checkpoints: Path) -> list[int]:
    """Returns the steps of all completely saved checkpoints, newest first."""
    if not checkpoints.is_dir():
        return []
    return sorted((int(x.name) for x in checkpoints.iterdir() if x.name.isdigit()), reverse=True)


def accuracy(folder: Path) -> float | None:
    """Returns the validation accuracy of a checkpoint; None if not measured, or damaged."""
    try:
        text = (folder / "metrics" / "metrics").read_text()
        value = checksums.unseal(json.loads(text))[METRIC]
    except (OSError, ValueError, KeyError):
        return None
    return None if value is None else float(value)


def best_step(checkpoints: Path) -> int | None:
    """Returns the step of the highest validation accuracy, the later of equals."""
    found = {step: accuracy(checkpoints / str(step)) for step in saved_steps(checkpoints)}
    measured = [(value, step) for step, value in found.items() if value is not None]
    return max(measured)[1] if measured else None


def read_checkpoint(
    folder: Path, wanted: dict[str, Any], *, whole: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads arrays of a checkpoint, and the progress saved with them.

    Orbax restores a flipped bit or another dtype without an error, so types and checksums are
    compared here.

    Args:
        folder: Of the checkpoint.
        wanted: A tree of ShapeDtypeStructs with shardings for each item, "params" and "rest".
        whole: Whether arrays beside the wanted ones are an error.

    Returns:
        The progress and the arrays.

    Raises:
        InputError: The checkpoint belongs to another network or optimizer.
        Exception: It is damaged: ValueError, or whatever Orbax and TensorStore raise.
    """
    import orbax.checkpoint as ocp

    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    progress, saved = _read_progress(folder)
    if saved is None:
        have = checksums.types(
            {item: reader.metadata(folder / item).item_metadata.tree for item in wanted}
        )
    else:
        have = {path: fingerprint["type"] for path, fingerprint in saved.items()}
    want = checksums.types(wanted)
    for path in sorted(have.keys() | want.keys() if whole else want):
        if have.get(path) != want.get(path):
            raise InputError(
                f"checkpoint {folder.name} in {folder.parent} is of another network or optimizer: "
                f"{path} is {have.get(path, 'missing')} there and {want.get(path, 'missing')} "
                "here; use the config and the code that wrote it."
            )
    found = {}
    for item, tree in wanted.items():
        args = ocp.args.PyTreeRestore(
            item=tree,
            restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
            partial_restore=True,
        )
        # Orbax does not open an item for no array.
        found[item] = reader.restore(folder / item, args) if jax.tree.leaves(tree) else tree
    if saved is not None:
        checksums.check(found, saved)
    return progress, found


def _read_progress(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, str]] | None]:
    """Returns the progress, and the fingerprints of the arrays where the version wrote them."""
    content = json.loads((folder / "progress" / "metadata").read_text())
    if not content.keys() & {"progress", "arrays", "checksum"}:
        log.warning(
            "checkpoint %s is of an earlier version and has no checksums; a damaged array "
            "would not be noticed.",
            folder.name,
        )
        return content, None
    content = checksums.unseal(content)
    if not (folder / "commit_success.txt").exists():
        raise ValueError("its commit marker is missing")
    return content["progress"], content["arrays"]


def reason(error: Exception) -> str:
    """Says in a few words what went wrong; TensorStore adds its whole specification."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip() or type(error).__name__
    system = re.search(r"os_error_code='(\d+)'", text)
    return os.strerror(int(system[1])) if system else text.split("\n")[0][:200]
