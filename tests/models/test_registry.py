import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import linen as nn_flax
from torch import nn

from alexnet_jax.config import default_config
from alexnet_jax.errors import InputError
from alexnet_jax.models import check_model, create_model, describe, layers
from alexnet_jax.models.alexnet import AlexNet

TINY = {"features": (4, 6, 8, 6, 6), "hidden": (16, 16)}
PAPER = {  # the paper's form in small: wide first kernel, stride, overlapping pooling
    "features": (4, 6, 8),
    "kernels": (7, 5, 3),
    "strides": (2, 1, 1),
    "pools": (True, False, True),
    "pool_window": 3,
    "hidden": (12,),
}


def build(size=16, **options):
    """A network, its variables, and images for it."""
    model = AlexNet(num_classes=5, **options)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(8, size, size, 3)).astype(np.float32)
    variables = jax.eval_shape(
        lambda images: model.init(jax.random.key(0), images, train=False), images
    )
    # Kernels as by He et al.; the rest other than the zeros and ones in which an error hides.
    variables = jax.tree.map(
        lambda leaf: (
            rng.normal(0, (2 / np.prod(leaf.shape[:-1])) ** 0.5, leaf.shape)
            if leaf.ndim > 1
            else rng.uniform(0.5, 1, leaf.shape)
        ).astype(np.float32),
        variables,
    )
    return model, variables, images


def torch_twin(model, variables, size):
    """The same network as PyTorch modules for NCHW images."""
    params, statistics = (
        jax.tree.map(torch.tensor, variables.get(name)) for name in ("params", "batch_stats")
    )
    convolutions, channels = nn.Sequential(), 3
    for i, features in enumerate(model.features):
        weights = params[f"conv{i + 1}"]
        kernel, stride = model.kernels[i], model.strides[i]
        conv = nn.Conv2d(channels, features, kernel, stride, kernel // 2, bias="bias" in weights)
        conv.weight.data = weights["kernel"].permute(3, 2, 0, 1)  # HWIO -> OIHW
        convolutions.append(conv)
        if model.norm == "none":
            conv.bias.data = weights["bias"]
        else:
            norm, values = nn.BatchNorm2d(features), params[f"norm{i + 1}"]
            norm.weight.data, norm.bias.data = values["scale"], values["bias"]
            norm.running_mean = statistics[f"norm{i + 1}"]["mean"]
            norm.running_var = statistics[f"norm{i + 1}"]["var"]
            convolutions.append(norm)
        convolutions.append(nn.ReLU())
        if model.pools[i]:
            convolutions.append(nn.MaxPool2d(model.pool_window, model.pool_stride))
        channels = features
    convolutions.eval()
    _, c, h, w = convolutions(torch.zeros(1, 3, size, size)).shape
    # The rows of the first kernel stand for (h, w, c) here and (c, h, w) there.
    first = params["fc1"]["kernel"].reshape(h, w, c, -1).permute(2, 0, 1, 3)
    params["fc1"]["kernel"] = first.reshape(c * h * w, -1)
    connected = nn.Sequential(nn.Flatten())
    for name in (*(f"fc{i + 1}" for i in range(len(model.hidden))), "logits"):
        kernel = params[name]["kernel"]
        dense = nn.Linear(*kernel.shape)
        dense.weight.data, dense.bias.data = kernel.T, params[name]["bias"]
        connected.append(dense)
        if name != "logits":
            connected.append(nn.ReLU())
    return nn.Sequential(convolutions, connected).eval()


@functools.partial(jax.jit, static_argnums=0)
def evaluate(model, variables, images):
    return model.apply(variables, images, train=False)


def test_parameters_of_the_default_network():
    channels, hidden, classes = (3, 64, 192, 384, 256, 256), (256 * 4 * 4, 4096, 4096), 10
    expected = {}
    for i in range(5):
        expected[f"conv{i + 1}"] = (3, 3, channels[i], channels[i + 1])
    for i in range(2):
        expected[f"fc{i + 1}"] = (hidden[i], hidden[i + 1])
    expected["logits"] = (hidden[-1], classes)

    model = create_model(default_config().model, classes)
    images = jnp.zeros((1, 32, 32, 3))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    assert variables.keys() == {"params"}
    assert variables["params"].keys() == expected.keys()
    for name, kernel in expected.items():
        layer = variables["params"][name]
        assert {key: leaf.shape for key, leaf in layer.items()} == {
            "kernel": kernel,
            "bias": kernel[-1:],
        }
        assert {leaf.dtype for leaf in layer.values()} == {jnp.dtype("float32")}
    total = sum(leaf.size for leaf in jax.tree.leaves(variables))
    assert total == sum(np.prod(kernel) + kernel[-1] for kernel in expected.values()) == 35_855_178


@pytest.mark.parametrize("options", [{}, {"norm": "batch"}, {"dtype": "bfloat16"}])
@pytest.mark.parametrize("train", [False, True])
def test_logits_are_float32_one_row_an_image(options, train):
    model = AlexNet(num_classes=7, **TINY, **options)
    images = jnp.zeros((3, 16, 16, 3))

    def forward():
        variables = model.init(jax.random.key(0), images, train=False)
        rngs = {"dropout": jax.random.key(1)}
        return model.apply(variables, images, train=train, rngs=rngs, mutable=["batch_stats"])[0]

    logits = jax.eval_shape(forward)
    assert (logits.shape, logits.dtype) == ((3, 7), jnp.float32)


@pytest.mark.parametrize("options", [TINY, TINY | {"norm": "batch"}, PAPER])
def test_forward_pass_agrees_with_pytorch(options):
    size = 32 if options is PAPER else 16
    model, variables, images = build(size, **options)
    ours = evaluate(model, variables, images)
    with torch.no_grad():
        theirs = torch_twin(model, variables, size)(torch.tensor(images).permute(0, 3, 1, 2))
    assert np.std(ours) > 0.1
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-5)


