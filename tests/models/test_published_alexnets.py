"""The networks of the papers: shapes layer by layer, and the same numbers as PyTorch's layers."""

import dataclasses
import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from alexnet_jax.config import default_config, validate
from alexnet_jax.errors import InputError
from alexnet_jax.models import create_model
from alexnet_jax.models.alexnet import AlexNet, AlexNet2012, AlexNetOWT
from alexnet_jax.models.layers import adaptive_average_pool, local_response_norm
from alexnet_jax.ops import CPU

# Kernel and number of parameters of each layer, and side of what comes out of each convolution:
# in the second network after the pooling, where one layer does both.
PUBLISHED = {
    "alexnet_2012": (
        227,
        60_965_224,
        {
            "conv1": ((11, 11, 3, 96), 34_944, 55),
            "conv2": ((5, 5, 48, 256), 307_456, 27),
            "conv3": ((3, 3, 256, 384), 885_120, 13),
            "conv4": ((3, 3, 192, 384), 663_936, 13),
            "conv5": ((3, 3, 192, 256), 442_624, 13),
            "fc1": ((6 * 6 * 256, 4096), 37_752_832, None),
            "fc2": ((4096, 4096), 16_781_312, None),
            "logits": ((4096, 1000), 4_097_000, None),
        },
    ),
    "alexnet_owt": (
        224,
        61_100_840,
        {
            "conv1": ((11, 11, 3, 64), 23_296, 55),
            "conv2": ((5, 5, 64, 192), 307_392, 13),
            "conv3": ((3, 3, 192, 384), 663_936, 13),
            "conv4": ((3, 3, 384, 256), 884_992, 13),
            "conv5": ((3, 3, 256, 256), 590_080, 6),
            "fc1": ((6 * 6 * 256, 4096), 37_752_832, None),
            "fc2": ((4096, 4096), 16_781_312, None),
            "logits": ((4096, 1000), 4_097_000, None),
        },
    ),
}
NARROW = {"features": (4, 8, 12, 12, 8), "hidden": (20, 16)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_layer_by_layer(name):
    side, total, layers = PUBLISHED[name]
    model = create_model(default_config(name).model, num_classes=1000)
    images = jnp.zeros((1, side, side, 3))

    def forward():
        variables = model.init(jax.random.key(0), images, train=False)
        _, state = model.apply(variables, images, train=False, capture_intermediates=True)
        return variables["params"], state["intermediates"]

    params, values = jax.eval_shape(forward)
    assert params.keys() == layers.keys()
    for layer, (kernel, count, out) in layers.items():
        assert params[layer]["kernel"].shape == kernel
        assert sum(leaf.size for leaf in params[layer].values()) == count
        if out:
            assert values[layer]["__call__"][0].shape[1:3] == (out, out)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == total


@pytest.mark.parametrize(("published", "name"), [(AlexNet2012, "2012"), (AlexNetOWT, "owt")])
def test_the_published_networks_are_the_one_class_with_other_options(published, name):
    options = {
        field.name: getattr(published(num_classes=5), field.name)
        for field in dataclasses.fields(published)
        if field.init and field.name not in ("parent", "name")
    }
    own = [key for key, value in vars(published).items() if inspect.isfunction(value)]
    assert all(key.startswith("__") and key != "__call__" for key in own)
    same = AlexNet(**options)
    images = jnp.zeros((1, 227, 227, 3))
    shapes = [
        jax.eval_shape(lambda m=m: m.init(jax.random.key(0), images, train=False))
        for m in (same, published(num_classes=5))
    ]
    assert shapes[0] == shapes[1]
    assert default_config(f"alexnet_{name}").model.kernels == (11, 5, 3, 3, 3)


def draw(model, side):
    images = np.random.default_rng(0).normal(0, 60, (3, side, side, 3)).astype(np.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: np.float32(
            rng.normal(0, (2 / np.prod(leaf.shape[:-1])) ** 0.5, leaf.shape)
            if leaf.ndim > 1
            else rng.uniform(-1, 1, leaf.shape)
        ),
        shapes["params"],
    )
    return params, images


def fill(layer, params):
    """Gives a PyTorch layer our parameters; the inputs of a linear one must be in our order."""
    kernel = torch.tensor(params["kernel"])
    layer.weight.data = kernel.permute(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T
    layer.bias.data = torch.tensor(params["bias"])
    return layer


class Flatten(nn.Module):
    def forward(self, x):
        return x.permute(0, 2, 3, 1).flatten(1)


def twin_2012(params, features, hidden):
    conv = [
        nn.Conv2d(3, features[0], 11, 4),
        nn.Conv2d(features[0], features[1], 5, padding=2, groups=2),
        nn.Conv2d(features[1], features[2], 3, padding=1),
        nn.Conv2d(features[2], features[3], 3, padding=1, groups=2),
        nn.Conv2d(features[3], features[4], 3, padding=1, groups=2),
    ]
    dense = [nn.Linear(36 * features[4], hidden[0]), nn.Linear(*hidden), nn.Linear(hidden[1], 5)]
    conv = [fill(layer, params[f"conv{i + 1}"]) for i, layer in enumerate(conv)]
    names = ("fc1", "fc2", "logits")
    dense = [fill(layer, params[name]) for layer, name in zip(dense, names, strict=True)]
    norm, pool = nn.LocalResponseNorm(5, alpha=5 * 1e-4, beta=0.75, k=2.0), nn.MaxPool2d(3, 2)
    relu = nn.ReLU()
    layers = [conv[0], relu, norm, pool, conv[1], relu, norm, pool]
    layers += [conv[2], relu, conv[3], relu, conv[4], relu, pool, Flatten()]
    return nn.Sequential(*layers, dense[0], relu, dense[1], relu, dense[2])


def test_the_network_of_2012_agrees_with_pytorch():
    model = AlexNet2012(num_classes=5, **NARROW)
    params, images = draw(model, 227)
    twin = twin_2012(params, **NARROW)
    ours = jax.jit(functools.partial(model.apply, train=False))({"params": params}, images)
    with torch.no_grad():
        theirs = twin(torch.tensor(images).permute(0, 3, 1, 2)).numpy()
    assert np.std(ours) > 1
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


def test_initial_values_are_those_of_the_paper():
    model = AlexNet2012(num_classes=5, features=(16, 32, 48, 32, 32), hidden=(40, 30))
    images = jnp.zeros((1, 67, 67, 3))

    def initial():  # XLA leaves out the kernels that nobody asks for, which take long to compile
        params = model.init(jax.random.key(0), images, train=False)["params"]
        biases = {name: layer["bias"] for name, layer in params.items()}
        return biases, params["conv3"]["kernel"], params["logits"]["kernel"]

    biases, *kernels = jax.jit(initial)()
    for name, bias in biases.items():
        ones = name in ("conv2", "conv4", "conv5", "fc1", "fc2")
        np.testing.assert_array_equal(bias, float(ones))
    for kernel, tolerance in zip(kernels, (0.03, 0.2), strict=True):
        assert np.std(kernel) == pytest.approx(0.01, rel=tolerance)
    assert np.abs(kernels[0]).max() > 0.03  # not cut off at two deviations


def test_dropout_stands_after_the_hidden_layers_of_2012():
    model = AlexNet2012(num_classes=5, **NARROW | {"hidden": (500, 400)})
    params, images = jax.tree.map(jnp.asarray, draw(model, 67))

    @jax.jit
    def forward():
        _, state = model.apply(
            {"params": params},
            images,
            train=True,
            rngs={"dropout": jax.random.key(0)},
            capture_intermediates=True,
        )
        return state["intermediates"]

    values = forward()
    for dropout, layer in (("Dropout_0", "fc1"), ("Dropout_1", "fc2")):
        before = np.maximum(values[layer]["__call__"][0], 0)
        after = np.asarray(values[dropout]["__call__"][0])
        kept = after[before > 0] > 0
        assert kept.mean() == pytest.approx(0.5, abs=0.1)
        np.testing.assert_allclose(after[after > 0], 2 * before[after > 0], rtol=1e-6)


def lrn_by_loops(x, k, n, alpha, beta):
    """Section 3.3 of the paper, index by index."""
    channels = x.shape[-1]
    result = np.empty(x.shape)
    for i in range(channels):
        first, last = max(0, i - n // 2), min(channels - 1, i + n // 2)
        total = sum(x[..., j].astype(np.float64) ** 2 for j in range(first, last + 1))
        result[..., i] = x[..., i] / (k + alpha * total) ** beta
    return result


@pytest.mark.parametrize("options", [(2.0, 5, 1e-4, 0.75), (1.0, 3, 0.5, 0.5), (2.0, 1, 0.1, 1.0)])
def test_response_norm_is_the_formula_of_the_paper(options):
    k, n, alpha, beta = options
    x = np.random.default_rng(0).normal(0, 50, (2, 3, 4, 7)).astype(np.float32)
    ours = local_response_norm(jnp.asarray(x), k=k, n=n, alpha=alpha, beta=beta)
    np.testing.assert_allclose(ours, lrn_by_loops(x, k, n, alpha, beta), rtol=1e-5)
    # PyTorch divides alpha by n.
    theirs = torch.nn.functional.local_response_norm(
        torch.tensor(x).permute(0, 3, 1, 2), n, alpha=alpha * n, beta=beta, k=k
    )
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1).numpy(), rtol=1e-5)
    assert local_response_norm(jnp.bfloat16(x)).dtype == jnp.bfloat16


def test_gradient_of_response_norm_agrees_with_pytorch():
    x = np.random.default_rng(0).normal(0, 50, (2, 3, 4, 7)).astype(np.float32)
    ours = jax.grad(lambda x: jnp.sin(local_response_norm(x)).sum())(x)
    tensor = torch.tensor(x).permute(0, 3, 1, 2).requires_grad_()
    torch.nn.functional.local_response_norm(
        tensor, 5, alpha=5e-4, beta=0.75, k=2.0
    ).sin().sum().backward()
    theirs = tensor.grad.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (6, 6), (7, 13), (12, 18)])
