"""Initializes a network with the weights of another run (config.init), for fine-tuning."""

import dataclasses
import logging
import zlib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from alexnet_jax.checkpoint import checksums
from alexnet_jax.checkpoint.reader import read_network
from alexnet_jax.config import Config, flatten
from alexnet_jax.errors import InputError
from alexnet_jax.run import directory, files

log = logging.getLogger(__name__)

# Options of the network whose difference from the other run is not worth a warning.
_FREE = {
    f"model.{name}" for name in ("dropout", "dtype", "kernel_init", "bias_ones", "norm_momentum")
}


@dataclasses.dataclass(frozen=True)
class InitialWeights:
    """The weights of another run.

    Attributes:
        variables: As its `module.apply` takes them; {} where none are needed.
        reinitialize: Shell patterns of the parameters that are not taken from it.
        run: Its folder.
        info: For ``dataset.json``: `start`, which identifies the weights, and the `mean` and
            `deviation` by which that network normalizes images.
    """

    variables: dict[str, Any] = dataclasses.field(default_factory=dict)
    reinitialize: tuple[str, ...] = ()
    run: str = ""
    info: dict[str, Any] = dataclasses.field(default_factory=dict)

    def select(self, variables: dict[str, Any]) -> dict[str, Any]:
        """Returns the weights that replace initial ones.

        Args:
            variables: Of the new network; their shapes suffice.

        Raises:
            InputError: An array that is not reinitialized is missing in either network, or has
                another shape; or a pattern matches no parameter.
        """
        theirs = flatten_dict(self.variables, sep="/")
        ours = flatten_dict(variables, sep="/")
        names = [path.removeprefix("params/") for path in ours]
        for pattern in self.reinitialize:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise InputError(
                    f"config.init.reinitialize has {pattern!r}, which matches none of the "
                    f"parameters: {', '.join(names)}."
                )
        selected = {}
        # A layer's kernel says more about a difference than its bias, which sorts first.
        for path in sorted(ours | theirs, key=lambda path: not path.endswith("/kernel")):
            name = path.removeprefix("params/")
            if any(fnmatchcase(name, pattern) for pattern in self.reinitialize):
                continue
            there, here = (
                str(list(tree[path].shape)) if path in tree else "missing"
                for tree in (theirs, ours)
            )
            if there != here:
                raise InputError(
                    f"{name} is {there} in {self.run}, which config.init.from_run names, and "
                    f"{here} here; make the networks equal (the image size counts, too), or add "
                    "it to config.init.reinitialize."
                )
            selected[path] = theirs[path]
        return unflatten_dict(selected, sep="/")


def read_initial_weights(config: Config, folder: Path) -> InitialWeights:
    """Reads the weights that `config.init` names, unless the run has already saved its own.

    Args:
        config: Of the new run.
        folder: Of the new run.

    Raises:
        InputError: The other run does not exist, cannot be used, or has changed since this one
            began.
    """
    if not config.init.from_run:
        return InitialWeights()
    before = files.read_json(folder / directory.DATASET) or {}
    if "start" in before and (folder / directory.SAVED).exists():
        return InitialWeights(info={key: before[key] for key in ("mean", "deviation", "start")})
    run, which = config.init.from_run, config.init.checkpoint
    network = read_network(run, int(which) if which.isdecimal() else which)
    step, variables = network.state.steps_taken, network.state.averaged().variables
    found = checksums.fingerprints(variables)
    arrays = sorted((path, fingerprint["crc32"]) for path, fingerprint in found.items())
    checksum = f"{zlib.crc32(repr(arrays).encode()):08x}"
    start = {"run": run, "step": step, "checksum": checksum}
    then = before.get("start", start)
    if directory.has_begun(folder) and then["checksum"] != checksum:
        raise InputError(
            f"the weights in {run} have changed since this run began, and it has saved nothing: "
            f"they were of step {then['step']:,} with checksum {then['checksum']} and are of step "
            f"{step:,} with {checksum}; start over with another --workdir."
        )
    log.info("Initializing from %s, step %s.", run, f"{step:,}")
    theirs = dict(flatten(network.config))
    for key, value in flatten(config):
        if key.startswith("model.") and key not in _FREE and value != theirs.get(key):
            log.warning("config.%s is %s there and %s here.", key, theirs.get(key), value)
    if config.data.normalization != network.config.data.normalization:
        log.warning(
            "config.data.normalization is %s there and %s here; images are normalized as there.",
            network.config.data.normalization,
            config.data.normalization,
        )
    info = {"mean": network.info["mean"], "deviation": network.info["deviation"], "start": start}
    return InitialWeights(variables, tuple(config.init.reinitialize), run, info)
