"""Which GPUs there are, for programs that share them out between processes of their own."""

import importlib.util
import itertools
from collections.abc import Mapping
from pathlib import Path


def visible(environment: Mapping[str, str]) -> list[str]:
    """Names the GPUs that JAX may use; none without its CUDA plugin.

    JAX itself would take their memory by looking.

    Args:
        environment: The variables that say so.
    """
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    platforms = environment.get("JAX_PLATFORMS") or "cuda"  # JAX takes "" for unset
    if not any(map(importlib.util.find_spec, plugins)) or "cuda" not in platforms:
        return []
    given = environment.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        names = [name for name in given.split(",") if name]
        return list(itertools.takewhile(lambda name: not name.startswith("-"), names))  # as CUDA
    return [str(i) for i, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]