def test_dropout_drops_only_in_training():
    model, *inputs = build(dropout=0.25, **TINY | {"hidden": (1000, 1000)})
    variables, images = jax.tree.map(jnp.asarray, inputs)

    @functools.partial(jax.jit, static_argnames="train")
    def dropped(train, seed):
        logits, state = model.apply(
            variables,
            images,
            train=train,
            rngs={"dropout": jax.random.key(seed)},
            capture_intermediates=True,
        )
        values = state["intermediates"]
        return logits, values["fc1"]["__call__"][0], values["Dropout_1"]["__call__"][0]

    logits, hidden, kept = dropped(train=False, seed=0)
    np.testing.assert_array_equal(kept, jax.nn.relu(hidden))
    np.testing.assert_array_equal(dropped(train=False, seed=1)[0], logits)
    logits, hidden, kept = dropped(train=True, seed=0)
    before, after = np.maximum(hidden, 0), np.asarray(kept)
    survives = after[before > 0] > 0
    assert survives.mean() == pytest.approx(0.75, abs=5 * (0.25 * 0.75 / survives.size) ** 0.5)
    np.testing.assert_allclose(after[after > 0], before[after > 0] / 0.75, rtol=1e-6)
    assert np.abs(logits - dropped(train=True, seed=1)[0]).max() > 0.01


def test_batch_norm_measures_the_batch_and_keeps_an_average():
    model, variables, images = build(norm="batch", norm_momentum=0.7, dropout=0.0, **TINY)
    conv1 = torch.nn.functional.conv2d(
        torch.tensor(images).permute(0, 3, 1, 2),
        torch.tensor(variables["params"]["conv1"]["kernel"]).permute(3, 2, 0, 1),
        padding=1,
    ).numpy()
    old = variables["batch_stats"]
    forward = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    logits, state = jax.jit(forward)(variables, images)
    new = state["batch_stats"]
    for name, measured in (("mean", conv1.mean((0, 2, 3))), ("var", conv1.var((0, 2, 3)))):
        np.testing.assert_allclose(
            new["norm1"][name], 0.7 * old["norm1"][name] + 0.3 * measured, rtol=1e-5, atol=1e-6
        )
    assert all(
        np.abs(a - b).min() > 0 for a, b in zip(*map(jax.tree.leaves, (old, new)), strict=True)
    )
    assert np.abs(logits - evaluate(model, variables, images)).max() > 0.1


