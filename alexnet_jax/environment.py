"""What a program sets up before it uses JAX: the allocator and the compilation cache."""

import ctypes
import functools
import importlib.metadata
import importlib.util
import itertools
import os
import platform
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import platformdirs

# Of glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_CACHE_BYTES = 2**30


def prepare() -> list[str]:
    """Applies the settings of this module; for programs. Returns what was done, for the log."""
    return [note for note in (keep_freed_memory(), cache_compiled_programs()) if note]


def cache_folder() -> Path:
    """Returns this library's folder in the user's cache, which may not exist yet."""
    try:
        return platformdirs.user_cache_path("alexnet_jax")
    except RuntimeError:  # a user without a home, as in some containers
        return Path(_temporary_cache().name, "alexnet_jax")


@functools.cache
def _temporary_cache() -> tempfile.TemporaryDirectory[str]:
    # Not one for all processes: in a folder for everyone, that name could be another user's.
    return tempfile.TemporaryDirectory(prefix="cache-")


def keep_freed_memory() -> str:
    """Makes glibc reuse the memory of one step in the next, instead of returning it to the system.

    On a CPU every array of a step is allocated anew, and fresh pages cost more than what is
    written into them: a step of the reference network took 1.09 to 1.25 times as long without
    this (2 cores, `docs/performance.md`). Environment variables ``MALLOC_...`` take precedence.
    """
    given = sorted(name for name in os.environ if name.startswith("MALLOC_"))
    if given:
        return f"Whether freed memory is kept is left to {', '.join(given)}."
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_ARENA_MAX: 1}
    if platform.libc_ver()[0] != "glibc" or not all(
        ctypes.CDLL(None).mallopt(key, value) for key, value in settings.items()
    ):
        return ""
    return "Freed memory is kept for the next step (variables MALLOC_... override this)."


def cache_compiled_programs() -> str:
    """Caches compiled programs on disk, so that a second run of the same network starts at once.

    The folder ``programs`` of the user's cache (``~/.cache/alexnet_jax``) holds at most a GiB, of
    those last used. JAX's own settings take precedence: ``JAX_COMPILATION_CACHE_DIR`` names another
    folder, ``JAX_ENABLE_COMPILATION_CACHE=false`` caches nothing.
    """
    import jax  # takes a second, which programs that only ask for GPUs do without

    given = jax.config.values
    if not given["jax_enable_compilation_cache"] or given["jax_compilation_cache_dir"]:
        return ""
    folder = cache_folder() / "programs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(folder)
    except OSError as error:
        return f"Compiled programs are not cached: {error}."
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", _CACHE_BYTES)
    # A program too small to be cached by default is still slower to compile than to read.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return f"Compiled programs are cached in {folder}."


def _remove_unfinished(folder: Path) -> None:
    """Removes programs that a killed process left half-written.

    JAX would warn of each at every start, and never replace it. It writes the time of use after
    the program itself, so what has no time is unfinished; while JAX writes, it holds this lock.
    """
    import filelock

    with filelock.FileLock(folder / ".lockfile", timeout=10):
        for program in folder.glob("*-cache"):
            if not program.with_name(f"{program.name.removesuffix('cache')}atime").exists():
                program.unlink()


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """Names the GPUs that JAX may use; unlike JAX, reserves none of their memory."""
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    platforms = environment.get("JAX_PLATFORMS") or "cuda"  # JAX takes "" for unset
    if not any(map(importlib.util.find_spec, plugins)) or "cuda" not in platforms:
        return []
    given = environment.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        names = [name for name in given.split(",") if name]
        return list(itertools.takewhile(lambda name: not name.startswith("-"), names))  # as CUDA
    return [str(i) for i, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """Returns the versions of those packages that are installed."""
    versions = {}
    for name in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
