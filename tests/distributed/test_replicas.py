"""Many seeds in one run: each is what its own run is, saved and resumed as exactly."""

import re

import jax
import numpy as np
import pytest
from trained_run import records, saved, stopped_at

from alexnet_jax import models, state, train
from alexnet_jax.config import default_config
from alexnet_jax.distributed import replicas, sharding
from alexnet_jax.errors import Diverged, InputError, Interrupted
from alexnet_jax.optim import optimizers
from alexnet_jax.train import train_and_evaluate

pytestmark = [
    pytest.mark.usefixtures("quick_runs"),
    # Orbax and TensorStore leave their event loops to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

MAKE_MESH, ON_CPU = sharding.make_mesh, sharding.on_cpu
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
    return folder, train_and_evaluate(tiny_config(data_dir), folder)


@pytest.fixture(scope="module")
def alone(data_dir, tmp_path_factory, quick_runs):
    """A run of its own for each seed."""
    folders = [tmp_path_factory.mktemp("runs") / str(seed) for seed in SEEDS]
    return [
        (folder, train_and_evaluate(tiny_config(data_dir, seed, 1), folder))
        for seed, folder in zip(SEEDS, folders, strict=True)
    ]


def test_each_replica_is_bit_equal_to_its_own_run(both, alone):
    together = saved(both[0], LAST)
    for index, (folder, _) in enumerate(alone):
        ours, theirs = jax.tree.leaves(replicas.pick(together, index)), saved(folder, LAST)
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
        train_and_evaluate(config, tmp_path / "run")
    assert stop.value.step % 4
    monkeypatch.setattr(sharding, "make_mesh", lambda: MAKE_MESH(jax.devices()[:2]))
    train_and_evaluate(config, tmp_path / "run")
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
    monkeypatch.setattr(train, "ACCELERATOR_STEPS_PER_DISPATCH", 2)
    compiled, shards = replicas.compile_update, []

    def watched(*arguments, **options):
        update = compiled(*arguments, **options)

        def updating(states, feed):
            states, metrics = update(states, feed)
            shards.append(states.params["fc1"]["kernel"].sharding.shard_shape((2, 128, 16)))
            return states, metrics

        return updating

    monkeypatch.setattr(replicas, "compile_update", watched)
    config = tiny_config(data_dir)
    train_and_evaluate(config, tmp_path / "run")
    assert shards[-1] == ((1 if devices == 2 else 2), 128, 16)
    together = saved(tmp_path / "run", LAST)
    for index, (folder, _) in enumerate(alone):
        ours, theirs = replicas.pick(together["params"], index), saved(folder, LAST)["params"]
        for array, its_twin in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
            difference = np.linalg.norm(np.asarray(array) - np.asarray(its_twin))
            assert difference <= 1e-3 * np.linalg.norm(np.asarray(its_twin)) + 1e-6


def test_a_diverging_replica_is_named(data_dir, tmp_path, monkeypatch):
    config = tiny_config(data_dir)
    create = replicas.create

    def create_with_one_broken(create_one, seeds):
        states = create(create_one, seeds)
        bias = states.params["fc1"]["bias"].at[1].set(np.nan)
        return states.replace(params=states.params | {"fc1": states.params["fc1"] | {"bias": bias}})

    monkeypatch.setattr(replicas, "create", create_with_one_broken)
    with pytest.raises(Diverged, match=r"the loss of seed 6 is nan at step 1,"):
        train_and_evaluate(config, tmp_path / "run")


def test_the_log_says_mean_and_deviation(both, alone):
    values = [result["test_ema"]["accuracy"] for _, result in alone]
    deviation = abs(values[0] - values[1]) / 2**0.5
    said = (both[0] / "log.txt").read_text()
    assert "2 seeds from 5 on, in turn." in said
    assert re.search(
        rf"test_ema .* accuracy {100 * np.mean(values):.2f}% \(deviation {100 * deviation:.2f}\)",
        said,
    )


def test_what_is_not_finite_names_its_seeds():
    assert replicas.not_finite([1.0, np.nan, np.inf], 7) == " of seeds 8, 9"
    assert replicas.not_finite(np.nan, 7) == ""


def test_many_seeds_of_streamed_images_are_refused(data_dir, tmp_path):
    config = tiny_config(data_dir)
    config.data.in_memory = "off"
    config.data.workers = 0
    with pytest.raises(InputError, match=r"config\.num_seeds is 2, and the images are streamed"):
        train_and_evaluate(config, tmp_path / "run")


@pytest.mark.parametrize("seed", [0, 2**31 + 3])
def test_a_traced_seed_gives_the_same_key(seed):
    numbers = replicas.seeds(seed, 2)
    keys = jax.lax.map(jax.random.key, numbers)
    for index in range(2):
        np.testing.assert_array_equal(
            jax.random.key_data(keys[index]), jax.random.key_data(jax.random.key(seed + index))
        )


def test_each_replica_has_a_plateau_of_its_own(data_dir):
    config = tiny_config(data_dir)
    config.optimizer.update({"schedule": "plateau", "plateau_patience": 1, "step_factor": 0.5})
    model = models.create_model(config.model, num_classes=10)
    optimizer = optimizers.create_optimizer(config.optimizer, lambda _: 0.1)
    mesh = sharding.make_mesh()
    states = replicas.create(
        lambda seed: state.create_state(model, optimizer, image_shape=(8, 8, 3), seed=seed),
        replicas.seeds(SEEDS[0], 2),
    )
    validated = train._compile_validated(config, sharding.replicated(mesh))
    for accuracies in ([0.5, 0.5], [0.6, 0.4]):  # the second no longer improves
        states = validated(states, np.array(accuracies, np.float32))
    factors = [optimizers.plateau_factor(replicas.pick(states.opt_state, i)) for i in (0, 1)]
    assert factors == [1.0, 0.5]
