"""Checkpoints: exact, on any number of devices, the right ones kept, damage survived."""

import gc
import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alexnet_jax import parallel
from alexnet_jax.checkpoint import Checkpoints
from alexnet_jax.errors import InputError
from alexnet_jax.state import TrainState

PROGRESS = {"train_seconds": 1.5}
ALL = parallel.replicated(parallel.make_mesh())


def make_state(step=0, width=3, dtype=jnp.float32, optimizer=None, ema=True, devices=8):
    """A small state whose every array depends on `step`."""
    optimizer = optimizer or optax.adam(1e-3)

    def create():
        values = jnp.arange(2.0 * width).reshape(2, width) / 7 + step
        params = {"fc": {"bias": values[0].astype(dtype), "kernel": values.astype(dtype)}}
        model_state = {"batch_stats": {"mean": values[1] * 3}}
        opt_state = jax.tree.map(
            lambda x: x + jnp.asarray(step).astype(x.dtype), optimizer.init(params)
        )
        average = {"params": params, "model_state": model_state}
        return TrainState(
            step=jnp.int32(step),
            params=params,
            model_state=model_state,
            opt_state=opt_state,
            ema=jax.tree.map(lambda x: x * 2, average) if ema else {},
            key=jax.random.key(step + 1),
        )

    mesh = parallel.make_mesh(jax.devices()[:devices])
    return jax.jit(create, out_shardings=parallel.replicated(mesh))()


def values(state):
    """All arrays by path, the key as numbers."""
    state = state.replace(key=jax.random.key_data(state.key))
    leaves, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(state))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same(one, two):
    one, two = values(one), values(two)
    assert one.keys() == two.keys()
    for path in one:
        assert one[path].dtype == two[path].dtype, path
        np.testing.assert_array_equal(one[path], two[path], err_msg=path)


@pytest.fixture
def open_checkpoints(tmp_path):
    """Opens the folder anew each time, as a new process would; closes all at the end."""
    opened = []

    def open_one():
        for old in opened:
            old.close()
        opened[:] = [Checkpoints(tmp_path / "checkpoints")]
        return opened[0]

    yield open_one
    for old in opened:
        old.close()


def save(checkpoints, *steps, accuracy=None, **options):
    for step in steps:
        checkpoints.save(make_state(step, **options), PROGRESS, accuracy)
    checkpoints.wait()


def on_disk(tmp_path):
    return sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())


def damage(folder, how):
    """Spoils a checkpoint as a full disk or a careless person would."""
    files = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    if how == "truncated":
        with files[-1].open("r+b") as file:
            file.truncate(files[-1].stat().st_size // 2)
    elif how == "no arrays":
        for file in files:
            if "ocdbt.process" in str(file) or file.parent.name == "d":
                file.unlink()
    elif how == "no metadata":
        for file in files:
            if "METADATA" in file.name.upper():
                file.unlink()
    elif how in ("params", "rest", "progress"):
        shutil.rmtree(folder / how)
    else:
        assert how == "empty"
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("ema", [False, True])
def test_comes_back_bit_for_bit(open_checkpoints, ema):
    state = make_state(3, ema=ema)
    save(open_checkpoints(), 3, ema=ema)
    template = jax.eval_shape(lambda: make_state(0, ema=ema))
    restored, progress = open_checkpoints().restore(template, ALL)
    assert_same(restored, state)
    assert progress == PROGRESS
    np.testing.assert_array_equal(
        jax.random.normal(restored.key, 4), jax.random.normal(state.key, 4)
    )
    assert jax.tree.structure(restored) == jax.tree.structure(state)


@pytest.mark.parametrize(("before", "after"), [(1, 8), (8, 2), (2, 1)])
def test_goes_on_with_another_number_of_devices(open_checkpoints, before, after):
    save(open_checkpoints(), 3, devices=before)
    sharding = parallel.replicated(parallel.make_mesh(jax.devices()[:after]))
    restored, _ = open_checkpoints().restore(make_state(), sharding)
    assert_same(restored, make_state(3))
    for leaf in jax.tree.leaves(restored.replace(key=())):
        assert leaf.sharding == sharding


def test_the_key_lies_with_the_rest(open_checkpoints):
    save(open_checkpoints(), 3, devices=1)
    restored, _ = open_checkpoints().restore(make_state(), ALL)
    assert restored.key.sharding.device_set == set(jax.devices())


def test_none_where_nothing_was_saved(open_checkpoints):
    checkpoints = open_checkpoints()
    assert checkpoints.restore(make_state(), ALL) is None
    assert checkpoints.best_step is None


def test_keeps_the_newest_two_and_the_best(open_checkpoints, tmp_path):
    checkpoints = open_checkpoints()
    for step, accuracy in enumerate([0.9, 0.5, 0.6, 0.4], start=1):
        save(checkpoints, step, accuracy=accuracy)
    assert on_disk(tmp_path) == [1, 3, 4]
    assert checkpoints.best_step == 1
    save(checkpoints, 5, accuracy=0.95)
    assert on_disk(tmp_path) == [4, 5]
    assert open_checkpoints().best_step == 5


def test_saves_without_accuracy_are_kept_only_while_new(open_checkpoints, tmp_path):
    checkpoints = open_checkpoints()
    save(checkpoints, 1, accuracy=0.3)
    save(checkpoints, 2, 3, 4)
    assert on_disk(tmp_path) == [1, 3, 4]
    assert checkpoints.best_step == 1


def test_of_equals_the_later_is_the_best(open_checkpoints):
    checkpoints = open_checkpoints()
    save(checkpoints, 1, 2, accuracy=0.5)
    assert checkpoints.best_step == 2


def test_a_step_is_saved_once(open_checkpoints):
    checkpoints = open_checkpoints()
    save(checkpoints, 4)
    for step in (4, 3):
        with pytest.raises(RuntimeError, match=f"checkpoint {step} was not saved.*holds step 4"):
            checkpoints.save(make_state(step), PROGRESS)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"width": 4}, r"params/fc/bias is float32\[3\] there and float32\[4\] here"),
        ({"dtype": jnp.bfloat16}, r"params/fc/bias is float32\[3\] there and bfloat16\[3\] here"),
        (
            {"optimizer": optax.sgd(0.1, momentum=0.9)},
            r"rest/opt_state/0/count is int32\[\] there and missing here",
        ),
        ({"ema": False}, r"rest/ema/model_state/.*float32\[3\] there and missing here"),
    ],
)
def test_refuses_another_network_or_optimizer(open_checkpoints, tmp_path, other, message):
    save(open_checkpoints(), 1, 2)
    with pytest.raises(InputError, match=message):
        open_checkpoints().restore(make_state(**other), ALL)
    assert on_disk(tmp_path) == [1, 2]


