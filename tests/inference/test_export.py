"""Artefacts of each format, run in their own runtime, answer as the network does."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_up_run import ACCURACIES, SIZE, make_run

import alexnet_jax
from alexnet_jax.cli import export as script
from alexnet_jax.errors import InputError
from alexnet_jax.inference import export
from alexnet_jax.inference.model_card import model_card
from alexnet_jax.run import files

pytestmark = [
    # Orbax and TensorStore leave their event loops to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

ROOT = Path(__file__).parents[2]
EXTRA = ("onnx", "jax2onnx", "onnxruntime", "ai_edge_litert", "tensorflow")
MISSING = [name for name in EXTRA if importlib.util.find_spec(name) is None]
IMAGES = np.random.default_rng(3).integers(0, 256, (5, SIZE, SIZE, 3), np.uint8)


@pytest.fixture(scope="module", autouse=True)
def no_cache_of_the_users():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alexnet_jax.environment.prepare", list)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder, _ = make_run(tmp_path_factory.mktemp("runs") / "tiny", tmp_path_factory.mktemp("data"))
    return folder


@pytest.fixture(scope="module")
def network(run):
    return alexnet_jax.load(run)


@pytest.fixture(scope="module")
def others(run, tmp_path_factory):
    """The formats that need the extra, exported in another process, without JAX's eight devices."""
    if MISSING:
        pytest.skip(f"needs the extra 'export': {', '.join(MISSING)} missing")
    folder = tmp_path_factory.mktemp("exports")
    np.save(folder / "images.npy", IMAGES)
    program = f"""
import sys
import numpy as np
from alexnet_jax import environment
environment.prepare = list
from alexnet_jax.cli import export as script
for kind in ("onnx", "savedmodel", "tflite"):
    assert script.main([{str(run)!r}, f"--format={{kind}}", f"--output={folder}/{{kind}}"]) == 0
import tensorflow as tf
loaded = tf.saved_model.load("{folder}/savedmodel/saved_model").signatures["serving_default"]
images = np.load("{folder}/images.npy")
np.save("{folder}/savedmodel.npy", loaded(images=tf.constant(images))["probabilities"].numpy())
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"JAX_PLATFORMS": "cpu", "PATH": "", "HOME": str(folder)},
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def check_answers(network, found):
    right = network.predict(IMAGES).probabilities
    assert np.ptp(right, axis=0).max() > 0.01  # it matters which image it is
    np.testing.assert_allclose(found, right, atol=1e-4)


def test_stablehlo(run, network, tmp_path, capsys):
    assert script.main([str(run), "--format=stablehlo", f"--output={tmp_path / 'new'}"]) == 0
    assert "to within" in capsys.readouterr().out
    content = (tmp_path / "new/network.stablehlo").read_bytes()
    exported = jax.export.deserialize(bytearray(content))
    assert set(exported.platforms) == {"cpu", "cuda", "rocm", "tpu"}
    check_answers(network, exported.call(IMAGES))
    assert json.loads((tmp_path / "new/class_names.json").read_text()) == [*"0123456789"]
    assert {path.name for path in tmp_path.iterdir()} == {"new"}


def test_onnx(network, others):
    import onnxruntime

    folder, _ = others
    session = onnxruntime.InferenceSession(folder / "onnx/network.onnx")
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    assert (taken.name, taken.type, taken.shape[1:]) == ("images", "tensor(uint8)", [SIZE, SIZE, 3])
    assert (given.name, given.shape[1:]) == ("probabilities", [10])
    check_answers(network, session.run(None, {"images": IMAGES})[0])


def test_tflite(network, others):
    from ai_edge_litert.interpreter import Interpreter

    folder, _ = others
    interpreter = Interpreter(model_path=str(folder / "tflite/network.tflite"))
    index = interpreter.get_input_details()[0]["index"]
    interpreter.resize_tensor_input(index, IMAGES.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(index, IMAGES)
    interpreter.invoke()
    check_answers(network, interpreter.get_tensor(interpreter.get_output_details()[0]["index"]))


def test_savedmodel(network, others):
    check_answers(network, np.load(others[0] / "savedmodel.npy"))


def test_the_program_says_what_it_has_made_and_nothing_else(others):
    folder, said = others
    for kind, name in (
        ("onnx", "network.onnx"),
        ("savedmodel", "saved_model"),
        ("tflite", "network.tflite"),
    ):
        assert str(folder / kind / name) in said.splitlines()
        assert {path.name for path in (folder / kind).iterdir()} == {
            name,
            "class_names.json",
            "MODEL_CARD.md",
        }
    assert "DEBUG" not in said


def test_what_disagrees_is_not_kept(network, tmp_path, monkeypatch):
    right = export.FORMATS["stablehlo"]
    monkeypatch.setitem(export.FORMATS, "wrong", right)

    def spoilt(change):
        def write(function, size, path):
            return right.write(lambda images: change(function, images), size, path)

        monkeypatch.setitem(export.FORMATS, "wrong", right._replace(write=write))

    for change in (
        lambda function, images: function(images[:, :, ::-1]),
        lambda function, images: function(images) + 2e-4,
        lambda function, images: function(images) * float("nan"),
        lambda function, images: function(images)[:, :9],
        lambda function, images: function(images).astype("float16"),
    ):
        spoilt(change)
        with pytest.raises(InputError, match=r"the wrong gives .*not kept"):
            export.export(network, "wrong", tmp_path / "new")
        assert not [*tmp_path.iterdir()]


def test_certain_answers_are_compared_too():
    """Two networks that are as certain, one of which has its other classes the wrong way round."""
    one = np.array([[1 - 3e-6, 1e-6, 2e-6]], np.float32)
    with pytest.raises(InputError, match=r"of their logarithms by 0\.7"):
        export.check(
            lambda images: np.repeat(one[:, [0, 2, 1]], len(images), axis=0),
            lambda images: np.repeat(one, len(images), axis=0),
            4,
            "onnx",
        )


def test_a_folder_is_replaced_only_when_asked_and_only_an_export(run, network, tmp_path, capsys):
    new = tmp_path / "new"
    export.export(network, "stablehlo", new)
    (new / "old").touch()
    assert script.main([str(run), "--format=stablehlo", f"--output={new}"]) == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
    export.export(network, "stablehlo", new, overwrite=True)
    assert not (new / "old").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    with pytest.raises(InputError, match="mine exists and is not an export"):
        export.export(network, "stablehlo", tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine/thesis.tex").exists()
    assert script.main([str(run), "--format=pickle"]) == 2
    assert "--format: invalid choice: 'pickle'" in capsys.readouterr().err


def test_what_is_missing_is_named_with_its_extra(network, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(InputError, match=r'jax2onnx is not installed .*"export": pip install'):
        export.export(network, "onnx", tmp_path / "new")
    assert not [*tmp_path.iterdir()]


def test_half_precision_is_exported_as_float32(network):
    half = network.module.clone(dtype="bfloat16")
    function = export.inference_function(dataclasses.replace(network, module=half))
    np.testing.assert_allclose(
        function(jnp.asarray(IMAGES)), network.predict(IMAGES).probabilities, rtol=1e-4, atol=1e-6
    )


def card(network):
    return model_card(
        network, artifact="network.onnx", runtime="ONNX Runtime", difference=3e-7, command="go"
    )


def test_the_card_says_what_is_known_of_these_very_weights(run, network):
    text = card(network)
    assert "# alexnet on digits" in text
    assert "uint8[batch, 8, 8, 3]" in text
    assert "float32[batch, 10]" in text
    assert "1,295 training images, 142 validation images, 360 test images" in text
    assert "averaged over the steps" in text
    assert "- `model.features = (8, 8)`" in text
    assert "data.test_split" not in text  # as it is by default
    assert f"validation: {100 * ACCURACIES[30]:.2f}% of 142 images" in text
    assert "have not been evaluated on the test images" in text

    info = network.info | {"imported": "flowers.safetensors"}
    imported = card(dataclasses.replace(network, info=info))
    assert "# alexnet from flowers.safetensors\n" in imported
    assert "the weights are those of `flowers.safetensors`" in imported
    assert "digits" not in imported.split("## Data")[1].split("## Training")[0]
    assert "epochs; " not in imported

    parts = {
        name: {"loss": 0.5, "accuracy": accuracy, "confusion": [[count]]}
        for name, accuracy, count in (
            ("validation", 0.61, 142),
            ("validation_ema", 0.71, 142),
            ("test", 0.62, 360),
            ("test_ema", 0.72, 360),
        )
    }
    results = {"step": 30, "versions": {"jax": "0.0.1"}} | parts
    files.write_json(run / "results.json", results)
    try:
        text = card(network)
        assert "test: 72.00% of 360 images" in text
        assert "validation: 71.00% of 142 images" in text
        assert "Trained with jax 0.0.1" in text
        plain = card(alexnet_jax.load(run, ema=False))
        assert "test: 62.00% of 360 images" in plain
        older = card(alexnet_jax.load(run, checkpoint="best"))
        assert "test:" not in older.split("## Accuracy")[1]
        assert "have not been evaluated on the test images" in older
        for part in parts.values():
            part |= {"accuracy_each": [0.9, 0.7], "loss_each": [0.1, 0.3], "confusion": [[720]]}
        files.write_json(run / "results.json", results)
        config = dataclasses.replace(network.config, num_seeds=2)
        second = card(dataclasses.replace(network, config=config, replica=1))
        assert "test: 70.00% of 360 images, cross-entropy 0.3000 nats" in second
    finally:
        (run / "results.json").unlink()
