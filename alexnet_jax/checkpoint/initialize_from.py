"""What a run begins with: the network of another run, but for what is to begin anew."""

import dataclasses
import logging
import zlib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from alexnet_jax.checkpoint import checksums
from alexnet_jax.errors import InputError
from alexnet_jax.inference import predictor
from alexnet_jax.run import directory

log = logging.getLogger(__name__)

# Options of a network that may differ from those of the run it begins as without a word.
_FREE = ("dropout", "dtype", "kernel_init", "bias_ones", "norm_momentum")


@dataclasses.dataclass(frozen=True)
class Start:
    """The network that a run begins as.

    Attributes:
        variables: Of that network, as its `module.apply` takes them; {} where none is needed: the
            run begins anew, or has begun.
        anew: Shell patterns of the parameters that begin anew.
        run: The run folder it comes from.
        info: What ``dataset.json`` is to hold of it: `start`, and the `mean` and `deviation` that
            the network knows images by.
    """

    variables: dict[str, Any] = dataclasses.field(default_factory=dict)
    anew: tuple[str, ...] = ()
    run: str = ""
    info: dict[str, Any] = dataclasses.field(default_factory=dict)

    def fitting(self, blank: dict[str, Any]) -> dict[str, Any]:
        """Returns the variables that take the place of initial ones.

        Args:
            blank: The variables of the new network; their shapes suffice.

        Raises:
            InputError: Anything but what begins anew is of another shape, or not in both.
        """
        names = [_named(tree) for tree in (self.variables, blank)]
        for pattern in self.anew:
            if not any(fnmatchcase(name, pattern) for name in names[1].values()):
                raise InputError(
                    f"config.init.reinitialize has {pattern!r}, which matches none of the "
                    f"parameters: {', '.join(names[1].values())}."
                )
        theirs, ours = (
            {
                path: leaf
                for path, leaf in flatten_dict(tree).items()
                if not any(fnmatchcase(named[path], pattern) for pattern in self.anew)
            }
            for tree, named in zip((self.variables, blank), names, strict=True)
        )
        # Of a layer that differs its kernel tells more than its bias, which comes before.
        for path in sorted(ours | theirs, key=lambda path: path[-1] != "kernel"):
            shapes = [
                f"{list(tree[path].shape)}" if path in tree else "missing"
                for tree in (theirs, ours)
            ]
            if shapes[0] != shapes[1]:
                name = (names[0] | names[1])[path]
                raise InputError(
                    f"{name} is {shapes[0]} in {self.run}, which config.init.from_run names, and "
                    f"{shapes[1]} here; make the networks alike (the size of the images counts, "
                    "too), or let it begin anew by config.init.reinitialize."
                )
        return unflatten_dict(theirs)


def _named(variables: dict[str, Any]) -> dict[tuple[str, ...], str]:
    """Returns the name of each array by its path: of parameters as optimizers have it."""
    return {
        path: "/".join(path[1:] if path[0] == "params" else path)
        for path in flatten_dict(variables)
    }


def open_start(config: ConfigDict, folder: Path) -> Start:
    """Opens what `config.init` names, unless this run has it already.

    Args:
        config: Of the new run.
        folder: Of the new run. Once it holds a checkpoint, nothing is read of the other.

    Raises:
        InputError: There is no such run, it cannot be used, or it has changed since this one began.
    """
    if not config.init.from_run:
        return Start()
    before = directory.read_json(folder / directory.DATASET) or {}
    if "start" in before and (folder / directory.SAVED).exists():
        return Start(info={key: before[key] for key in ("mean", "deviation", "start")})
    which = config.init.checkpoint
    network = predictor.load(
        config.init.from_run, checkpoint=int(which) if which.isdecimal() else which
    )
    variables = network.eval_state.variables
    arrays = sorted(
        (path, found["crc32"]) for path, found in checksums.fingerprints(variables).items()
    )
    start = {
        "run": config.init.from_run,
        "step": network.step,
        "checksum": f"{zlib.crc32(repr(arrays).encode()):08x}",
    }
    if directory.has_begun(folder) and before.get("start", start)["checksum"] != start["checksum"]:
        raise InputError(
            f"the weights in {config.init.from_run} have changed since this run began, and it has "
            f"saved nothing yet: they were of step {before['start']['step']:,} with checksum "
            f"{before['start']['checksum']} and are of step {start['step']:,} with "
            f"{start['checksum']}; start anew with another --workdir."
        )
    log.info(
        "Beginning as the network of %s at step %s.", config.init.from_run, f"{network.step:,}"
    )
    for key, value in config.model.items():
        theirs = network.config.model.get(key)
        if key not in _FREE and value != theirs:
            log.warning("config.model.%s is %s there and %s here.", key, theirs, value)
    if config.data.normalization != (theirs := network.config.data.normalization):
        log.warning(
            "config.data.normalization is %s there and %s here; images are normalised as there.",
            theirs,
            config.data.normalization,
        )
    return Start(
        variables=variables,
        anew=tuple(config.init.reinitialize),
        run=config.init.from_run,
        info={
            "mean": network.info["mean"],
            "deviation": network.info["deviation"],
            "start": start,
        },
    )
