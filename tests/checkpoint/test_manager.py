"""Checkpoints: exact, on any number of devices, the right ones kept, damage survived."""

import gc
import json
import logging
import os
import re
import resource
import shutil
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alexnet_jax.checkpoint import checksums, manager
from alexnet_jax.checkpoint.manager import Checkpoints
from alexnet_jax.cli.quiet import silence_orbax
from alexnet_jax.distributed import sharding
from alexnet_jax.errors import InputError, SaveFailed
from alexnet_jax.state import TrainState

silence_orbax()  # what saves that fail leave behind is printed when pytest ends

PROGRESS = {"train_seconds": 1.5}
ALL = sharding.replicated(sharding.make_mesh())


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

    mesh = sharding.make_mesh(jax.devices()[:devices])
    return jax.jit(create, out_shardings=sharding.replicated(mesh))()


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
    checkpoints.finish()


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(folder / "checkpoints")
    save(checkpoints, 1, 2)
    checkpoints.close()
    return folder


@pytest.fixture
def one_and_two(saved_once, tmp_path):
    """Copies of the checkpoints 1 and 2, to be damaged."""
    shutil.copytree(saved_once, tmp_path, dirs_exist_ok=True)


def on_disk(tmp_path):
    return sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())


def damage(folder, how):
    """Spoils a checkpoint as a full disk or a careless person would."""
    files = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = [path for path in files if path.parent.name == "d"]
    if how == "truncated":
        for file in data:  # all, for some of them are copies that nothing reads
            os.truncate(file, file.stat().st_size // 2)
    elif how == "marker":
        (folder / "commit_success.txt").unlink()
    elif how == "gone":
        shutil.rmtree(folder)
    elif how == "half":
        for file in files[::2]:
            file.unlink()
    elif how == "zeros":
        for file in files:
            os.truncate(file, 0)
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
    restored, progress = open_checkpoints().restore(lambda: template, ALL)
    assert_same(restored, state)
    assert progress == PROGRESS
    np.testing.assert_array_equal(
        jax.random.normal(restored.key, 4), jax.random.normal(state.key, 4)
    )
    assert jax.tree.structure(restored) == jax.tree.structure(state)


@pytest.mark.parametrize(("before", "after"), [(1, 8), (8, 2), (2, 1)])
def test_goes_on_with_another_number_of_devices(open_checkpoints, before, after):
    save(open_checkpoints(), 3, devices=before)
    everywhere = sharding.replicated(sharding.make_mesh(jax.devices()[:after]))
    restored, _ = open_checkpoints().restore(make_state, everywhere)
    assert_same(restored, make_state(3))
    for leaf in jax.tree.leaves(restored.replace(key=())):
        assert leaf.sharding == everywhere


def test_the_key_lies_with_the_rest(open_checkpoints):
    save(open_checkpoints(), 3, devices=1)
    restored, _ = open_checkpoints().restore(make_state, ALL)
    assert restored.key.sharding.device_set == set(jax.devices())


def test_none_where_nothing_was_saved(open_checkpoints):
    checkpoints = open_checkpoints()
    assert checkpoints.restore(make_state, ALL) is None
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
def test_refuses_another_network_or_optimizer(
    open_checkpoints, one_and_two, tmp_path, other, message
):
    with pytest.raises(InputError, match=message):
        open_checkpoints().restore(lambda: make_state(**other), ALL)
    assert on_disk(tmp_path) == [1, 2]


# Orbax leaves the other reads of a damaged checkpoint behind, which complain when collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "how",
    [
        *("truncated", "no arrays", "no metadata", "params", "rest", "progress", "empty"),
        *("zeros", "half", "marker", "gone"),
    ],
)
def test_the_one_before_stands_in_for_a_damaged_one(
    open_checkpoints, one_and_two, tmp_path, caplog, how
):
    damage(tmp_path / "checkpoints" / "2", how)
    checkpoints = open_checkpoints()
    with caplog.at_level(logging.WARNING, "alexnet_jax"):
        restored, _ = checkpoints.restore(make_state, ALL)
    assert_same(restored, make_state(1))
    assert f"checkpoint 2 is {'gone' if how == 'gone' else 'damaged'}" in caplog.text
    save(checkpoints, 2)  # the run comes to that step again
    restored, _ = open_checkpoints().restore(make_state, ALL)
    assert_same(restored, make_state(2))
    gc.collect()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_nothing_is_lost_or_begun_anew_when_all_are_damaged(
    open_checkpoints, one_and_two, tmp_path
):
    for step in ("1", "2"):
        damage(tmp_path / "checkpoints" / step, "truncated")
    with pytest.raises(InputError, match=r"none of the checkpoints in .* can be read"):
        open_checkpoints().restore(make_state, ALL)
    assert on_disk(tmp_path) == [1, 2]
    gc.collect()