# Orbax leaves the other reads of a damaged checkpoint behind, which complain when collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "how", ["truncated", "no arrays", "no metadata", "params", "rest", "progress", "empty"]
)
def test_the_one_before_stands_in_for_a_damaged_one(open_checkpoints, tmp_path, caplog, how):
    save(open_checkpoints(), 1, 2)
    damage(tmp_path / "checkpoints" / "2", how)
    checkpoints = open_checkpoints()
    with caplog.at_level(logging.WARNING, "alexnet_jax"):
        restored, _ = checkpoints.restore(make_state(), ALL)
    assert_same(restored, make_state(1))
    assert "checkpoint 2 is damaged" in caplog.text
    save(checkpoints, 2)  # the run comes to that step again
    restored, _ = open_checkpoints().restore(make_state(), ALL)
    assert_same(restored, make_state(2))
    gc.collect()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_nothing_is_lost_or_begun_anew_when_all_are_damaged(open_checkpoints, tmp_path):
    save(open_checkpoints(), 1, 2)
    for step in ("1", "2"):
        damage(tmp_path / "checkpoints" / step, "truncated")
    with pytest.raises(InputError, match=r"none of the checkpoints in .* can be read"):
        open_checkpoints().restore(make_state(), ALL)
    assert on_disk(tmp_path) == [1, 2]
    gc.collect()


def test_what_a_kill_left_half_written_goes_away(open_checkpoints, tmp_path):
    save(open_checkpoints(), 1)
    stale = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "1", stale)
    checkpoints = open_checkpoints()
    restored, _ = checkpoints.restore(make_state(), ALL)
    assert_same(restored, make_state(1))
    assert not stale.exists()
    save(checkpoints, 2)
    assert on_disk(tmp_path) == [1, 2]


def test_a_state_may_be_donated_while_it_is_being_saved(open_checkpoints):
    @jax.jit(donate_argnums=0)
    def update(state):
        state = state.replace(step=state.step + 1)
        return jax.tree.map(
            lambda x: x * 2 + 1 if jnp.issubdtype(x.dtype, jnp.floating) else x, state
        )

    state = make_state(1, width=250_000)
    expected = values(state)
    checkpoints = open_checkpoints()
    checkpoints.save(state, PROGRESS)
    for _ in range(5):
        state = update(state)
    checkpoints.wait()
    restored, _ = open_checkpoints().restore(make_state(width=250_000), ALL)
    found = values(restored)
    for path in expected:
        np.testing.assert_array_equal(found[path], expected[path], err_msg=path)


def test_a_relative_folder_will_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints(Path("checkpoints"))
    save(checkpoints, 1)
    checkpoints.close()
    assert on_disk(tmp_path) == [1]


def test_the_best_is_still_known_after_a_restart(open_checkpoints, tmp_path):
    save(open_checkpoints(), 1, accuracy=0.9)
    save(open_checkpoints(), 2, 3, accuracy=0.5)
    checkpoints = open_checkpoints()
    save(checkpoints, 4)
    assert on_disk(tmp_path) == [1, 3, 4]
    assert checkpoints.best_step == 1
