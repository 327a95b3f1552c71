"""Fine-tuning: a run begins as the network of another one, and what does not fit is refused."""

import json
import shutil
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trained_run import saved, stopped_at

from alexnet_jax import train
from alexnet_jax.checkpoint.initialize_from import InitialWeights, read_initial_weights
from alexnet_jax.checkpoint.manager import Checkpoints
from alexnet_jax.config import default_config, validate
from alexnet_jax.distributed import sharding
from alexnet_jax.errors import InputError, Interrupted
from alexnet_jax.inference import predictor
from alexnet_jax.models import create_model
from alexnet_jax.run import directory, files, writers
from alexnet_jax.state import create_state
from configs import finetune

ROOT = Path(__file__).parents[2]
SIDE = 8
MEAN, DEVIATION = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)

MAKE_MESH = sharding.make_mesh

pytestmark = [
    pytest.mark.usefixtures("quick_runs"),
    # Orbax and TensorStore leave their event loops to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def tiny(**options):
    config = default_config()
    config.data.image_size = SIDE
    config.augment.crop_padding = 1
    config.model.update({"features": (8,) * 5, "hidden": (16, 16), "norm": "batch"})
    config.model.update(options)
    return config


def blank(config, classes=10):
    model = create_model(config.model, num_classes=classes)
    return jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, SIDE, SIDE, 3)), train=False)
    )


def drawn(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.uniform(0.5, 1, x.shape).astype(np.float32), shapes)


@pytest.fixture
def source(tmp_path):
    """The run folder of a network with 4 classes and drawn weights, at step 7."""
    return make_source(tmp_path / "source")


def make_source(folder, seed=0, **options):
    config = tiny(**options)
    model = create_model(config.model, num_classes=4)
    state = jax.eval_shape(lambda: create_state(model, optax.sgd(0.1), (SIDE, SIDE, 3), 0))
    variables = drawn(state.variables, seed)
    with directory.RunDirectory.open(folder, config):
        info = {"name": "x", "class_names": list("abcd"), "image_shape": [SIDE, SIDE, 3]}
        info |= {"mean": MEAN, "deviation": DEVIATION, "checksums": {}, "images": {}}
        files.write_json(folder / directory.DATASET, info)
        with closing(Checkpoints(folder / directory.CHECKPOINTS)) as checkpoints:
            params = variables.pop("params")
            state = state.replace(
                step=np.int32(7),
                params=params,
                model_state=variables,
                opt_state=optax.sgd(0.1).init(params),
                key=jax.random.key(0),
            )
            checkpoints.save(jax.tree.map(jax.numpy.asarray, state), {"train_seconds": 0.0})
            checkpoints.finish()
    return folder


def start_of(variables, anew=("logits/*",)):
    return InitialWeights(variables, anew, "runs/source")


def test_all_but_the_head_fits():
    variables = drawn(blank(tiny(), 4))
    found = start_of(variables).select(blank(tiny(), 10))
    assert found["params"].keys() == {"fc1", "fc2"} | {
        f"{n}{i}" for n in ("conv", "norm") for i in range(1, 6)
    }
    assert found["batch_stats"] == variables["batch_stats"]
    kept = start_of(variables, anew=()).select(blank(tiny(), 4))
    assert kept == variables


@pytest.mark.parametrize(
    ("here", "anew", "message"),
    [
        (
            {"features": (8, 8, 9, 8, 8)},
            ("logits/*",),
            r"conv3/kernel is \[3, 3, 8, 8\] .* \[3, 3, 8, 9\]",
        ),
        ({"norm": "none"}, ("logits/*",), "conv1/bias is missing in runs/source"),
        ({"hidden": (16,)}, ("logits/*",), r"fc2/kernel is \[16, 16\] in .* missing here"),
        ({}, (), r"logits/kernel is \[16, 4\] in runs/source.* \[16, 10\] here"),
        ({}, ("head/*",), "'head/[*]', which matches none of the parameters: .*conv1/kernel"),
        (
            {"pools": (True, False, False, False, True)},
            ("logits/*",),
            r"fc1/kernel .* image size",
        ),
    ],
)
def test_what_does_not_fit_is_refused(here, anew, message):
    variables = drawn(blank(tiny(), 4))
    with pytest.raises(InputError, match=message):
        start_of(variables, anew).select(blank(tiny(**here)))


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    config = tiny()
    config.init.from_run = str(tmp_path / "nothing")
    with pytest.raises(InputError, match="nothing"):
        read_initial_weights(config, tmp_path / "run")


def test_nothing_named_is_no_start(tmp_path):
    start = read_initial_weights(tiny(), tmp_path)
    assert (start.select({"params": {}}), start.info) == ({}, {})