@pytest.mark.parametrize(
    "error", [MemoryError("no more"), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no more")]
)
def test_no_checkpoint_goes_away_for_want_of_memory(
    open_checkpoints, one_and_two, tmp_path, monkeypatch, error
):
    def refuse(*_):
        raise error

    monkeypatch.setattr(checksums, "check", refuse)
    with pytest.raises(InputError, match=r"checkpoint 2 in .* in memory \(.*no more\); nothing is"):
        open_checkpoints().restore(make_state, ALL)
    assert on_disk(tmp_path) == [1, 2]


def rewrite(folder, change):
    """Applies a change to the JSON beside the arrays."""
    path = folder / "progress" / "metadata"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def seal(content):
    content.pop("checksum")
    return checksums.seal(content)


def other_checksum(content):
    content["arrays"]["params/fc/kernel"]["crc32"] = "00000000"
    return seal(content)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (other_checksum, "params/fc/kernel was saved with the checksum 00000000 and has [0-9a-f]"),
        (lambda c: c | {"progress": {"train_seconds": 9.5}}, "does not agree with its checksum"),
        # One flipped bit must not make it look as if an earlier version had written it.
        (lambda c: {k.replace("arrays", "arrayr"): v for k, v in c.items()}, "does not agree"),
        (lambda c: {k.replace("checksum", "checksul"): v for k, v in c.items()}, "does not agree"),
    ],
)
def test_checksums_say_what_is_damaged(
    open_checkpoints, one_and_two, tmp_path, caplog, change, says
):
    rewrite(tmp_path / "checkpoints" / "2", change)
    restored, _ = open_checkpoints().restore(make_state, ALL)
    assert_same(restored, make_state(1))
    assert re.search(rf"checkpoint 2 is damaged \(.*{says}", caplog.text)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_every_array_is_protected(open_checkpoints, one_and_two, tmp_path):
    """A checkpoint whose folder holds another one's arrays; what Orbax alone would restore."""
    checkpoints = tmp_path / "checkpoints"
    for item in ("params", "rest"):
        shutil.rmtree(checkpoints / "2" / item)
        shutil.copytree(checkpoints / "1" / item, checkpoints / "2" / item)
        open_one = open_checkpoints()
        restored, _ = open_one.restore(make_state, ALL)
        assert_same(restored, make_state(1))
        save(open_one, 2)


def test_one_without_checksums_is_used_with_a_warning(open_checkpoints, tmp_path, caplog):
    save(open_checkpoints(), 1)
    rewrite(tmp_path / "checkpoints" / "1", lambda content: content["progress"])
    restored, progress = open_checkpoints().restore(make_state, ALL)
    assert_same(restored, make_state(1))
    assert progress == PROGRESS
    assert "checkpoint 1 is of an earlier version and has no checksums" in caplog.text
    with pytest.raises(InputError, match=r"params/fc/bias is float32\[3\] there and bfloat16"):
        open_checkpoints().restore(lambda: make_state(dtype=jnp.bfloat16), ALL)


def test_bfloat16_comes_back(open_checkpoints):
    save(open_checkpoints(), 1, dtype=jnp.bfloat16)
    restored, _ = open_checkpoints().restore(lambda: make_state(dtype=jnp.bfloat16), ALL)
    assert_same(restored, make_state(1, dtype=jnp.bfloat16))


@pytest.mark.parametrize("text", ["{", '{"validation_accuracy": 0.95, "checksum": "aa6969da"}'])
def test_a_damaged_accuracy_makes_no_best(open_checkpoints, tmp_path, caplog, text):
    checkpoints = open_checkpoints()
    save(checkpoints, 1, accuracy=0.5)
    save(checkpoints, 2, accuracy=0.7)
    (tmp_path / "checkpoints" / "1" / "metrics" / "metrics").write_text(text)
    checkpoints = open_checkpoints()
    checkpoints.open()
    assert checkpoints.best_step == 2
    assert "the accuracy of checkpoint 1 is damaged" in caplog.text


