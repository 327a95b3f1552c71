"""Streamed data: the batches of the in-memory path, whatever reads them, and what may go wrong."""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax.config import TrainConfig, default_config, validate
from alexnet_jax.data import load, streaming
from alexnet_jax.data.in_memory import InMemoryDataset, memory_limit
from alexnet_jax.data.load import load_data
from alexnet_jax.data.sampling import epoch_order, padded_batches
from alexnet_jax.data.streaming import (
    Reader,
    StreamedBatches,
    StreamedDataset,
    process_share,
    training_rows,
)
from alexnet_jax.distributed import sharding
from alexnet_jax.errors import InputError

KEY = jax.random.key(3)


class Numbers:
    """A source whose images tell their index, and whose labels the process that read them."""

    class_names = ("a", "b")

    def __init__(self, size=50, image_shape=(2, 3, 3), damaged=None):
        self.size, self.image_shape, self.damaged = size, image_shape, damaged

    def __len__(self):
        return self.size

    def read(self, indices):
        if self.damaged in indices:
            raise InputError(f"Image {self.damaged} of numbers cannot be decoded.")
        images = np.empty((len(indices), *self.image_shape), np.uint8)
        images[:] = np.reshape(indices, (-1, 1, 1, 1)) % 256
        return images, np.full(len(indices), os.getpid(), np.int32)


def reader(workers=0, devices=2):
    return Reader(workers, 2, sharding.make_mesh(jax.devices()[:devices]))


def dataset(indices, batch_size, epochs, workers=0, source=None):
    config = TrainConfig(batch_size=batch_size, epochs=epochs, steps_per_dispatch=1)
    return StreamedDataset(source or Numbers(), np.asarray(indices), config, reader(workers))


@contextmanager
def stream(data, step, key=KEY):
    """The batches of a data set whose feeds have one each."""
    with data.feeds(key, step) as feeds:
        yield (feed.batch(0) for _, feed in feeds)