def test_bfloat16_computes_nearly_the_same():
    model, variables, images = build(**PAPER)
    low = model.copy(dtype="bfloat16")
    exact, nearly = (np.asarray(evaluate(m, variables, images)) for m in (model, low))
    error = np.abs(nearly - exact).max() / np.abs(exact).max()
    assert 1e-5 < error < 0.02  # bfloat16 has 8 bits; equal logits would be float32's
    created = jax.eval_shape(lambda x: low.init(jax.random.key(0), x, train=False), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(created)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(("name", "gain"), [("he_normal", 2), ("lecun_normal", 1)])
def test_kernels_have_the_standard_deviation_of_their_initializer(name, gain):
    one = {"features": (64,), "kernels": (3,), "strides": (1,), "pools": (True,)}
    model = AlexNet(num_classes=5, hidden=(256,), kernel_init=name, **one)
    params = model.init(jax.random.key(0), jnp.zeros((1, 2, 2, 3)), train=False)["params"]
    for layer, fan_in in (("conv1", 3 * 9), ("fc1", 64)):
        std = np.std(params[layer]["kernel"])
        assert std == pytest.approx((gain / fan_in) ** 0.5, rel=0.08)


@pytest.mark.parametrize("groups", [2, 3])
def test_dirac_kernels_begin_as_the_identity_in_each_group(groups):
    ours = np.asarray(layers.dirac(jax.random.key(0), (3, 3, 4, 6 * groups), groups=groups))
    theirs = torch.nn.init.dirac_(torch.empty(6 * groups, 4, 3, 3), groups)
    theirs = theirs.permute(2, 3, 1, 0).numpy()
    drawn = np.asarray(nn_flax.initializers.he_normal()(jax.random.key(0), ours.shape))
    same = np.arange(6 * groups) % 6 < 4
    np.testing.assert_array_equal(ours[..., same], theirs[..., same])
    np.testing.assert_array_equal(ours[..., ~same], drawn[..., ~same])
    one = {"kernels": (3, 3), "strides": (1, 1), "pools": (True, True), "kernel_init": "dirac"}
    model = AlexNet(5, features=(4, 4), groups=(1, 2), hidden=(), norm="batch", **one)
    kernel = model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)), train=False)["params"]["conv2"]
    np.testing.assert_array_equal(kernel["kernel"][1, 1], np.tile(np.eye(2), 2))


