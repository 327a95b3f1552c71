"""Strict settings for all tests: eight devices, no silent broadcasting, warnings are errors."""

import logging
import os
import tempfile

import hypothesis
import jax
import jaxtyping
import pytest

# Before anything imports these.
jaxtyping.install_import_hook(["alexnet_jax.models", "alexnet_jax.ops"], "checked_shapes.check")

# Before the backend starts. Tests that need fewer devices make a mesh of some of them.
jax.config.update("jax_platforms", "cpu")
os.environ["JAX_PLATFORMS"] = "cpu"  # also of the processes that they start, beside a GPU
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Most of the time goes into compiling networks that take a few steps. XLA transforms and fuses a
# program as always; only LLVM leaves the machine code of each fusion as it comes, which takes a
# third of the time. `XLA_FLAGS= pytest` tests what users run, with LLVM's optimizations.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# Many tests compile the same program; the folder goes when the tests end. The processes that they
# start use it, too, and not the user's. It never comes to its bound, but only with one does JAX
# lock the folder while it reads and writes.
_CACHE = tempfile.TemporaryDirectory(prefix="alexnet_jax_tests_")
for _name, _value in {
    "jax_compilation_cache_dir": _CACHE.name,
    "jax_compilation_cache_max_size": 2**32,
    "jax_persistent_cache_min_compile_time_secs": 0.1,
}.items():
    jax.config.update(_name, _value)
    os.environ[_name.upper()] = str(_value)
os.environ["XDG_CACHE_HOME"] = _CACHE.name  # for what else is kept in the user's cache

# The same examples every time; `--hypothesis-profile=thousand` tries many more.
_COMMON = {"derandomize": True, "deadline": None, "database": None}
hypothesis.settings.register_profile("quick", max_examples=40, **_COMMON)
hypothesis.settings.register_profile(
    "thousand",
    max_examples=1000,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    **_COMMON,
)
hypothesis.settings.load_profile("quick")


@pytest.fixture(scope="module", autouse=True)
def log_as_before():
    """What a program tested in this process has set up for its terminal goes with its tests."""
    package = logging.getLogger("alexnet_jax")
    handlers, level, propagate = list(package.handlers), package.level, package.propagate
    yield
    package.handlers[:] = handlers
    package.setLevel(level)
    package.propagate = propagate


@pytest.fixture
def strict_dtypes():
    """No silent promotion of dtypes; not for all tests, as Optax and CLU rely on it."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="module")
def quick_runs():
    """For whole runs: two devices, for as many cores, since eight would take turns.

    And no report but where a test asks for one: to draw it takes longer than such a run.
    """
    from alexnet_jax.distributed import sharding
    from alexnet_jax.experiments.report import page

    make_mesh = sharding.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda: make_mesh(jax.devices()[:2]))
        patch.setattr(page, "write_report", lambda folder: None)
        yield


# Files in the order of their time, the longest first, so that no worker waits for another one at
# the end; those that are not named come last. `--no-loadscope-reorder` keeps xdist to it.
_LONG = (
    "train",
    "processes",
    "torture",
    "replicas",
    "steps",
    "notebook",
    "initialize_from",
    "export",
)


def pytest_collection_modifyitems(items):
    names = [f"test_{name}" for name in _LONG]
    items.sort(key=lambda i: names.index(i.path.stem) if i.path.stem in names else len(names))
