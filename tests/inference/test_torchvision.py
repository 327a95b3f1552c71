"""Weights of torchvision's AlexNet: the same answers, back again bit for bit, misfits named."""

import collections
import functools
import hashlib
import importlib
import io
import json
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import nn

from alexnet_jax.errors import InputError
from alexnet_jax.inference.torchvision import (
    MEAN,
    STD,
    default_class_names,
    from_torchvision,
    read_state_dict,
    to_torchvision,
    widths,
    write_state_dict,
)
from alexnet_jax.models.alexnet import AlexNetOWT

ROOT = Path(__file__).parents[2]
WIDTHS = {"features": (8, 12, 16, 12, 10), "hidden": (24, 20)}
CLASSES = 7

pytestmark = [
    # Orbax and TensorStore leave their event loops to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class Twin(nn.Module):
    """The layers of torchvision's AlexNet under their names there, of any width."""

    def __init__(self, features, hidden, classes):
        super().__init__()
        a, b, c, d, e = features
        self.features = nn.Sequential(
            *(nn.Conv2d(3, a, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(a, b, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(b, c, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(c, d, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(d, e, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
        self.classifier = nn.Sequential(
            *(nn.Dropout(), nn.Linear(e * 36, hidden[0]), nn.ReLU()),
            *(nn.Dropout(), nn.Linear(*hidden), nn.ReLU(), nn.Linear(hidden[1], classes)),
        )

    def forward(self, x):
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


@pytest.fixture(scope="module")
def twin():
    torch.manual_seed(0)
    return Twin(**WIDTHS, classes=CLASSES).eval()


@pytest.fixture
def state_dict(twin):
    return {key: value.numpy().copy() for key, value in twin.state_dict().items()}


def script(name):
    return importlib.import_module(f"alexnet_jax.cli.{name}")


@pytest.mark.parametrize("size", [(63, 63), (100, 180), (224, 224), (256, 256)])
def test_logits_agree_with_pytorch(twin, state_dict, size):
    model = AlexNetOWT(num_classes=CLASSES, **WIDTHS)
    params = from_torchvision(state_dict)
    images = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    ours = jax.jit(functools.partial(model.apply, train=False))({"params": params}, images)
    with torch.no_grad():
        theirs = twin(torch.tensor(images).permute(0, 3, 1, 2)).numpy()
    assert np.std(theirs) > 0.01
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


def test_every_parameter_has_its_place(state_dict):
    model = AlexNetOWT(num_classes=CLASSES, **WIDTHS)
    images = jnp.zeros((1, 64, 64, 3))
    wanted = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))["params"]
    assert jax.tree.map(jnp.shape, from_torchvision(state_dict)) == jax.tree.map(jnp.shape, wanted)
    assert widths(state_dict) == WIDTHS | {"classes": (CLASSES,)}


def test_there_and_back_is_bit_for_bit(state_dict):
    back = to_torchvision(from_torchvision(state_dict))
    assert list(back) == list(state_dict)
    for key, array in state_dict.items():
        assert back[key].tobytes() == array.tobytes(), key


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_scripts_take_a_file_to_a_run_and_back(twin, state_dict, suffix, tmp_path, capsys):
    file, run, again = tmp_path / f"in{suffix}", tmp_path / "run", tmp_path / f"out{suffix}"
    write_state_dict(state_dict, file)
    assert script("import_torchvision").main([str(file), str(run)]) == 0
    assert f" --config=finetune:{run} " in capsys.readouterr().out
    info = json.loads((run / "dataset.json").read_text())
    assert info["class_names"] == [f"class_{label}" for label in range(CLASSES)]
    assert (tuple(info["mean"]), tuple(info["deviation"])) == (MEAN, STD)
    assert script("export_torchvision").main([str(run), str(again)]) == 0
    exported = read_state_dict(again)
    assert list(exported) == list(state_dict) or suffix == ".safetensors"
    for key, array in state_dict.items():
        assert exported[key].tobytes() == array.tobytes(), key
    if suffix == ".pth":
        twin.load_state_dict(torch.load(again, weights_only=True))
    assert script("export_torchvision").main([str(run), str(again)]) == 2
    assert f"{again} exists" in capsys.readouterr().err


def test_an_imported_run_answers_as_pytorch_does(twin, state_dict, tmp_path):
    from alexnet_jax.inference import predictor

    file, names = tmp_path / "in.safetensors", tmp_path / "names.txt"
    write_state_dict(state_dict, file)
    names.write_text("\n".join("abcdefg"))
    run = tmp_path / "run"
    assert script("import_torchvision").main([str(file), str(run), f"--class_names={names}"]) == 0
    network = predictor.load(run)
    assert network.class_names == tuple("abcdefg")
    pixels = np.random.default_rng(0).integers(256, size=(2, 256, 256, 3), dtype=np.uint8)
    images = torch.tensor(pixels).permute(0, 3, 1, 2) / 255
    images = images[:, :, 16:240, 16:240] - torch.tensor(MEAN).reshape(3, 1, 1)
    with torch.no_grad():
        theirs = twin(images / torch.tensor(STD).reshape(3, 1, 1)).numpy()
    ours = network.logits(pixels)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


def test_a_thousand_classes_have_the_synsets_of_imagenet():
    names = default_class_names(1000)
    assert len(set(names)) == 1000
    assert (names[0], names[1], names[-1]) == ("n01440764", "n01443537", "n15075141")


# --- what does not fit --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("classifier.6.bias"), "it lacks classifier.6.bias"),
        (lambda s: s.update(fc=s["classifier.6.bias"]), "it has fc, which torchvision's has not"),
        (
            lambda s: s.update({"features.3.weight": np.zeros((12, 9, 5, 5), np.float32)}),
            r"features.3.weight has the shape \[12, 9, 5, 5\]; .* has \[12, 8, 5, 5\]",
        ),
        (
            lambda s: s.update({"features.0.weight": np.zeros((8, 3, 7, 7), np.float32)}),
            r"features.0.weight has the shape .* \[8, 3, 11, 11\]",
        ),
        (
            lambda s: s.update({"classifier.1.weight": np.zeros((24, 90), np.float32)}),
            r"classifier.1.weight has the shape \[24, 90\]; .* \[24, 360\]",
        ),
        (
            lambda s: s.update({"classifier.4.bias": np.zeros((), np.float32)}),
            r"classifier.4.bias has the shape \[\]; .* \[20\]",
        ),
        (
            lambda s: s.update({"classifier.6.weight": np.zeros((), np.float32)}),
            r"classifier.6.weight has the shape \[\]",
        ),
        (
            lambda s: s.update({"features.6.bias": np.zeros(16)}),
            "features.6.bias is float64; it must be float32",
        ),
    ],
)
def test_misfits_are_named(state_dict, change, message):
    change(state_dict)
    with pytest.raises(InputError, match=message):
        from_torchvision(state_dict)


def test_another_network_is_not_exported():
    params = {"conv1": {"kernel": np.zeros((3, 3, 3, 4)), "bias": np.zeros(4)}}
    with pytest.raises(InputError, match=r"conv2/bias, conv2/kernel, .* and 10 more"):
        to_torchvision(params)


def test_a_first_matrix_of_another_size_is_not_exported(state_dict):
    params = from_torchvision(state_dict)
    params["fc1"]["kernel"] = params["fc1"]["kernel"][:90]
    with pytest.raises(InputError, match=r"fc1 takes 90 numbers, .* 6x6x10"):
        to_torchvision(params)


# --- files that must not be trusted --------------------------------------------------------------


class Bomb:
    """What pickle would run on reading."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def bomb(tmp_path, state_dict):
    torch.save({"features.0.weight": Bomb(tmp_path / "ran")}, tmp_path / "w.pth")


def old_bomb(tmp_path, state_dict):
    options = {"_use_new_zipfile_serialization": False}
    torch.save({"a": Bomb(tmp_path / "ran")}, tmp_path / "w.pth", **options)


def whole_module(tmp_path, state_dict):
    torch.save(nn.Linear(2, 3), tmp_path / "w.pth")


def compressed(tmp_path, state_dict):
    with zipfile.ZipFile(tmp_path / "w.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**6))


def expanded(tmp_path, state_dict):
    arrays = {key: torch.tensor(value) for key, value in state_dict.items()}
    huge = torch.zeros(1, 1, 1, 1).expand(10**9, 3, 11, 11)  # 4 bytes in the file
    torch.save(arrays | {"features.0.weight": huge}, tmp_path / "w.pth")


def not_arrays(tmp_path, state_dict):
    torch.save({"features.0.weight": [1, 2]}, tmp_path / "w.pth")


def a_list(tmp_path, state_dict):
    torch.save([1, 2], tmp_path / "w.pth")


def noise(tmp_path, state_dict):
    (tmp_path / "w.pth").write_bytes(np.random.default_rng(0).bytes(1000))


def empty(tmp_path, state_dict):
    (tmp_path / "w.pth").touch()


def nothing(tmp_path, state_dict):
    pass


def truncated(tmp_path, state_dict):
    buffer = io.BytesIO()
    torch.save({key: torch.tensor(value) for key, value in state_dict.items()}, buffer)
    (tmp_path / "w.pth").write_bytes(buffer.getvalue()[:-1000])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bomb, "is not a file of weights"),
        (old_bomb, "is not a file of weights"),
        (whole_module, "is not a file of weights"),
        (compressed, "it is compressed"),
        (expanded, "describes more numbers than it holds"),
        (not_arrays, "'features.0.weight' is a list"),
        (a_list, "it holds a list"),
        (noise, "is not a file of weights"),
        (empty, "is not a file of weights"),
        (nothing, r"is not a file of weights \(No such file"),
        (truncated, "is not a file of weights"),
    ],
)
def test_what_is_no_state_dict_is_refused_in_a_sentence(
    tmp_path, state_dict, make, message, capsys
):
    make(tmp_path, state_dict)
    with pytest.raises(InputError, match=message) as caught:
        read_state_dict(tmp_path / "w.pth")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    run = tmp_path / "run"
    assert script("import_torchvision").main([str(tmp_path / "w.pth"), str(run)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not run.exists()


@pytest.mark.parametrize("damage", [lambda b: b[:-10], lambda b: b[:5], lambda b: b"\xff" * 8 + b])
def test_damaged_safetensors_are_refused(tmp_path, state_dict, damage):
    file = tmp_path / "w.safetensors"
    file.write_bytes(damage(safetensors.numpy.save(state_dict)))
    with pytest.raises(InputError, match="is not a file of weights"):
        read_state_dict(file)


def test_a_name_with_a_checksum_is_held_to_it(tmp_path, state_dict):
    content = safetensors.numpy.save(state_dict)
    digest = hashlib.sha256(content).hexdigest()
    right = tmp_path / f"alexnet-owt-{digest[:8]}.safetensors"
    right.write_bytes(content)
    assert read_state_dict(right).keys() == state_dict.keys()
    wrong = tmp_path / "alexnet-owt-7be5be79.safetensors"
    wrong.write_bytes(content)
    with pytest.raises(InputError, match=f"begin with 7be5be79, and it begins with {digest[:8]}"):
        read_state_dict(wrong)


def test_what_training_scripts_save_around_it_is_taken_off(tmp_path, state_dict):
    arrays = collections.OrderedDict(
        (f"module.{key}", torch.tensor(value)) for key, value in state_dict.items()
    )
    torch.save({"epoch": 3, "state_dict": arrays}, tmp_path / "w.pth")
    found = read_state_dict(tmp_path / "w.pth")
    assert found.keys() == state_dict.keys()


@pytest.mark.parametrize(
    ("names", "message"), [(["a", "b"], "2 different class names"), (list("abcdeff"), "6 differ")]
)
def test_class_names_must_be_as_many_as_classes(tmp_path, state_dict, names, message, capsys):
    file, text = tmp_path / "in.safetensors", tmp_path / "names.txt"
    write_state_dict(state_dict, file)
    text.write_text("\n".join(names))
    arguments = [str(file), str(tmp_path / "run"), f"--class_names={text}"]
    assert script("import_torchvision").main(arguments) == 2
    assert message in capsys.readouterr().err


def test_numbers_that_are_not_finite_are_refused(tmp_path, state_dict, capsys):
    state_dict["classifier.4.bias"][3] = np.nan
    write_state_dict(state_dict, tmp_path / "in.pth")
    arguments = [str(tmp_path / "in.pth"), str(tmp_path / "run")]
    assert script("import_torchvision").main(arguments) == 2
    assert "classifier.4.bias" in capsys.readouterr().err


def test_an_import_leaves_what_is_there_alone(tmp_path, state_dict, capsys):
    write_state_dict(state_dict, tmp_path / "in.pth")
    assert script("import_torchvision").main([str(tmp_path / "in.pth"), str(tmp_path)]) == 2
    assert "not an empty folder" in capsys.readouterr().err
