"""What a program sets up before JAX starts; each case in a process of its own, whose settings it
may change."""

import os
import re
import subprocess
import sys

import pytest

PREPARE = "from alexnet_jax import environment; print(environment.prepare())"
# Compiles in the second run what the first has kept: JAX logs that it was found.
COMPUTE = """
import logging
from alexnet_jax import environment
environment.prepare()
import jax
logging.getLogger("jax._src.compiler").setLevel(logging.DEBUG)
logging.basicConfig(level=logging.DEBUG)
jax.jit(lambda x: x * 3 + 1)(jax.numpy.ones(7))
"""


def python(code, tmp_path, **variables):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "MALLOC_"))}
    environment = kept | {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"} | variables
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )


def test_programs_are_kept_for_the_next_process(tmp_path):
    first, second = (python(COMPUTE, tmp_path).stderr for _ in range(2))
    assert list((tmp_path / "alexnet_jax" / "programs").iterdir())
    assert "Persistent compilation cache hit" not in first
    assert "Persistent compilation cache hit" in second


def test_a_half_written_program_is_removed(tmp_path):
    folder = tmp_path / "alexnet_jax" / "programs"
    folder.mkdir(parents=True)
    for name in ("whole-cache", "whole-atime", "torn-cache"):
        (folder / name).touch()
    python(PREPARE, tmp_path)
    assert {path.name for path in folder.iterdir()} - {".lockfile"} == {
        "whole-cache",
        "whole-atime",
    }


def test_what_was_done_is_told(tmp_path):
    said = python(PREPARE, tmp_path).stdout
    assert f"Compiled programs are cached in {tmp_path / 'alexnet_jax' / 'programs'}." in said
    assert sys.platform != "linux" or "memory" in said


@pytest.mark.parametrize(
    "variables",
    [{"JAX_COMPILATION_CACHE_DIR": "elsewhere"}, {"JAX_ENABLE_COMPILATION_CACHE": "false"}],
    ids=lambda variables: next(iter(variables)),
)
def test_jaxs_own_settings_come_first(tmp_path, variables):
    assert "Compiled" not in python(PREPARE, tmp_path, **variables).stdout
    assert not list(tmp_path.iterdir())


def test_settings_of_the_allocator_are_left_to_the_environment(tmp_path):
    said = python(PREPARE, tmp_path, MALLOC_ARENA_MAX="2").stdout
    assert "left to MALLOC_ARENA_MAX." in said


def test_a_user_without_a_home_has_a_cache(tmp_path):
    code = """if 1:
        import os, pwd
        from alexnet_jax import environment
        def unknown(uid):
            raise KeyError(uid)
        pwd.getpwuid = unknown
        del os.environ["HOME"]
        print(environment.cache_folder())
    """
    said = python(code, tmp_path, XDG_CACHE_HOME="", TMPDIR=str(tmp_path)).stdout
    assert re.fullmatch(rf"{tmp_path}/cache-\w+/alexnet_jax\n", said)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "alexnet_jax").touch()
    assert "Compiled programs are not cached: " in python(PREPARE, tmp_path).stdout


def test_nothing_is_set_up_by_importing(tmp_path):
    code = """if 1:
        import logging, os, signal, sys
        import jax
        from absl import flags, logging as _  # defines its own flags
        def settings():
            levels = {name: logging.getLogger(name).level for name in ("", "jax", "absl")}
            handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
            hooks = [sys.excepthook, sys.unraisablehook, dict(os.environ)]
            return levels, handlers, hooks, set(flags.FLAGS), dict(jax.config.values)
        before = settings()
        import alexnet_jax
        from alexnet_jax import environment
        from alexnet_jax.distributed import collectives, initialize, preemption, watchdog
        from alexnet_jax.run import directory, writers
        for one, other in zip(before, settings(), strict=True):
            assert one == other, (one, other)
    """
    python(code, tmp_path)
    assert not list(tmp_path.iterdir())