def in_memory_images(indices, batch_size, step):
    """What the in-memory path trains on at a step."""
    steps_per_epoch = len(indices) // batch_size
    order = np.asarray(epoch_order(KEY, jnp.int32(step // steps_per_epoch), len(indices)))
    start = step % steps_per_epoch * batch_size
    return Numbers().read(np.asarray(indices)[order[start : start + batch_size]])[0]


@pytest.mark.parametrize(("workers", "step"), [(0, 0), (0, 9), (0, 11), (2, 5)])
def test_batches_are_those_of_the_in_memory_path_from_any_step(workers, step, monkeypatch):
    """Over the ends of epochs, and of the stretches that workers are told at once."""
    indices, batch_size, epochs = np.arange(3, 47, 2), 4, 4  # 5 steps of 4, and 2 images left over
    if not workers:  # which take seconds to begin anew
        monkeypatch.setattr(streaming, "STRETCH", 2 * len(indices))
    data = dataset(indices, batch_size, epochs, workers)
    readers = set()
    with stream(data, step) as batches:
        for batch in batches:
            np.testing.assert_array_equal(
                batch["image"], in_memory_images(indices, batch_size, step)
            )
            assert {n: (v.dtype, v.shape) for n, v in batch.items()} == {
                "image": (np.uint8, (4, 2, 3, 3)),
                "label": (np.int32, (4,)),
                "mask": (bool, (4,)),
            }
            assert batch["mask"].all()
            assert batch["image"].sharding.is_equivalent_to(sharding.split(data.reader.mesh), 4)
            readers.update(np.asarray(batch["label"]).tolist())
            step += 1
    assert step == 20
    assert (os.getpid() in readers) == (workers == 0)
    assert len(readers) >= max(1, workers)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_shares_of_all_processes_make_the_batches(processes):
    indices = np.arange(100, 130)
    whole = training_rows(KEY, indices, 8, range(1, 3))
    shares = [process_share(whole, process, processes) for process in range(processes)]
    assert {share.shape for share in shares} == {(6, 8 // processes)}
    np.testing.assert_array_equal(np.concatenate(shares, axis=1), whole)
    for epoch in whole.reshape(2, -1):
        assert len(set(epoch)) == 24


def test_a_process_reads_what_its_devices_hold():
    """Each device of the mesh finds its rows in the share of the process that it belongs to."""
    rows = np.arange(32).reshape(2, 16)
    placed = sharding.split(sharding.make_mesh()).devices_indices_map((16,))
    for number, device in enumerate(jax.devices()):
        held = rows[:, placed[device][0]]
        share = process_share(rows, number // 2, 4)  # as if two devices were a process
        assert np.isin(held, share).all()


@pytest.mark.parametrize("count", [1, 8, 11])
def test_images_to_measure_on_come_in_order_each_once(count):
    indices = np.arange(count) * 2 + 1
    batched = StreamedBatches(Numbers(), indices, 4, reader())
    images, labels = Numbers().read(indices)
    for _ in range(2):  # and again
        found = list(batched)
        assert len(found) == len(batched)
        for batch, expected in zip(found, padded_batches(images, labels, 4), strict=True):
            for name, value in expected.items():
                np.testing.assert_array_equal(batch[name], value)


def test_nothing_to_measure_on_is_no_batches():
    batched = StreamedBatches(Numbers(), np.arange(0), 4, reader(devices=1))
    assert not batched
    assert list(batched) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_decoded_ends_it_with_a_sentence(workers):
    data = dataset(range(50), 4, 1, workers, Numbers(damaged=17))
    with stream(data, 0) as batches, pytest.raises(InputError) as caught:
        deque(batches, maxlen=0)
    assert str(caught.value) == "Image 17 of numbers cannot be decoded."


def test_a_worker_that_dies_ends_it_with_a_sentence():
    data = dataset(range(50), 4, 1000, workers=1)
    with stream(data, 0) as batches:
        os.kill(int(next(batches)["label"][0]), signal.SIGKILL)
        with pytest.raises(InputError, match=r"A process that reads images died: .* out of memory"):
            deque(batches, maxlen=0)


def test_workers_leave_signals_to_the_run_and_do_not_outlive_it(tmp_path):
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
if __name__ == "__main__":
    import jax
    import test_streaming as t
    with t.stream(t.dataset(range(50), 4, 10**5, workers=1), 0) as data:
        print(int(next(data)["label"][0]), flush=True)
        for _ in data:
            time.sleep(0.1)
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    run = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    worker = int(run.stdout.readline())
    os.kill(worker, signal.SIGINT)
    os.kill(worker, signal.SIGTERM)
    time.sleep(0.3)
    assert is_running(worker)
    run.kill()
    _, errors = run.communicate(timeout=60)
    deadline = time.monotonic() + 60  # it takes a moment; the rest is for a machine under load
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(worker)
    assert "Traceback" not in errors


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_is_flat_for_ten_times_the_budget():
    budget = 48 * 2**20
    image_shape = (64, 64, 3)
    source = Numbers(10 * budget // np.prod(image_shape), image_shape)
    with stream(dataset(range(len(source)), 256, 2, 0, source), 0) as batches:
        for _ in range(10):
            next(batches)
        before = resident_bytes()
        largest = max(resident_bytes() for _ in batches)
    assert largest - before < budget


def digits(data_dir, **changes):
    config = default_config()
    config.data.name = "digits"
    config.data.data_dir = str(data_dir)
    config.data.image_size = 8
    config.data.workers = 0
    config.train.epochs = 1
    config.eval.batch_size = 100
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.parametrize("fraction", [0.0, 0.1])
def test_auto_streams_what_does_not_fit(fraction, tmp_path, monkeypatch):
    """Train alone, then all; what a run is told of the data is the same."""
    mesh = sharding.make_mesh(jax.devices()[:2])
    config = digits(tmp_path, **{"data.validation_fraction": fraction})
    whole = load_data(validate(config), mesh)
    assert isinstance(whole.train, InMemoryDataset)
    for limit in (8 * 8 * 3 * 400, 0):
        monkeypatch.setattr(load, "memory_limit", lambda mesh, limit=limit: limit)
        partly = load_data(validate(config), mesh)
        assert isinstance(partly.train, StreamedDataset)
        assert len(partly.validation) == (2 if fraction else 0)
        assert isinstance(partly.validation, StreamedBatches) == (fraction > 0 and limit == 0)
        assert isinstance(partly.test(), StreamedBatches) == (limit == 0)
        assert partly.info == whole.info
        for name in ("validation", "test"):
            ours, theirs = (getattr(data, name) for data in (partly, whole))
            if name == "test":
                ours, theirs = ours(), theirs()
            for one, other in zip(ours, theirs, strict=True):
                jax.tree.map(np.testing.assert_array_equal, one, other)
    config.data.in_memory = "on"
    assert isinstance(load_data(validate(config), mesh).train, InMemoryDataset)


def test_what_may_be_in_memory_leaves_room():
    mesh = sharding.make_mesh()
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < memory_limit(mesh) * len(jax.devices()) <= total / 4


def test_reading_is_ahead_of_its_use():
    """While one batch is in use, the next are read and placed."""
    placed = []
    rows = np.arange(40).reshape(10, 4)

    def place(batch):
        placed.append(0)

    one_ahead = Reader(0, 1, sharding.make_mesh())
    with one_ahead.stream(Numbers(), rows, place) as stream:
        next(stream)
        deadline = time.monotonic() + 60
        while len(placed) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert 3 <= len(placed) <= 4  # the one in use, two that wait, one in hand


@pytest.mark.parametrize("several", [1, 2])
def test_both_ways_feed_the_same_batches_from_any_step(tmp_path, several):
    mesh = sharding.make_mesh(jax.devices()[:2])
    config = digits(
        tmp_path,
        **{"train.batch_size": 256, "train.epochs": 2, "train.steps_per_dispatch": several},
    )
    one = load_data(validate(config), mesh).train
    config.data.in_memory = "off"
    other = load_data(validate(config), mesh).train
    ends = []
    with one.feeds(KEY, 1) as arrays, other.feeds(KEY, 1) as streamed:
        for (end, ours), (same_end, theirs) in zip(arrays, streamed, strict=True):
            ends.append(end)
            assert same_end == end
            assert ours.num_steps == theirs.num_steps
            assert ours.rows.sharding.is_fully_replicated
            for i in range(ours.num_steps):
                jax.tree.map(np.testing.assert_array_equal, ours.batch(i), theirs.batch(i))
    assert ends == ([2, 4, 5, 7, 9, 10] if several == 2 else list(range(2, 11)))
