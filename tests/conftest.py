"""Strict settings for all tests: eight devices, no silent broadcasting, warnings are errors."""

import logging
import tempfile

import hypothesis
import jax
import pytest

# Before the backend starts. Tests that need fewer devices make a mesh of some of them.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Many tests compile the same program; the folder goes when the tests end.
_CACHE = tempfile.TemporaryDirectory(prefix="alexnet_jax_tests_")
jax.config.update("jax_compilation_cache_dir", _CACHE.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

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
    from alexnet_jax import parallel, train

    make_mesh = parallel.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "make_mesh", lambda: make_mesh(jax.devices()[:2]))
        patch.setattr(train, "_make_report", lambda folder: None)
        yield
