"""What tells arrays and JSON from damaged ones: dtype, shape and CRC-32."""

import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Returns each array by its path, "params/fc/kernel", whatever containers it lies in."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
        if hasattr(leaf, "shape")
    }


def _type(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def types(tree: Any) -> dict[str, str]:
    """Returns dtype and shape of each array, "float32[3, 3]", by its path."""
    return {path: _type(leaf) for path, leaf in _named_leaves(tree).items()}


def fingerprints(tree: Any) -> dict[str, dict[str, str]]:
    """Returns dtype, shape and CRC-32 of the bytes of each array, by its path.

    CRC-32 finds every change within 32 neighbouring bits, and misses one other in four billion.
    """
    leaves = _named_leaves(tree)
    for leaf in leaves.values():
        leaf.copy_to_host_async()

    def crc32(leaf: Any) -> str:
        # As bytes, since bfloat16 is none of the types that a buffer can have.
        content = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
        return f"{zlib.crc32(content.data):08x}"

    with ThreadPoolExecutor() as pool:  # zlib lets other threads run
        sums = pool.map(crc32, leaves.values())
    return {
        path: {"type": _type(leaf), "crc32": crc}
        for (path, leaf), crc in zip(leaves.items(), sums, strict=True)
    }


def check(tree: Any, saved: dict[str, dict[str, str]]) -> None:
    """Refuses arrays that are not those whose `fingerprints` were saved.

    Raises:
        ValueError: Names the first that differs.
    """
    for path, fingerprint in fingerprints(tree).items():
        if fingerprint != saved[path]:
            raise ValueError(
                f"{path} was saved with the checksum {saved[path]['crc32']} and has "
                f"{fingerprint['crc32']}"
            )


def _seal(content: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """Adds a checksum to a JSON dictionary."""
    return content | {"checksum": _seal(content)}


def unsealed(value: Any) -> dict[str, Any]:
    """Returns what `sealed` was given; raises ValueError if anything is not as it was."""
    content = {k: v for k, v in value.items() if k != "checksum"} if isinstance(value, dict) else {}
    if not content or _seal(content) != value.get("checksum"):
        raise ValueError("its JSON does not agree with its checksum")
    return content