def test_adaptive_pooling_agrees_with_pytorch(size):
    x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    theirs = nn.AdaptiveAvgPool2d(6)(torch.tensor(x).permute(0, 3, 1, 2))
    ours = adaptive_average_pool(jnp.asarray(x), 6)
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1).numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stride", [1, 2])
def test_groups_on_a_cpu_give_what_xla_gives(stride):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 9, 9, 8)).astype(np.float32)
    kernel = rng.normal(size=(5, 5, 4, 6)).astype(np.float32)

    def convolve(function, x, kernel):
        return function(
            x,
            kernel,
            (stride, stride),
            [(2, 2), (2, 2)],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=2,
        )

    def both(function):
        result, pull_back = jax.vjp(functools.partial(convolve, function), x, kernel)
        return result, *pull_back(jnp.sin(result))

    ours, theirs = (
        jax.jit(functools.partial(both, function))()
        for function in (CPU.conv_general_dilated, jax.lax.conv_general_dilated)
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_groups_on_a_cpu_leave_no_grouped_convolution():
    x, kernel = jnp.zeros((2, 9, 9, 32)), jnp.zeros((3, 3, 16, 32))
    convolve = functools.partial(
        CPU.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=2,
    )
    assert "convolution" not in jax.jit(convolve).lower(x, kernel).as_text()


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        ("paddings", (1, 1), "one entry per convolution, 5 .* or none"),
        ("paddings", (0, 1, 1, 1, -1), "between 0"),
        ("paddings[4]", (0, 1, 1, 1, "1"), "a str; it must be an int"),
        ("groups", (1, 1, 1, 1, 0), "between 1"),
        ("groups", (3, 1, 1, 1, 1), "convolution 1, 3 in and 64 out"),
        ("groups", (1, 3, 1, 1, 1), "convolution 2, 64 in and 192 out"),
        ("response_norms", (True,), "or none"),
        ("response_norms[0]", (1, 0, 0, 0, 0), "an int; it must be a bool"),
        ("pool_to", -1, "between 0"),
        ("dropout_of", "both", "inputs, outputs"),
        ("bias_ones", ("conv6",), "conv1, conv2"),
        ("bias_ones[0]", (["fc1"],), "a list; it must be a str"),
    ],
)
def test_impossible_fields_are_refused_by_name(option, value, why):
    name, _, item = option.rstrip("]").partition("[")
    shown = value[int(item)] if item else value
    message = rf"config\.model\.{re.escape(option)} is {re.escape(repr(shown))}.*{why}"
    with pytest.raises(InputError, match=message):
        AlexNet(num_classes=5, **{name: value})


def test_images_too_small_for_a_convolution_are_refused():
    config = default_config("alexnet_2012")
    config.data.image_size = 8
    with pytest.raises(InputError, match=r"images of 8x8 .*: 0x0 are left before the pooling"):
        validate(config)
    config = default_config("alexnet_owt")
    config.data.image_size = 63
    validate(config)
    config.data.image_size = 62
    with pytest.raises(
        InputError, match=r"images of 62x62 .* 2x2 are left before the pooling after"
    ):
        validate(config)
