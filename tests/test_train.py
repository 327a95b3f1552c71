"""Whole runs on the digits, with a tiny network: results, resume, devices, what may go wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trained_run import records, saved, stopped_at

from alexnet_jax import evaluation, models, steps, train, trainer
from alexnet_jax.config import default_config, flatten, validate
from alexnet_jax.data import load
from alexnet_jax.data.augment import create_augment
from alexnet_jax.data.options import AugmentConfig
from alexnet_jax.data.source import Source, load_source
from alexnet_jax.distributed import sharding
from alexnet_jax.errors import Diverged, InputError, Interrupted
from alexnet_jax.experiments.report import finish, inputs, page
from alexnet_jax.inference import predictor
from alexnet_jax.inference.evaluate import evaluate_network
from alexnet_jax.plots import style
from alexnet_jax.run import files

pytestmark = [
    pytest.mark.usefixtures("quick_runs"),
    # Orbax and TensorStore leave their event loops to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


MAKE_MESH, WRITE_REPORT = sharding.make_mesh, page.write_report


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture
def config(data_dir):
    return tiny_config(data_dir)


def tiny_config(data_dir):
    config = default_config()
    config.data.name = "digits"
    config.data.data_dir = data_dir
    config.data.image_size = 8
    config.augment.crop_padding = 1
    config.augment.flip = False
    # Two convolutions: to trace and compile five is most of a run's time, and adds nothing here.
    config.model.features = (8, 8)
    config.model.kernels = (3, 3)
    config.model.strides = (1, 1)
    config.model.pools = (True, False)
    config.model.hidden = (16, 16)
    config.model.norm = "batch"
    config.model.dropout = 0.1
    config.optimizer.learning_rate = 1e-2
    config.train.batch_size = 128
    config.train.epochs = 3
    config.train.ema_decay = 0.5
    config.eval.batch_size = 100
    config.writers.tensorboard = False
    return config


def assert_same_run(one, other, step):
    arrays, others = (jax.tree.leaves(saved(folder, step)) for folder in (one, other))
    assert len(arrays) > 40
    for array, its_twin in zip(arrays, others, strict=True):
        np.testing.assert_array_equal(array, its_twin)
    assert records(one) == records(other)


@pytest.fixture(scope="module")
def read_and_measured():
    """What `whole_run` has read and when it has measured, in order."""
    return []


@pytest.fixture(scope="module")
def whole_run(data_dir, tmp_path_factory, quick_runs, read_and_measured):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    log, read_all, evaluate = read_and_measured, Source.read_all, evaluation.evaluate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Source, "read_all", lambda self, *a: log.append(self.name) or read_all(self, *a)
        )
        patch.setattr(evaluation, "evaluate", lambda *a: log.append("measure") or evaluate(*a))
        results = train.run(tiny_config(data_dir), folder)
    return folder, results


def test_a_run_learns_and_leaves_its_files(whole_run):
    folder, results = whole_run
    assert results["test_ema"]["accuracy"] > 0.25  # chance is 0.1, and the run is short
    assert results["step"] == 30
    assert json.loads((folder / "results.json").read_text()) == results
    assert np.sum(results["test"]["confusion"]) == 360
    stated = f"one image: {results['flops'] / 1e6:,.1f} million FLOPs\n"
    assert (folder / "model.txt").read_text().endswith(stated)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "Resuming" not in (folder / "log.txt").read_text()
    info = json.loads((folder / "dataset.json").read_text())
    assert info["images"] == {"train": 1295, "validation": 142, "test": 360}
    steps = [r["step"] for r in records(folder) if r["split"] == "train"]
    assert steps == list(range(1, 31))
    assert [r["step"] for r in records(folder) if r["split"] == "validation"] == [10, 20, 30]
    assert [r["split"] for r in records(folder)][-2:] == ["test", "test_ema"]


@pytest.mark.parametrize("split", ["test", "validation"])
def test_measured_again_a_run_has_the_same_results(whole_run, split):
    folder, results = whole_run
    network = predictor.load(folder)
    found = evaluate_network(network, split)
    assert found.images == {"test": 360, "validation": 142}[split]
    assert found.results.keys() == {split, f"{split}_ema"}
    for name, result in found.results.items():
        assert float(result["loss"]) == results[name]["loss"]
        assert float(result["accuracy"]) == results[name]["accuracy"]
        assert result["confusion"].tolist() == results[name]["confusion"]


def test_the_network_of_a_run_answers_as_it_was_measured(whole_run):
    folder, results = whole_run
    network = predictor.load(folder)
    images, labels = load_source(network.config.data, "test").read_all()
    shares = network.predict(images).probabilities
    confusion = np.zeros((10, 10), int)
    np.add.at(confusion, (labels, shares.argmax(axis=1)), 1)
    assert confusion.tolist() == results["test_ema"]["confusion"]
    loss = -np.log(shares[np.arange(360), labels]).mean()
    assert loss == pytest.approx(results["test_ema"]["loss"], rel=1e-4)


def test_what_a_run_leaves_for_its_report(whole_run, config):
    folder, results = whole_run
    predictions = files.read_npz(folder / "predictions.npz")
    _, labels = load_source(config.data, "test").read_all()
    np.testing.assert_array_equal(predictions["label"], labels)
    confusion = np.zeros((10, 10), int)
    np.add.at(confusion, (predictions["label"], predictions["classes"][:, 0]), 1)
    np.testing.assert_array_equal(confusion, results["test_ema"]["confusion"])
    loss = -np.log(predictions["label_probability"]).mean()
    assert loss == pytest.approx(results["test_ema"]["loss"], rel=1e-4)
    data = files.read_npz(folder / "report.npz")
    assert data["samples"].shape == (4, 12, 8, 8, 3)
    assert data["filters"].shape == (8, 3, 3, 3)
    counted = sum(v[:, 2].sum() for n, v in data.items() if n.startswith("histograms/"))
    assert counted == results["parameters"]
    for index, picture in zip(
        data["misclassified_index"], data["misclassified_images"], strict=True
    ):
        assert predictions["classes"][index, 0] != labels[index]
        np.testing.assert_array_equal(load_source(config.data, "test").read([index])[0][0], picture)
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["devices"].startswith("2 x cpu on ")
    assert "conv1/kernel" in (folder / "model.txt").read_text()


def test_a_report_that_fails_is_made_by_the_same_command(
    whole_run, config, tmp_path, monkeypatch, caplog
):
    """The results are there before, and nothing is trained or read again."""
    folder = tmp_path / "run"
    shutil.copytree(whole_run[0], folder)
    before = (folder / "results.json").read_bytes()
    monkeypatch.setattr(train, "load_data", None)
    monkeypatch.setattr(page, "write_report", WRITE_REPORT)
    with monkeypatch.context() as patch, caplog.at_level("INFO", "alexnet_jax"):
        patch.setattr(style, "svg", None)
        assert train.run(config, folder) == whole_run[1]
    assert "report could not be made (TypeError" in caplog.text
    assert not (folder / "report.html").exists()
    caplog.clear()
    assert train.run(config, folder) == whole_run[1]
    html = (folder / "report.html").read_text()
    assert "could not be made" not in caplog.text
    assert f"{whole_run[1]['test_ema']['accuracy']:.2%}" in html
    assert "Most confident errors" in html
    assert (folder / "results.json").read_bytes() == before
    made = (folder / "report.html").stat().st_mtime_ns
    train.run(config, folder)
    assert (folder / "report.html").stat().st_mtime_ns == made


def test_results_are_those_of_the_checkpoint(whole_run, config):
    """The accuracy on file is that of the saved weights, counted here image by image."""
    folder, results = whole_run
    info = json.loads((folder / "dataset.json").read_text())
    images, labels = load_source(config.data, "test").read_all()
    found = saved(folder, 30)
    scaled = (images / 255 - np.array(info["mean"])) / np.array(info["deviation"])
    model = models.create_model(validate(config).model, 10)
    variables = {"params": found["params"], **found["rest"]["model_state"]}
    logits = model.apply(variables, jnp.float32(scaled), train=False)
    assert np.mean(np.argmax(logits, -1) == labels) == pytest.approx(results["test"]["accuracy"])


def test_a_finished_run_says_so_and_reads_nothing(whole_run, config, monkeypatch, caplog):
    folder, results = whole_run
    monkeypatch.setattr(train, "load_data", None)
    with caplog.at_level("INFO", "alexnet_jax"):
        assert train.run(config, folder) == results
    assert "finished" in caplog.text


def test_a_finished_run_without_its_data_set_is_refused(whole_run, config, tmp_path):
    shutil.copytree(whole_run[0], tmp_path / "run")
    (tmp_path / "run" / "dataset.json").unlink()
    with pytest.raises(InputError, match=r"dataset\.json is missing"):
        train.run(config, tmp_path / "run")


def test_the_test_set_is_read_once_and_last(whole_run, read_and_measured):
    after_each_epoch = ["measure"] * 3
    assert read_and_measured == [
        *("digits train", *after_each_epoch, "measure"),
        *("digits test", "measure"),
    ]


@pytest.mark.parametrize(
    ("stop_at", "changes"),
    [
        (7, {"checkpoint.every_seconds": 1e-6}),  # saved after each step, too
        (14, {"data.in_memory": "off", "data.workers": 0}),
    ],
)
def test_stopped_by_sigterm_and_resumed_is_bit_equal(whole_run, config, tmp_path, stop_at, changes):
    """To the run that is saved between epochs only, and whose images lie on the devices."""
    config.update_from_flattened_dict(changes)
    with stopped_at(stop_at), pytest.raises(Interrupted) as stop:
        train.run(config, tmp_path / "run")
    assert stop.value.step % 10  # in the middle of an epoch
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    train.run(config, tmp_path / "run")
    assert_same_run(whole_run[0], tmp_path / "run", 30)


def test_a_request_during_the_last_validation_is_answered(config, tmp_path, monkeypatch):
    validate = evaluation.validate

    def stop_and_validate(trainer, state, data):
        if state.steps_taken == 30:
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(trainer, state, data)

    monkeypatch.setattr(evaluation, "validate", stop_and_validate)
    with pytest.raises(Interrupted) as stop:
        train.run(config, tmp_path / "run")
    assert stop.value.step == 30
    assert not (tmp_path / "run" / "results.json").exists()
    assert train.run(config, tmp_path / "run")["step"] == 30


def test_validation_images_that_round_to_none(config, tmp_path, caplog):
    config.data.validation_fraction = 0.003
    config.eval.test = False
    with pytest.raises(InputError, match=r"less than one image of each class .* raise it"):
        train.run(config, tmp_path / "untested")
    config.eval.test = True
    config.train.epochs = 1
    config.optimizer.schedule = "plateau"
    with pytest.raises(InputError, match="'plateau' depends on them"):
        train.run(config, tmp_path / "plateau")
    config.optimizer.schedule = "constant"
    assert "validation" not in train.run(config, tmp_path / "run")
    assert "nothing is evaluated before the end" in caplog.text
    mesh = sharding.make_mesh()
    with pytest.raises(InputError, match="of each class of digits, so that the run has no valid"):
        load.load_split(validate(config), mesh, "validation")


def run_python(code, *arguments, **variables):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_killed_and_resumed_is_bit_equal(whole_run, config, tmp_path):
    code = """
        import os, signal, sys
        import jax
        jax.config.update("jax_num_cpu_devices", 8)
        from alexnet_jax.distributed import sharding
        from alexnet_jax.run import writers
        make_mesh = sharding.make_mesh
        sharding.make_mesh = lambda: make_mesh(jax.devices()[:2])  # as compiled already
        from alexnet_jax.config import default_config
        from alexnet_jax import train
        config = default_config()
        config.update_from_flattened_dict(eval(sys.argv[2]))
        update = writers.Progress.update
        def update_then_die(self, record):
            update(self, record)
            if record["step"] == 24:
                os.kill(os.getpid(), signal.SIGKILL)
        writers.Progress.update = update_then_die
        train.run(config, sys.argv[1])
    """
    folder = tmp_path / "run"
    killed = run_python(code, folder, repr(dict(flatten(config))))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert records(folder)[-1]["step"] == 24
    train.run(config, folder)
    # The save of step 20 may not have been finished when the process died.
    assert re.search(r"Resuming from step [12]0\.", (folder / "log.txt").read_text())
    assert_same_run(whole_run[0], folder, 30)


@pytest.mark.parametrize("devices", [1, 8])
def test_the_number_of_devices_does_not_change_the_run(
    whole_run, config, tmp_path, monkeypatch, devices
):
    """Dropout, augmentation and batch statistics included."""
    monkeypatch.setattr(sharding, "make_mesh", lambda: MAKE_MESH(jax.devices()[:devices]))
    train.run(config, tmp_path / "run")
    for one, other in zip(records(whole_run[0]), records(tmp_path / "run"), strict=True):
        assert one.keys() == other.keys()
        assert one["split"] == other["split"]
        # Rounding: 2e-7 at any of the steps, and no image is judged otherwise.
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["accuracy"] == pytest.approx(other["accuracy"], abs=0.01)


def test_steps_per_dispatch_changes_only_the_records(whole_run, config, tmp_path):
    config.train.steps_per_dispatch = 4
    results = train.run(config, tmp_path / "run")
    steps = [r["step"] for r in records(tmp_path / "run") if r["split"] == "train"]
    assert steps == [4, 8, 10, 14, 18, 20, 24, 28, 30]
    assert results["test"]["loss"] == pytest.approx(whole_run[1]["test"]["loss"], rel=1e-2)


# Options that differ from the config above, together as far as they can be.
OPTIONS = [
    {
        "optimizer.name": "adamw",
        "optimizer.weight_decay": 0.01,
        "optimizer.schedule": "step",
        "train.label_smoothing": 0.1,
        "model.dtype": "bfloat16",
        "augment.crop_padding": 0,
    },
    {
        "optimizer.name": "sgd",
        "optimizer.clip_norm": 1.0,
        "optimizer.accumulate_steps": 2,
        "optimizer.muon_learning_rate": 0.05,
        "optimizer.lr_multipliers": (("norm*/bias", 64.0),),
        "optimizer.lookahead_period": 2,
        "model.whitening": 2,
        "model.activation": "gelu",
        "augment.flip": True,
        "augment.alternating_flip": True,
        "augment.cutout": 2,
        "eval.tta": "flip",
    },
    {"data.validation_fraction": 0.0, "train.ema_decay": 0.0, "model.norm": "none"},
]


def programs(config):
    """Returns, as text, what a run with a config compiles for its steps and to evaluate."""
    checked, mesh = validate(config), sharding.make_mesh()
    data = load.load_data(checked, mesh)
    made = trainer.Trainer.create(checked, data, mesh)
    state = jax.eval_shape(made.init, {})
    with data.train.feeds(steps.order_key(jax.random.key(0)), 0) as feeds:
        _, feed = next(iter(feeds))
    batch = next(iter(data.test()))
    traced = [jax.make_jaxpr(made.step)(state, feed)]
    traced += [jax.make_jaxpr(evaluate)(state, batch) for evaluate in made.eval.values()]
    return re.sub(" at 0x[0-9a-f]+", "", "\n".join(map(str, traced)))


@pytest.mark.parametrize("changes", OPTIONS)
def test_no_option_is_ignored(data_dir, changes):
    def traced(changes):
        config = tiny_config(data_dir)
        config.update_from_flattened_dict(changes)
        return programs(config)

    whole = traced(changes)
    assert traced(changes) == whole
    needed_by = {
        "optimizer.name": {"optimizer.weight_decay"},  # Adam has none
        "augment.flip": {"augment.alternating_flip"},
    }
    for name in changes:
        without = needed_by.get(name, set()) | {name}
        rest = {key: value for key, value in changes.items() if key not in without}
        assert traced(rest) != whole, name


@pytest.mark.parametrize("changes", OPTIONS)
def test_options_run(config, tmp_path, changes):
    config.train.epochs = 1
    config.update_from_flattened_dict(changes)
    results = train.run(config, tmp_path / "run")
    assert np.isfinite(results["test"]["loss"])
    assert ("validation" in results) == (config.data.validation_fraction > 0)
    if config.eval.tta != "none":
        assert results.keys() >= {"validation_tta", "test_tta", "test_tta_ema"}
        assert records(tmp_path / "run")[-1]["split"] == "test_tta_ema"
        assert results["test_tta"]["loss"] != results["test"]["loss"]


def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(config, tmp_path, monkeypatch):
    config.model.norm = "none"
    config.optimizer.name = "sgd"
    suddenly_large = optax.piecewise_constant_schedule(1e-3, {10: 1e25})
    monkeypatch.setattr(trainer, "create_schedule", lambda *_: suddenly_large)
    with pytest.raises(Diverged, match=r"at step 1\d, with a learning rate of 1e\+22"):
        train.run(config, tmp_path / "run")
    for array in jax.tree.leaves(saved(tmp_path / "run", 10)):
        if array.dtype == np.float32:
            assert np.isfinite(array).all()


def test_parameters_that_are_not_finite_are_never_saved(config, tmp_path, monkeypatch):
    """The loss of a step is of the parameters before it, and tells nothing of those after."""
    real = steps.train_step

    def overflowing(state, batch, **options):
        state, metrics = real(state, batch, **options)
        bias = state.params["fc1"]["bias"]
        broken = {"bias": jnp.where(state.step == 11, jnp.inf, bias)}
        params = state.params | {"fc1": state.params["fc1"] | broken}
        return state.replace(params=params), metrics

    monkeypatch.setattr(steps, "train_step", overflowing)
    config.checkpoint.every_seconds = 1e-6
    with pytest.raises(Diverged, match=r"params/fc1/bias is not finite at step 11, with a learn"):
        train.run(config, tmp_path / "run")
    assert records(tmp_path / "run")[-1]["step"] == 11
    assert np.isfinite(records(tmp_path / "run")[-1]["loss"])
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["10", "9"]


@pytest.fixture
def unfinished(whole_run, tmp_path):
    """The whole run as it was before its results were written."""
    folder = tmp_path / "unfinished"
    shutil.copytree(whole_run[0], folder)
    (folder / "results.json").unlink()
    return folder


def test_a_run_whose_newest_checkpoint_is_damaged_is_bit_equal(whole_run, config, unfinished):
    newest = unfinished / "checkpoints" / "30"
    for path in (newest / "params").rglob("d/*"):  # Orbax keeps some in copies
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    train.run(config, unfinished)
    said = (unfinished / "log.txt").read_text()
    assert "WARNING checkpoint 30 is damaged (" in said
    assert "Resuming from step 20." in said
    assert_same_run(whole_run[0], unfinished, 30)


def test_a_run_that_has_lost_all_checkpoints_does_not_begin_anew(config, unfinished):
    shutil.rmtree(unfinished / "checkpoints")
    before = (unfinished / "metrics.jsonl").read_bytes()
    with pytest.raises(
        InputError, match="is empty, and held step 30 of this run; restore it from a copy"
    ):
        train.run(config, unfinished)
    assert (unfinished / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("split", ["train", "test"])
def test_data_changed_since_the_run_began_are_refused(config, unfinished, tmp_path, split):
    shutil.copytree(config.data.data_dir, tmp_path / "data")
    config.data.data_dir = str(tmp_path / "data")
    (path,) = (tmp_path / "data").rglob(f"digits-{split}.array_record*")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # in the padding at the end, which is read by nobody
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"the {split} files of digits have changed since the run"):
        train.run(config, unfinished)


def test_a_run_to_choose_by_does_without_the_test_set(config, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "write_report", WRITE_REPORT)
    load_source(config.data, "train")
    shutil.copytree(config.data.data_dir, tmp_path / "data")
    config.data.data_dir = str(tmp_path / "data")
    for path in (tmp_path / "data").rglob("digits-test.array_record*"):
        path.unlink()
    config.eval.test = False
    results = train.run(config, tmp_path / "run")
    measured = [name for name in results if name.startswith(("validation", "test"))]
    assert measured == ["validation", "validation_ema"]
    names = [record["split"] for record in records(tmp_path / "run") if record["split"] != "train"]
    assert names == measured * 3  # once after each epoch, and not again at the end
    info = json.loads((tmp_path / "run" / "dataset.json").read_text())
    assert info["images"] == {"train": 1295, "validation": 142}
    assert info["checksums"].keys() == {"train"}
    answers = files.read_npz(tmp_path / "run" / "predictions.npz")
    right = np.mean(answers["classes"][:, 0] == answers["label"])
    assert right == pytest.approx(results["validation_ema"]["accuracy"])
    html = (tmp_path / "run" / "report.html").read_text()
    assert "The test set was not evaluated." in html
    assert "of the validation images were misclassified" in html


# For the command line: the digits as they are, and two convolutions.
SMALL = (
    "--config.data.image_size=8",
    "--config.augment.crop_padding=1",
    "--config.model.features=(8,8)",
    "--config.model.kernels=(3,3)",
    "--config.model.strides=(1,1)",
    "--config.model.pools=(True,False)",
)


def test_on_a_full_disk_a_run_trains_on_and_ends_with_a_sentence(data_dir, tmp_path):
    """As small a limit for each file as keeps the checkpoints, and nothing else, from being."""
    code = """
        import resource, sys
        from alexnet_jax import main
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, resource.RLIM_INFINITY))
        sys.argv = ["main", *sys.argv[1:]]
        sys.exit(main.run())
    """
    done = run_python(
        code,
        "--config=configs/digits.py",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.data_dir={data_dir}",
        "--config.train.epochs=2",
        "--config.train.batch_size=512",
        "--config.model.hidden=(64,64)",
        "--noconfig.writers.tensorboard",
        *SMALL,
        JAX_ENABLE_COMPILATION_CACHE="false",  # which would be cut off for the other tests
    )
    assert done.returncode == 74, done.stderr
    assert "Traceback" not in done.stderr
    assert "Checkpoint 2 could not be saved (File too large); training continues" in done.stderr
    assert re.search(
        r"error: the last checkpoint, of step 4, .*\(File too large\); none is saved\. Fix this "
        "and rerun the same command",
        done.stderr,
    )
    assert records(tmp_path / "run")[-1]["step"] == 4
    assert not (tmp_path / "run" / "saved.json").exists()


def test_a_batch_that_devices_cannot_share_is_refused(config, tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "make_mesh", MAKE_MESH)
    config.train.batch_size = 100
    with pytest.raises(InputError, match=r"100, which 8 devices .* 96 or 104"):
        train.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_log_and_the_report_tell_of_the_same_answers(tmp_path, caplog):
    """Class by class: those for plain images, where several views were measured, too."""
    info = {"class_names": ["a", "b"], "image_shape": [8, 8, 3]}
    info |= {"mean": [0.5] * 3, "deviation": [0.2] * 3}
    (tmp_path / "dataset.json").write_text(json.dumps(info))
    results = {"step": 1, "epochs": 1, "train_seconds": 1.0}
    for split, right in (("test", 3), ("test_tta", 4)):
        confusion = [[right, 4 - right], [0, 4]]
        results[split] = {"loss": 0.5, "accuracy": (4 + right) / 8, "confusion": confusion}
    with caplog.at_level("INFO", "alexnet_jax"):
        finish.log_results(tmp_path, results)
    assert "75.0%" in caplog.text


def test_pictures_of_training_images_are_mirrored_as_in_training():
    options = AugmentConfig(crop_padding=0, flip=True, alternating_flip=True)
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), np.uint8)
    _, *versions = inputs.augmented(images, create_augment(options), seed=0)["samples"]
    seen = versions[0]
    mirrored = (seen == images[:, :, ::-1]).all(axis=(1, 2, 3))
    assert 16 < mirrored.sum() < 48
    np.testing.assert_array_equal(seen[~mirrored], images[~mirrored])


def test_a_batch_larger_than_the_data_is_refused(config, tmp_path):
    config.train.batch_size = 1304
    with pytest.raises(InputError, match="1304; digits has 1,295 training images"):
        train.run(config, tmp_path / "run")


def test_another_architecture_is_refused(config, unfinished):
    """Even where someone has edited the config on file to agree."""
    config.model.hidden = (16, 24)
    path = unfinished / "config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(saved | {"model.hidden": [16, 24]}))
    with pytest.raises(
        InputError, match=r"params/fc2/bias is float32\[16\] there and float32\[24\]"
    ):
        train.run(config, unfinished)


def test_the_first_step_waits_for_nothing_that_it_does_not_need(tmp_path):
    """TFDS and Orbax are imported when they are needed, and TensorFlow never."""
    code = """
        import sys
        from alexnet_jax import main
        from alexnet_jax.data import cache, in_memory
        cache.MIN_BYTES = 0  # as if the digits were larger
        def feeds(*args):
            print(sorted({"orbax", "tensorflow", "tensorflow_datasets"} & sys.modules.keys()))
            raise SystemExit(0)
        in_memory.InMemoryDataset.feeds = feeds
        sys.argv = ["main", *sys.argv[1:]]
        main.run()
    """
    changes = ["--config=configs/digits.py", f"--config.data.data_dir={tmp_path / 'data'}", *SMALL]
    for run in ("first", "second"):
        done = run_python(code, *changes, f"--workdir={tmp_path / run}")
        assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


def test_import_and_run_without_tensorflow(tmp_path):
    code = """
        import sys
        sys.path.insert(0, sys.argv.pop(1))
        import hiding
        hiding.hide_tensorflow()
        import alexnet_jax
        from alexnet_jax import main
        sys.argv = ["main", *sys.argv[1:]]
        sys.exit(main.run())
    """
    changes = [
        "--config=configs/digits.py",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.data_dir={tmp_path / 'data'}",  # to be prepared without it, too
        "--config.train.epochs=2",
        "--config.model.hidden=(8,8)",
        *SMALL,
    ]
    done = run_python(code, Path(__file__).parent, *changes)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("without tensorflow and tensorboard") == 1
    assert (tmp_path / "run" / "results.json").exists()
    assert not list((tmp_path / "run").glob("events*"))