@pytest.mark.parametrize("lost", ["checkpoints", "checkpoints/*"])
def test_all_gone_is_no_new_run(open_checkpoints, one_and_two, tmp_path, lost):
    for path in tmp_path.glob(lost):
        shutil.rmtree(path)
    with pytest.raises(InputError, match=r"checkpoints is empty, and held step 2 of this run"):
        open_checkpoints().restore(make_state, ALL)


def test_what_a_kill_left_half_written_goes_away(open_checkpoints, tmp_path):
    save(open_checkpoints(), 1)
    stale = [tmp_path / "checkpoints" / f"{step}.orbax-checkpoint-tmp" for step in (2, 3)]
    for path in stale:
        shutil.copytree(tmp_path / "checkpoints" / "1", path)
    checkpoints = open_checkpoints()
    restored, _ = checkpoints.restore(make_state, ALL)
    assert_same(restored, make_state(1))
    save(checkpoints, 2)
    assert not any(path.exists() for path in stale)
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
    checkpoints.finish()
    restored, _ = open_checkpoints().restore(lambda: make_state(width=250_000), ALL)
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


@contextmanager
def small_files():
    """No file may grow beyond 100 bytes, for this process alone; as a full disk, it fails late."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def read_only(folder):
    """Nothing can be made in the folder, by nobody; root may write anywhere."""
    root = os.geteuid() == 0
    folder.chmod(0o555)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


@pytest.fixture
def reachable(tmp_path):
    """For others than its owner, too: pytest's folders are private."""
    folder = tmp_path
    while not folder.stat().st_mode & 0o001:
        folder.chmod(0o755)
        folder = folder.parent


@pytest.fixture(params=["full", "read-only"])
def trouble(request, tmp_path, reachable):
    if request.param == "full":
        return small_files
    return lambda: read_only(tmp_path / "checkpoints")


def wait_for_the_save(checkpoints, caplog):
    deadline = time.monotonic() + 60
    while "could not be saved" not in caplog.text:
        assert time.monotonic() < deadline
        checkpoints.poll()
        time.sleep(0.01)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_save_that_fails_is_said_and_the_next_stands_in(
    open_checkpoints, tmp_path, caplog, trouble
):
    caplog.set_level(logging.INFO, "alexnet_jax")
    checkpoints = open_checkpoints()
    save(checkpoints, 1, 2)
    states = {step: make_state(step) for step in (3, 4)}  # also compiling writes files
    with trouble():
        for step, state in states.items():
            caplog.clear()
            checkpoints.save(state, PROGRESS)
            wait_for_the_save(checkpoints, caplog)
            assert re.search(
                rf"Checkpoint {step} could not be saved \((File too large|Permission denied)\)",
                caplog.text,
            ), caplog.text
    assert on_disk(tmp_path) == [1, 2]
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))
    save(checkpoints, 5)
    assert "Checkpoint 5 is saved; the disk can be written again." in caplog.text
    assert on_disk(tmp_path) == [2, 5]
    restored, _ = open_checkpoints().restore(make_state, ALL)
    assert_same(restored, make_state(5))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_last_save_is_tried_again(open_checkpoints, monkeypatch, caplog, trouble):
    checkpoints = open_checkpoints()
    save(checkpoints, 1)
    state = make_state(2)
    with ExitStack() as stack:
        stack.enter_context(trouble())
        checkpoints.save(state, PROGRESS)
        wait_for_the_save(checkpoints, caplog)
        monkeypatch.setattr(manager.time, "sleep", lambda _: stack.close())  # there is room
        checkpoints.finish()
    restored, _ = open_checkpoints().restore(make_state, ALL)
    assert_same(restored, make_state(2))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_last_save_that_never_succeeds_is_an_error(
    open_checkpoints, monkeypatch, tmp_path, trouble
):
    monkeypatch.setattr(manager, "ATTEMPT_SECONDS", 0.0)
    checkpoints = open_checkpoints()
    save(checkpoints, 1)
    state = make_state(2)
    with trouble():
        checkpoints.save(state, PROGRESS)
        with pytest.raises(SaveFailed, match=r"of step 2, could not .* is of step 1\. Fix this"):
            checkpoints.finish()
    assert on_disk(tmp_path) == [1]