def test_another_source_is_noticed_until_the_run_has_saved(source, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    config = tiny()
    config.init.from_run = str(source)
    start = read_initial_weights(config, run)
    files.write_json(run / directory.DATASET, start.info)
    shutil.rmtree(source)
    make_source(source, seed=1)
    other = read_initial_weights(config, run)  # nothing is trained yet
    assert other.info["start"] != start.info["start"]
    (run / directory.METRICS).write_text("{}\n")
    with pytest.raises(InputError, match=f"step 7 .*{start.info['start']['checksum']} and are"):
        read_initial_weights(config, run)
    shutil.rmtree(source)
    (run / "saved.json").write_text('{"step": 1}')
    assert read_initial_weights(config, run).info == start.info


def test_other_options_of_the_network_are_said(source, tmp_path, caplog):
    config = tiny(pool_window=3, dropout=0.1)
    config.init.from_run = str(source)
    with caplog.at_level("WARNING"):
        read_initial_weights(config, tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        "config.model.pool_window is 2 there and 3 here."
    ]


def test_images_are_normalised_as_the_network_knows_them(source, tmp_path, caplog):
    config = tiny()
    config.init.from_run = str(source)
    config.data.normalization = "subtract_mean"
    with caplog.at_level("WARNING"):
        start = read_initial_weights(config, tmp_path)
    assert (start.info["mean"], start.info["deviation"]) == (list(MEAN), list(DEVIATION))
    assert [record.getMessage() for record in caplog.records] == [
        "config.data.normalization is standardize there and subtract_mean here; images are "
        "normalized as there."
    ]
    options = files.read_json(source / directory.CONFIG)
    files.write_json(source / directory.CONFIG, options | {"data.normalization": "subtract_mean"})
    assert finetune.get_config(str(source)).data.normalization == "subtract_mean"


def test_the_config_takes_the_network_from_the_run(source):
    config = finetune.get_config(str(source))
    validate(config)
    assert config.model == tiny().model
    assert (config.data.image_size, config.init.from_run) == (SIDE, str(source))


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(sharding, "make_mesh", lambda: MAKE_MESH(jax.devices()[:1]))


def test_a_fine_tuned_run_is_bit_equal_when_resumed(tmp_path, one_device):
    """With frozen layers, crops, shifted colours and a rate that goes by the validation images."""
    two = {"features": (8, 8), "kernels": (3, 3), "strides": (1, 1), "pools": (True, True)}
    source = make_source(tmp_path / "source", **two)  # five take longer to compile
    config = finetune.get_config(str(source))
    config.data.update({"name": "digits", "data_dir": str(tmp_path), "image_size": SIDE + 2})
    config.data.update({"crop_size": SIDE, "validation_fraction": 0.1})
    config.augment.pca_jitter = 0.1
    config.optimizer.update({"schedule": "plateau", "plateau_patience": 1, "step_factor": 0.5})
    config.optimizer.update({"frozen": ("conv*", "norm*"), "learning_rate": 0.5})
    config.optimizer.update({"name": "sgd_2012", "weight_decay": 5e-4, "warmup_epochs": 0.0})
    config.train.update({"batch_size": 256, "epochs": 4})
    config.writers.tensorboard = False
    train.run(config, tmp_path / "whole")

    info = json.loads((tmp_path / "whole" / "dataset.json").read_text())
    assert (tuple(info["mean"]), tuple(info["deviation"])) == (MEAN, DEVIATION)
    assert info["start"]["step"] == 7
    assert len(info["principal_colours"]) == 3
    begun, ended = predictor.load(source), predictor.load(tmp_path / "whole")
    for name, layer in ended.eval_state.params.items():
        for key, array in layer.items():
            if name == "logits":
                assert array.shape[-1] == 10
                continue
            same = (np.asarray(array) == np.asarray(begun.eval_state.params[name][key])).all()
            assert same == (not name.startswith("fc")), f"{name}/{key}"
    momenta = [
        x for x in jax.tree.leaves(saved(tmp_path / "whole", 20)["rest"]["opt_state"]) if x.ndim
    ]
    assert sum(x.size for x in momenta) == sum(
        x.size for name in ("fc1", "fc2", "logits") for x in ended.eval_state.params[name].values()
    )

    # The rate that each epoch should have, by the accuracies before it.
    records = writers.read_metrics(tmp_path / "whole" / "metrics.jsonl")
    best, factor, rates = -1.0, 1.0, []
    for accuracy in [r["accuracy"] for r in records if r["split"] == "validation"][:4]:
        rates += [0.5 * factor] * 5
        best, factor = max(best, accuracy), factor * (1.0 if accuracy > best else 0.5)
    assert [r["learning_rate"] for r in records if r["split"] == "train"] == rates
    assert len(set(rates)) > 1, "nothing is tested unless it changes"

    config.data.update({"in_memory": "off", "workers": 0})  # the same batches and colours
    with stopped_at(12), pytest.raises(Interrupted):
        train.run(config, tmp_path / "again")
    shutil.rmtree(source)  # it is not needed any more
    train.run(config, tmp_path / "again")
    trees = [jax.tree.leaves(saved(tmp_path / name, 20)) for name in ("whole", "again")]
    for one, other in zip(*trees, strict=True):
        np.testing.assert_array_equal(one, other)
