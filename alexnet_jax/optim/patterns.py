"""Shell patterns of parameters, by their paths: "norm*/bias" matches "norm1/bias"."""

from fnmatch import fnmatchcase
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from alexnet_jax.errors import InputError
from alexnet_jax.optim.options import OptimizerConfig


def matching(params: Any, *patterns: str) -> Any:
    """Returns, for each parameter, whether its path matches one of the patterns."""

    # flax.traverse_util.path_aware_map sees a parameter where optax.partition leaves one out.
    def matches(path: tuple[Any, ...], _: Any) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    return jax.tree_util.tree_map_with_path(matches, params)


def check_patterns(config: OptimizerConfig, params: Any) -> None:
    """Rejects patterns that match no parameter, or parameters that they do not apply to.

    Args:
        config: The options.
        params: Parameters of the network, or their shapes.

    Raises:
        InputError: Names the option and the pattern, and lists the parameters.
    """
    leaves = flatten_dict(params, sep="/")
    frozen = {path for path in leaves for pattern in config.frozen if fnmatchcase(path, pattern)}
    if len(frozen) == len(leaves):
        raise InputError(
            f"config.optimizer.frozen is {config.frozen}, which is all parameters; leave some to "
            "train."
        )
    patterns = [("frozen", pattern) for pattern in config.frozen]
    patterns += [("lr_multipliers", pattern) for pattern, _ in config.lr_multipliers]
    if config.muon_learning_rate:
        patterns.append(("muon_pattern", config.muon_pattern))
    for option, pattern in patterns:
        found = [path for path in leaves if fnmatchcase(path, pattern)]
        if not found:
            raise InputError(
                f"config.optimizer.{option} has {pattern!r}, which matches none of the "
                f"parameters: {', '.join(sorted(leaves))}."
            )
        if option != "frozen" and frozen.issuperset(found):
            raise InputError(
                f"config.optimizer.{option} has {pattern!r}, which matches frozen parameters "
                f"alone; leave it out, or let some of them train: config.optimizer.frozen is "
                f"{config.frozen}."
            )
        if option == "muon_pattern" and any(leaves[path].ndim < 2 for path in found):
            raise InputError(
                f"config.optimizer.muon_pattern is {pattern!r}, which matches biases or scales, "
                "too; Muon is for kernels, such as those of 'conv*/kernel'."
            )