@pytest.mark.parametrize(("inputs", "outputs"), [(4, 9), (6, 6), (5, 3)])
def test_dirac_kernels_begin_as_the_identity(inputs, outputs):
    ours = np.asarray(layers.dirac(jax.random.key(0), (3, 3, inputs, outputs)))
    theirs = torch.nn.init.dirac_(torch.empty(outputs, inputs, 3, 3)).permute(2, 3, 1, 0).numpy()
    same = min(inputs, outputs)
    np.testing.assert_array_equal(ours[..., :same], theirs[..., :same])
    drawn = np.asarray(nn_flax.initializers.he_normal()(jax.random.key(0), ours.shape))
    np.testing.assert_array_equal(ours[..., same:], drawn[..., same:])
    assert np.std(layers.dirac(jax.random.key(0), (200, 50))) == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize("pool_first", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_other_activations_orders_and_scales_agree_with_pytorch(activation, norm, pool_first):
    one = {"features": (4,), "kernels": (3,), "strides": (1,), "pools": (True,), "hidden": (6,)}
    options = {"activation": activation, "norm": norm, "pool_first": pool_first}
    model, variables, images = build(8, norm_scale=False, logit_scale=1 / 9, **one, **options)
    params = jax.tree.map(torch.tensor, variables["params"])
    activate = {"gelu": F.gelu, "silu": F.silu}[activation]
    kernel = params["conv1"]["kernel"].permute(3, 2, 0, 1)
    x = torch.tensor(images).permute(0, 3, 1, 2)
    x = F.conv2d(x, kernel, params["conv1"].get("bias"), padding=1)
    x = F.max_pool2d(x, 2) if pool_first else x
    if norm == "batch":
        assert params["norm1"].keys() == {"bias"}
        kept = jax.tree.map(torch.tensor, variables["batch_stats"]["norm1"])
        x = F.batch_norm(x, kept["mean"], kept["var"], None, params["norm1"]["bias"])
    x = activate(x)
    x = x if pool_first else F.max_pool2d(x, 2)
    x = x.permute(0, 2, 3, 1).flatten(1)
    x = activate(x @ params["fc1"]["kernel"] + params["fc1"]["bias"])
    x = (x @ params["logits"]["kernel"] + params["logits"]["bias"]) / 9
    np.testing.assert_allclose(evaluate(model, variables, images), x.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("activation", "tanh"),
        ("whitening", -1),
        ("whitening", 8),
        ("logit_scale", 0.0),
        ("features", (4, 0, 8, 6, 6)),
        ("kernels", (3, 3)),
        ("kernels", (3, 3, -1, 3, 3)),
        ("strides", (1, 1, 1, 1)),
        ("strides", (1, 1, 1, 1, 0)),
        ("pools", (True,)),
        ("pool_window", 0),
        ("pool_stride", -1),
        ("hidden", (0,)),
        ("norm", "layer"),
        ("norm_momentum", 1.0),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("kernel_init", "ones"),
        ("dtype", "float16"),
    ],
)
def test_impossible_fields_are_refused_by_name(option, value):
    with pytest.raises(InputError, match=rf"config\.model\.{option} is {re.escape(repr(value))}"):
        AlexNet(num_classes=5, **{option: value})


def test_a_network_without_convolutions_is_refused():
    with pytest.raises(InputError, match=r"config\.model\.features is empty"):
        AlexNet(num_classes=5, features=(), kernels=(), strides=(), pools=())


def test_too_small_images_are_refused():
    config = default_config().model
    check_model(config, 8)
    with pytest.raises(InputError, match=r"images of 7x7 .*1x1 are left .* after convolution 5"):
        check_model(config, 7)


def test_an_unknown_network_is_refused():
    config = default_config().model
    config.name = "alexnett"
    with pytest.raises(InputError, match=r"config\.model\.name is 'alexnett'.*alexnet"):
        create_model(config, 10)


def test_create_model_passes_every_option_on():
    config = default_config().model
    config.update(TINY | {"norm": "batch", "dropout": 0.1, "pool_window": 3})
    model = create_model(config, 9, axis_name="data")
    assert model.num_classes == 9
    assert model.axis_name == "data"
    assert {key: getattr(model, key) for key in config if key != "name"} == {
        key: value for key, value in config.items() if key != "name"
    }


def test_description_names_each_layer_and_the_totals():
    network, images = AlexNet(num_classes=10), jnp.zeros((1, 32, 32, 3))
    description = describe(network, (32, 32, 3))
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), images, train=False))
    assert describe(network, (32, 32, 3), shapes) == description
    text = str(description)
    for name in ("conv1", "conv2", "conv3", "conv4", "conv5", "fc1", "fc2", "logits"):
        assert f"{name}/kernel" in text
    assert "35,855,178" in text
    # Two for each product of a weight and a pixel, of which there are 3s - 2 along a side of s
    # (the others fall on padding); biases, ReLU and pooling add the rest.
    channels, sides = (3, 64, 192, 384, 256, 256), (32, 16, 8, 8, 8)
    kernels = sum(
        a * b * (3 * s - 2) ** 2 for a, b, s in zip(channels, channels[1:], sides, strict=False)
    )
    kernels += 4096 * 4096 * 2 + 4096 * 10
    stated = float(text.rsplit(": ", 1)[1].removesuffix(" million FLOPs").replace(",", ""))
    assert stated == pytest.approx(2 * kernels / 1e6, rel=0.01)
    assert stated == pytest.approx(description.flops / 1e6, abs=0.05)
