"""Checksums of arrays and of JSON, by which damage is found."""

import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Returns each array by its path, such as "params/fc/kernel"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
        if hasattr(leaf, "shape")
    }


def types(tree: Any) -> dict[str, str]:
    """Returns dtype and shape of each array, such as "float32[3, 3]", by its path."""
    return {path: f"{x.dtype}{list(x.shape)}" for path, x in _named_leaves(tree).items()}


def fingerprints(tree: Any) -> dict[str, dict[str, str]]:
    """Returns `type` (dtype and shape) and `crc32` of each array, by its path.

    CRC-32 detects every change within 32 adjacent bits, and misses one other in four billion.
    """
    leaves = _named_leaves(tree)
    for leaf in leaves.values():
        leaf.copy_to_host_async()

    def crc32(leaf: Any) -> str:
        # As bytes, since a buffer cannot have the type bfloat16.
        content = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
        return f"{zlib.crc32(content.data):08x}"

    with ThreadPoolExecutor() as pool:  # zlib releases the GIL
        sums = dict(zip(leaves, pool.map(crc32, leaves.values()), strict=True))
    return {path: {"type": kind, "crc32": sums[path]} for path, kind in types(tree).items()}


def check(tree: Any, saved: dict[str, dict[str, str]]) -> None:
    """Compares arrays with their saved `fingerprints`.

    Raises:
        ValueError: An array differs; names the first.
    """
    for path, found in fingerprints(tree).items():
        if found != saved[path]:
            raise ValueError(
                f"{path} was saved with the checksum {saved[path]['crc32']} and has "
                f"{found['crc32']}"
            )


def _checksum(content: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """Adds a checksum to a JSON dictionary."""
    return content | {"checksum": _checksum(content)}


def unseal(value: Any) -> dict[str, Any]:
    """Returns what `seal` was given.

    Raises:
        ValueError: The checksum is missing or wrong.
    """
    content = {k: v for k, v in value.items() if k != "checksum"} if isinstance(value, dict) else {}
    if not content or _checksum(content) != value.get("checksum"):
        raise ValueError("its JSON does not agree with its checksum")
    return content
