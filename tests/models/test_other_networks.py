"""ResNet and VGG: parameters as in the papers, numbers as by PyTorch's layers."""

import functools
import importlib.util
import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from alexnet_jax.config import default_config, validate
from alexnet_jax.errors import InputError
from alexnet_jax.models import MODELS, create_model
from alexnet_jax.models.resnet import ResNet
from alexnet_jax.models.vgg import VGG
from alexnet_jax.ops import CPU


def shapes_of(model, side):
    images = jnp.zeros((1, side, side, 3))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))


def count(model, side=32):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes_of(model, side)["params"]))


def resnet_parameters(blocks, width, classes):
    """Kernels and two numbers a channel of each normalisation, block by block."""
    total, inputs = 3 * width * 9 + 2 * width, width
    for i, number in enumerate(blocks):
        features = width * 2**i
        for _ in range(number):
            total += 9 * inputs * features + 9 * features**2 + 4 * features
            total += (inputs * features + 2 * features) * (inputs != features)
            inputs = features
    return total + inputs * classes + classes


def vgg_parameters(stages, features, hidden, classes, side):
    total, inputs = 0, 3
    for number, width in zip(stages, features, strict=True):
        for _ in range(number):
            total += 9 * inputs * width + 3 * width
            inputs = width
    inputs *= (side // 2 ** len(stages)) ** 2
    for width in (*hidden, classes):
        total += inputs * width + width
        inputs = width
    return total


def test_parameter_counts():
    assert count(ResNet(10)) == resnet_parameters((2, 2, 2, 2), 64, 10) == 11_173_962
    assert count(ResNet(10, blocks=(3, 4, 6, 3))) == resnet_parameters((3, 4, 6, 3), 64, 10)
    a = ((1, 1, 2, 2, 2), (64, 128, 256, 512, 512))
    assert count(VGG(10)) == vgg_parameters(*a, (), 10, 32) == 9_231_114
    large = VGG(1000, hidden=(4096, 4096))
    assert count(large, 224) == vgg_parameters(*a, (4096, 4096), 1000, 224) == 132_868_840


def test_the_network_that_the_docs_add_keeps_the_contract(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    source = re.search(r"```python\n(\"\"\"All-CNN-C \(.*?)```", text, re.DOTALL)[1]
    assert len([line for line in source.splitlines() if line.strip()]) < 60
    (tmp_path / "allcnn.py").write_text(source)
    spec = importlib.util.spec_from_file_location("allcnn", tmp_path / "allcnn.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(MODELS, "allcnn", module.AllCNN)
    # Section 3 of its paper: 3x3 convolutions 3-96-96-96-192-192-192-192, then two of 1x1.
    widths = (3, 96, 96, 96, 192, 192, 192, 192)
    expected = sum(9 * a * b + b for a, b in itertools.pairwise(widths))
    expected += 192 * 192 + 192 + 192 * 10 + 10
    assert count(module.AllCNN(10)) == expected == 1_369_738
    check_contract("allcnn")


# --- the same numbers as PyTorch ------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, inputs, features, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, features, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(features)
        self.shortcut = None
        if stride != 1 or inputs != features:
            self.shortcut = nn.Conv2d(inputs, features, 1, stride, bias=False)
            self.shortcut_norm = nn.BatchNorm2d(features)

    def forward(self, x):
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(
            y + (x if self.shortcut is None else self.shortcut_norm(self.shortcut(x)))
        )


def resnet_twin(blocks, width):
    layers = {
        "conv1": nn.Conv2d(3, width, 3, padding=1, bias=False),
        "norm1": nn.BatchNorm2d(width),
    }
    layers["relu"], inputs = nn.ReLU(), width
    for i, number in enumerate(blocks):
        for j in range(number):
            features, stride = width * 2**i, 2 if i and not j else 1
            layers[f"stage{i + 1}_{j + 1}"] = Block(inputs, features, stride)
            inputs = features
    layers |= {
        "pool": nn.AdaptiveAvgPool2d(1),
        "flat": nn.Flatten(),
        "logits": nn.Linear(inputs, 5),
    }
    return layers


def vgg_twin(stages, features, hidden):
    layers, inputs = {}, 3
    for i, (number, width) in enumerate(zip(stages, features, strict=True), start=1):
        for j in range(1, number + 1):
            layers[f"conv{i}_{j}"] = nn.Conv2d(inputs, width, 3, padding=1)
            layers[f"norm{i}_{j}"] = nn.BatchNorm2d(width)
            layers[f"relu{i}_{j}"], inputs = nn.ReLU(), width
        layers[f"pool{i}"] = nn.MaxPool2d(2)
    layers["flat"] = nn.Flatten()
    for i, width in enumerate(hidden, start=1):
        layers |= {f"fc{i}": nn.Linear(inputs, width), f"fc_relu{i}": nn.ReLU()}
        inputs = width
    return layers | {"logits": nn.Linear(inputs, 5)}


def fill(module, name, variables):
    """Gives a PyTorch layer, or a block of them, our variables."""
    for child, layer in module.named_children():
        fill(layer, f"{name}_{child}", variables)
    mine = {
        **variables["params"].get(name, {}),
        **variables.get("batch_stats", {}).get(name, {}),
    }
    axes = {4: (3, 2, 0, 1), 2: (1, 0)}
    names = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    for key, value in mine.items():
        value = torch.tensor(value).permute(*axes.get(value.ndim, (0,)))
        target = getattr(module, names.get(key, key))
        assert target.shape == value.shape
        target.data = value


@pytest.fixture
def drawn():
    def draw(model, side):
        rng = np.random.default_rng(0)
        return jax.tree.map(
            lambda leaf: np.float32(
                rng.normal(0, (2 / np.prod(leaf.shape[:-1])) ** 0.5, leaf.shape)
                if leaf.ndim > 1
                else rng.uniform(0.5, 1, leaf.shape)
            ),
            shapes_of(model, side),
        )

    return draw


@pytest.mark.parametrize(
    ("model", "twin", "options"),
    [
        (ResNet, resnet_twin, {"blocks": (1, 2, 1), "width": 6}),
        (VGG, vgg_twin, {"stages": (1, 2, 1), "features": (4, 6, 8), "hidden": (12,)}),
    ],
)
def test_forward_pass_agrees_with_pytorch(model, twin, options, drawn):
    model = model(num_classes=5, ops=CPU, **options)
    # Three halvings leave VGG one pixel, so that the order of what is flattened does not matter.
    variables = drawn(model, side=8)
    layers = twin(**options)
    for name, layer in layers.items():
        fill(layer, name, variables)
    images = np.random.default_rng(1).normal(size=(3, 8, 8, 3)).astype(np.float32)
    ours = jax.jit(functools.partial(model.apply, train=False))(variables, images)
    with torch.no_grad():
        network = nn.Sequential(*layers.values()).eval()
        theirs = network(torch.tensor(images).permute(0, 3, 1, 2)).numpy()
    assert np.std(ours) > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_each_network_keeps_the_contract(name):
    check_contract(name)


def check_contract(name):
    config = default_config(name)
    config.data.image_size = 64
    if name == "alexnet_2012":
        config.data.image_size = 67
    validate(config)
    config.model.dtype = "bfloat16"
    model = create_model(config.model, 7, axis_name="batch")
    assert (model.num_classes, model.axis_name, model.dtype) == (7, "batch", "bfloat16")
    model = create_model(config.model, 7)
    images = jnp.zeros((3, config.data.image_size, config.data.image_size, 3))

    def forward(train):
        variables = model.init(jax.random.key(0), images, train=False)
        rngs = {"dropout": jax.random.key(1)}
        mutable = [key for key in variables if key != "params"]
        return variables, model.apply(variables, images, train=train, rngs=rngs, mutable=mutable)

    for train in (False, True):
        variables, (logits, state) = jax.eval_shape(functools.partial(forward, train))
        assert (logits.shape, logits.dtype) == ((3, 7), jnp.float32)
        assert state == {key: value for key, value in variables.items() if key != "params"}
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
        assert "logits" in variables["params"], "the head, which fine-tuning makes anew"


@pytest.mark.parametrize(
    ("model", "option", "value"),
    [
        (ResNet, "blocks", (2, 0)),
        (ResNet, "width", 0),
        (ResNet, "norm_momentum", 1.0),
        (ResNet, "dtype", "float16"),
        (VGG, "stages", (1, 2)),
        (VGG, "features", (0, 1, 1, 1, 1)),
        (VGG, "hidden", (0,)),
        (VGG, "hidden[0]", ("4096",)),
        (VGG, "dropout", 1.0),
        (VGG, "dtype", "float64"),
    ],
)
def test_impossible_fields_are_refused_by_name(model, option, value):
    expected = "features" if option == "stages" else option
    with pytest.raises(InputError, match=rf"config\.model\.{re.escape(expected)} is "):
        model(num_classes=5, **{option.partition("[")[0]: value})


def test_images_too_small_for_vgg_are_refused():
    config = default_config("vgg")
    config.data.image_size = 31
    with pytest.raises(InputError, match=r"images of 31x31 pixels are too small .* 5 times"):
        validate(config)
