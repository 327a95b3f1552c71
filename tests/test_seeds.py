"""Many seeds in one run: each is what its own run is, saved and resumed as exactly."""

import re

import jax
import numpy as np
import pytest
from trained_run import records, saved, stopped_at

from alexnet_jax import seeds, train, trainer
from alexnet_jax.config import default_config, validate
from alexnet_jax.data import in_memory
from alexnet_jax.data.load import load_data
from alexnet_jax.distributed import sharding
from alexnet_jax.errors import Diverged, InputError, Interrupted
from alexnet_jax.optim.plateau import plateau_factor

pytestmark = [
    pytest.mark.usefixtures("quick_runs"),
    # Orbax and TensorStore leave their event loops to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

MAKE_MESH = sharding.make_mesh
SEEDS = (5, 6)
LAST = 8  # step


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


def tiny_config(data_dir, seed=SEEDS[0], num_seeds=2):
    config = default_config()
    config.seed, config.num_seeds = seed, num_seeds
    config.data.name = "digits"
    config.data.data_dir = data_dir
    config.data.image_size = 8
    config.augment.crop_padding = 1
    config.model.update(
        {"features": (8,), "kernels": (3,), "strides": (1,), "pools": (True,), "hidden": (16,)}
    )
    config.model.norm = "batch"
    config.model.whitening = 2
    config.model.dropout = 0.1
    config.optimizer.learning_rate = 1e-2
    config.train.batch_size = 320
    config.train.epochs = 2
    config.train.ema_decay = 0.5
    config.writers.tensorboard = False
    return config


@pytest.fixture(scope="module")
def both(data_dir, tmp_path_factory, quick_runs):
    folder = tmp_path_factory.mktemp("runs") / "both"
    return folder, train.run(tiny_config(data_dir), folder)


@pytest.fixture(scope="module")
def alone(data_dir, tmp_path_factory, quick_runs):
    """A run of its own for each seed."""
    folders = [tmp_path_factory.mktemp("runs") / str(seed) for seed in SEEDS]
    return [
        (folder, train.run(tiny_config(data_dir, seed, 1), folder))
        for seed, folder in zip(SEEDS, folders, strict=True)
    ]


def test_each_replica_is_bit_equal_to_its_own_run(both, alone):
    together = saved(both[0], LAST)
    for index, (folder, _) in enumerate(alone):
        ours, theirs = jax.tree.leaves(seeds.pick(together, index)), saved(folder, LAST)
        for array, its_twin in zip(ours, jax.tree.leaves(theirs), strict=True):
            np.testing.assert_array_equal(array, its_twin)
    first, second = (saved(folder, LAST)["params"]["conv1"]["kernel"] for folder, _ in alone)
    assert (np.asarray(first) != np.asarray(second)).any()


def assert_summarises(record, singles):
    for figure in ("loss", "accuracy"):
        values = [single[figure] for single in singles]
        assert record[f"{figure}_each"] == values
        assert record[figure] == pytest.approx(np.mean(values))
        deviation = abs(values[0] - values[1]) / 2**0.5
        assert record[f"{figure}_deviation"] == pytest.approx(deviation)


def test_figures_are_mean_deviation_and_each(both, alone):
    for record, *singles in zip(records(both[0]), *(records(f) for f, _ in alone), strict=True):
        assert record["split"] == singles[0]["split"]
        assert record["step"] == singles[0]["step"]
        assert_summarises(record, singles)
        if record["split"] == "train":
            assert record["images"] == 2 * singles[0]["images"]
    results = both[1]
    singles = [result for _, result in alone]
    assert results["seeds"] == list(SEEDS)
    assert results["parameters"] == singles[0]["parameters"]
    for split in ("validation", "validation_ema", "test", "test_ema"):
        assert_summarises(results[split], [single[split] for single in singles])
        confusion = sum(np.array(single[split]["confusion"]) for single in singles)
        np.testing.assert_array_equal(results[split]["confusion"], confusion)


def test_stopped_and_resumed_is_bit_equal(both, data_dir, tmp_path, monkeypatch):
    config = tiny_config(data_dir)
    with stopped_at(2), pytest.raises(Interrupted) as stop:
        train.run(config, tmp_path / "run")
    assert stop.value.step % 4
    monkeypatch.setattr(sharding, "make_mesh", lambda: MAKE_MESH(jax.devices()[:2]))
    train.run(config, tmp_path / "run")
    ours, theirs = saved(tmp_path / "run", LAST), saved(both[0], LAST)
    for array, its_twin in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_array_equal(array, its_twin)
    assert records(tmp_path / "run") == records(both[0])


@pytest.mark.parametrize("devices", [2])  # 1 and 4 hold, too, and take half a minute each
def test_at_once_is_equal_to_rounding(alone, data_dir, tmp_path, monkeypatch, devices):
    """As on accelerators: by `vmap`, over devices where these can share the replicas."""
    mesh = MAKE_MESH(jax.devices()[:devices])
    monkeypatch.setattr(sharding, "make_mesh", lambda: mesh)
    monkeypatch.setattr(sharding, "on_cpu", lambda mesh: False)
    monkeypatch.setattr(in_memory, "ACCELERATOR_STEPS_PER_DISPATCH", 2)
    shards = []

    def look(info):
        kernel = info.state.params["fc1"]["kernel"]
        shards.append(kernel.sharding.shard_shape(kernel.shape))

    train.run(tiny_config(data_dir), tmp_path / "run", hooks=[look])
    assert shards[-1] == ((1 if devices == 2 else 2), 128, 16)
    together = saved(tmp_path / "run", LAST)
    for index, (folder, _) in enumerate(alone):
        ours, theirs = seeds.pick(together["params"], index), saved(folder, LAST)["params"]
        for array, its_twin in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
            difference = np.linalg.norm(np.asarray(array) - np.asarray(its_twin))
            assert difference <= 1e-3 * np.linalg.norm(np.asarray(its_twin)) + 1e-6


def test_a_diverging_replica_is_named(data_dir, tmp_path, monkeypatch):
    def break_one(info):
        if info.step == 1:
            bias = info.state.params["fc1"]["bias"].at[1].set(np.nan)
            params = info.state.params | {"fc1": info.state.params["fc1"] | {"bias": bias}}
            info.state = info.state.replace(params=params)

    with pytest.raises(Diverged, match=r"the loss of seed 6 is nan at step 2,"):
        train.run(tiny_config(data_dir), tmp_path / "loss", hooks=[break_one])

    config = tiny_config(data_dir)
    config.checkpoint.every_seconds = 1e-6
    with pytest.raises(Diverged, match=r"params/fc1/bias of seed 6 is not finite at step 1,"):
        train.run(config, tmp_path / "state", hooks=[break_one])


def test_the_log_says_mean_and_deviation(both, alone):
    values = [result["test_ema"]["accuracy"] for _, result in alone]
    deviation = abs(values[0] - values[1]) / 2**0.5
    said = (both[0] / "log.txt").read_text()
    assert "Training 2 seeds from 5 on, sequentially." in said
    assert re.search(
        rf"test_ema .* accuracy {100 * np.mean(values):.2f}% \(std {100 * deviation:.2f}\)",
        said,
    )


def test_many_seeds_of_streamed_images_are_refused(data_dir, tmp_path):
    config = tiny_config(data_dir)
    config.data.in_memory = "off"
    config.data.workers = 0
    with pytest.raises(InputError, match=r"config\.num_seeds is 2, and the images are streamed"):
        train.run(config, tmp_path / "run")


@pytest.mark.parametrize("seed", [0, 2**31 + 3])
def test_a_traced_seed_gives_the_same_key(seed):
    keys = jax.lax.map(jax.random.key, np.array(seeds.numbers(seed, 2), np.uint32))
    for index in range(2):
        np.testing.assert_array_equal(
            jax.random.key_data(keys[index]), jax.random.key_data(jax.random.key(seed + index))
        )


def test_each_replica_has_a_plateau_of_its_own(data_dir):
    config = tiny_config(data_dir)
    config.optimizer.update({"schedule": "plateau", "plateau_patience": 1, "step_factor": 0.5})
    mesh = sharding.make_mesh()
    config = validate(config)
    made = trainer.Trainer.create(config, load_data(config, mesh), mesh)
    states = made.init({})
    for accuracies in ([0.5, 0.5], [0.6, 0.4]):  # the second no longer improves
        states = made.after_validation(states, np.array(accuracies, np.float32))
    factors = [plateau_factor(made.pick(states, i).opt_state) for i in (0, 1)]
    assert factors == [1.0, 0.5]
    assert made.learning_rate(states, 1) == pytest.approx(0.75 * 1e-2)
