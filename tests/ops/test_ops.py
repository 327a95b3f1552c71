"""The CPU's kernels against XLA's operations: results, gradients, and what falls back."""

import functools
import logging
import os
import platform
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alexnet_jax import ops
from alexnet_jax.models.alexnet import AlexNet
from alexnet_jax.models.layers import ConvReluPool
from alexnet_jax.ops import amx, bfloat16, convolution, cpu_info, pooling, reference, winograd

NHWC = ("NHWC", "HWIO", "NHWC")


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def results_and_gradients(function, *arguments):
    results, pull_back = jax.vjp(function, *arguments)
    return results, *pull_back(normal(*results.shape, seed=9, dtype=results.dtype))


def largest_differences(function, reference, *arguments):
    """Of the results and each gradient, as shares of the largest value."""
    pairs = zip(
        jax.jit(lambda *a: results_and_gradients(function, *a))(*arguments),
        jax.jit(lambda *a: results_and_gradients(reference, *a))(*arguments),
        strict=True,
    )
    return [float(jnp.abs(ours - right).max() / jnp.abs(right).max()) for ours, right in pairs]


def uses_lax(function, *arguments):
    traced = jax.make_jaxpr(lambda *a: function(*a))(
        *arguments
    )  # a new function: nothing is cached
    return "conv_general_dilated" in str(traced)


@pytest.mark.parametrize(
    ("image", "kernel", "stride", "padding"),
    [
        ((8, 8, 16), (3, 3, 24), (1, 1), "SAME"),  # Winograd, as the network has it
        ((7, 9, 20), (3, 3, 16), (1, 1), ((1, 1), (1, 1))),  # an odd number of results
        ((6, 7, 16), (3, 3, 16), (1, 1), "VALID"),
        ((5, 6, 16), (3, 3, 16), (1, 1), ((2, 0), (0, 3))),
        ((8, 8, 3), (3, 3, 16), (1, 1), "SAME"),  # patches: too few channels for Winograd
        ((2, 2, 16), (3, 3, 16), (1, 1), "SAME"),  # and as many products
        ((9, 11, 16), (3, 3, 16), (2, 2), "SAME"),
        ((19, 21, 3), (11, 11, 8), (4, 4), ((2, 2), (2, 2))),  # the stem of 2012
        ((6, 6, 4), (5, 5, 8), (1, 2), ((2, 2), (2, 2))),
        ((5, 5, 4), (1, 1, 8), (1, 1), "VALID"),
    ],
)
def test_convolutions_equal_xlas(image, kernel, stride, padding):
    images = normal(3, *image)
    weights = normal(*kernel[:2], image[2], kernel[2], seed=1)

    def convolve(op):
        return lambda x, w: op(x, w, stride, padding, dimension_numbers=NHWC)

    ours = convolve(convolution.conv_general_dilated)
    plain = convolve(lax.conv_general_dilated)
    assert max(largest_differences(ours, plain, images, weights)) < 1e-5
    assert not uses_lax(ours, images, weights)


@pytest.mark.parametrize(("batch", "loops"), [(12, True), (11, False), (2, False)])
def test_convolutions_of_a_few_images_at_a_time(batch, loops, monkeypatch):
    """Of 4 or 3 in place of 12; of 11, a prime number, all; and 2 are few anyway."""
    tiles = 4 * 36 * (16 + 24) * 4  # bytes of an image's
    monkeypatch.setattr(winograd, "WHOLE_BYTES", 3 * tiles)
    monkeypatch.setattr(winograd, "CHUNK_BYTES", 5 * tiles)
    monkeypatch.setattr(winograd, "CHUNK_PER_KERNELS", 0)
    images, weights = normal(batch, 8, 7, 16), normal(3, 3, 16, 24, seed=1)

    def convolve(op):
        return lambda x, w: op(x, w, (1, 1), "SAME", dimension_numbers=NHWC)

    ours = convolve(convolution.conv_in_chunks)
    differences = largest_differences(ours, convolve(lax.conv_general_dilated), images, weights)
    assert max(differences) < 1e-5
    assert loops == ("scan" in str(jax.make_jaxpr(lambda *a: ours(*a))(images, weights)))
    whole = convolve(convolution.conv_general_dilated)
    assert "scan" not in str(jax.make_jaxpr(lambda *a: whole(*a))(images, weights))


@pytest.mark.parametrize(
    "options",
    [
        {"rhs_dilation": (2, 2)},
        {"lhs_dilation": (1, 2), "padding": ((1, 1), (1, 1))},
        {"precision": lax.Precision.HIGHEST},
        {"padding": ((-1, 1), (1, 1))},
        {"dimension_numbers": ("NCHW", "HWIO", "NCHW")},
        {"dtype": jnp.bfloat16},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_is_not_covered_is_left_to_xla(options):
    options = {"padding": "SAME", "dimension_numbers": NHWC} | options
    dtype = options.pop("dtype", jnp.float32)
    images = normal(2, 16, 16, 16, dtype=dtype)
    weights = normal(3, 3, 16, 16, seed=1, dtype=dtype)

    def convolve(op):
        return lambda x, w: op(x, w, (1, 1), **options)

    ours = convolve(convolution.conv_general_dilated)
    assert uses_lax(ours, images, weights)
    plain = convolve(lax.conv_general_dilated)
    np.testing.assert_array_equal(ours(images, weights), plain(images, weights))


def test_patches_that_would_fill_the_memory_are_left_to_xla(monkeypatch):
    images, weights = normal(2, 8, 8, 4), normal(5, 5, 4, 4)

    def convolve(x, w):
        return convolution.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=NHWC)

    assert not uses_lax(convolve, images, weights)
    monkeypatch.setattr(convolution, "MAX_PATCH_BYTES", 4 * 2 * 8 * 8 * 100 - 1)
    assert uses_lax(convolve, images, weights)


def test_convolutions_under_vmap():
    images, weights = normal(2, 3, 6, 6, 16), normal(2, 3, 3, 16, 16, seed=1)

    def convolve(op):
        return jax.vmap(lambda x, w: op(x, w, (1, 1), "SAME", dimension_numbers=NHWC))

    differences = largest_differences(
        convolve(convolution.conv_general_dilated),
        convolve(lax.conv_general_dilated),
        images,
        weights,
    )
    assert max(differences) < 1e-5


@pytest.mark.parametrize(
    ("shape", "window", "stride"),
    [
        ((8, 6), 2, 2),
        ((7, 8), 2, 2),
        ((9, 8), 3, 2),
        ((10, 7), 3, 2),
        ((6, 6), 3, 1),
        ((13, 12), 5, 2),
        ((8, 8), 4, 4),
        ((9, 9), 2, 3),  # XLA's own, as pixels between the windows are left out
    ],
)
def test_pooling_equals_xlas_to_the_bit(shape, window, stride):
    # Rounded, so that many pixels are equal: the gradient must go to the same of them.
    x = jnp.round(normal(3, *shape, 5))

    def pool(op):
        return lambda x: op(x, (window,) * 2, (stride,) * 2)

    ours = results_and_gradients(pool(pooling.max_pool), x)
    plain = results_and_gradients(pool(nn.max_pool), x)
    jax.tree.map(np.testing.assert_array_equal, ours, plain)


def rounded(*shape, seed=0):
    """Numbers of which each is a bfloat16, as float32."""
    return normal(*shape, seed=seed, dtype=jnp.bfloat16).astype(jnp.float32)


def convolve_plainly(images, kernel):
    return lax.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=NHWC, precision=lax.Precision.HIGHEST
    )


def shares(pairs):
    """Of the largest value, how much the two arrays of each pair differ."""
    return [float(jnp.abs(ours - right).max() / jnp.abs(right).max()) for ours, right in pairs]


@pytest.mark.parametrize(
    ("batch", "side", "channels", "features"),
    [(3, 3, 8, 12), (3, 3, 12, 8), (1, 5, 6, 6), (1, 5, 7, 5)],
)
def test_sums_of_bfloat16_products_are_those_of_float32(batch, side, channels, features):
    """The products are exact in float32, so that only the order of the sums can differ."""
    images = rounded(batch, 6, 5, channels)
    kernel = rounded(side, side, channels, features, seed=1)
    gradient = rounded(batch, 6, 5, features, seed=2)

    @jax.jit
    def ours(images, kernel, gradient):
        to_ours = functools.partial(jnp.transpose, axes=(3, 1, 2, 0))  # and back
        bits = bfloat16.to_bits(kernel)
        y, saved = amx.correlate(bfloat16.to_bits(to_ours(images)), bits)
        by_images, by_kernel = amx.correlate_backward(
            saved, bits, bfloat16.to_bits(to_ours(gradient))
        )
        return to_ours(y), to_ours(by_images), by_kernel

    @jax.jit
    def plain(images, kernel, gradient):
        y, pull_back = jax.vjp(convolve_plainly, images, kernel)
        return y, *pull_back(gradient)

    operands = images, kernel, gradient
    by_y, by_images, by_kernel = shares(zip(ours(*operands), plain(*operands), strict=True))
    # Sums of at most 300 products; those of thousands differ by up to 9e-7.
    assert max(by_y, by_images) < 2e-7
    assert by_kernel < 6e-7


@pytest.mark.parametrize(("channels", "features", "pool"), [(8, 12, None), (12, 8, (2, 2))])
def test_convolution_relu_and_pooling_in_bfloat16_as_one(channels, features, pool):
    images = rounded(2, 6, 8, channels)
    kernel, bias = rounded(3, 3, channels, features, seed=1), normal(features, seed=2)

    def layer(conv_relu_pool, dtype):
        def function(images, kernel, bias):
            x = conv_relu_pool(images.astype(dtype), kernel, bias, stride=1, pool=pool)
            return x.astype(jnp.float32)

        return function

    ours = layer(amx.conv_relu_pool, jnp.bfloat16)
    plain = layer(reference.conv_relu_pool, jnp.float32)
    # The result is rounded once, to 8 bits, and so is the gradient on either side.
    assert max(largest_differences(ours, plain, images, kernel, bias)) < 2**-8
    assert not uses_lax(ours, images, kernel, bias)


def test_equal_pixels_and_negative_ones_get_the_gradient_that_xla_gives_them():
    # A kernel of one pixel, 1: the operation is ReLU and pooling alone, and exact.
    images = jnp.round(normal(3, 8, 6, 5)).astype(jnp.bfloat16)
    kernel, bias = jnp.eye(5).reshape(1, 1, 5, 5), jnp.zeros(5)

    def layer(conv_relu_pool):
        return lambda x: conv_relu_pool(x, kernel, bias, stride=1, pool=(2, 2))

    ours, plain = (
        jax.jit(functools.partial(results_and_gradients, layer(op)))(images)
        for op in (amx.conv_relu_pool, reference.conv_relu_pool)
    )
    jax.tree.map(np.testing.assert_array_equal, ours, plain)


def test_numbers_that_are_none_stay_visible():
    images = normal(1, 4, 4, 3, dtype=jnp.bfloat16).at[0, 0, 0, 0].set(jnp.nan)
    kernel, bias = normal(3, 3, 3, 4), jnp.zeros(4)
    for pool in (None, (2, 2)):
        layer = functools.partial(amx.conv_relu_pool, stride=1, pool=pool)
        assert jnp.isnan(jax.jit(layer)(images, kernel, bias)[0, 0, 0]).all()


def test_bits_are_those_of_the_nearest_bfloat16():
    special = [0.0, -0.0, jnp.inf, -jnp.inf, jnp.nan, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38]
    numbers = jnp.concatenate([normal(1000), jnp.asarray(special, jnp.float32)])
    ours = bfloat16.from_bits(bfloat16.to_bits(numbers)).astype(jnp.float32)
    np.testing.assert_array_equal(ours, numbers.astype(jnp.bfloat16).astype(jnp.float32))


@pytest.mark.parametrize(
    ("options", "fused"),
    [
        ({}, True),
        ({"pool": (3, 2)}, True),  # the pooling alone is XLA's
        ({"image": (7, 8, 4)}, True),
        ({"stride": 2}, False),
        ({"kernel": 2}, False),
        ({"dtype": jnp.float32}, False),
    ],
    ids=str,
)
def test_what_one_operation_does_not_cover_is_composed(options, fused):
    defaults = {"pool": (2, 2), "image": (8, 8, 4), "stride": 1, "kernel": 3}
    options = defaults | {"dtype": jnp.bfloat16} | options
    images = normal(2, *options["image"], dtype=options["dtype"])
    kernel = rounded(*(options["kernel"],) * 2, 4, 6, seed=1)
    bias = rounded(6, seed=2)

    def layer(conv_relu_pool):
        return functools.partial(
            conv_relu_pool, stride=options["stride"], pool=options["pool"], bias=bias
        )

    ours, plain = (
        jax.jit(layer(op))(images, kernel) for op in (amx.conv_relu_pool, reference.conv_relu_pool)
    )
    assert uses_lax(layer(amx.conv_relu_pool), images, kernel) is not fused
    assert ours.dtype == plain.dtype
    ours, plain = ours.astype(jnp.float32), plain.astype(jnp.float32)
    np.testing.assert_allclose(ours, plain, rtol=0.02 if fused else 0, atol=0.02 if fused else 0)


@pytest.mark.parametrize(
    ("options", "covered"),
    [
        ({}, True),
        ({"padding": "SAME"}, True),
        ({"lhs_dilation": (1, 1), "rhs_dilation": (1, 1), "precision": None}, True),
        ({"padding": "VALID"}, False),
        ({"window_strides": (2, 2)}, False),
        ({"rhs_dilation": (2, 2)}, False),
        ({"feature_group_count": 2}, True),
        ({"precision": lax.Precision.HIGHEST}, False),
        ({"preferred_element_type": jnp.float32}, False),
        ({"dimension_numbers": ("NCHW", "HWIO", "NCHW")}, False),
        ({"dtype": jnp.float32}, False),
    ],
    ids=str,
)
def test_convolution_in_bfloat16_and_what_it_leaves_to_xla(options, covered):
    defaults = {"window_strides": (1, 1), "padding": ((1, 1), (1, 1)), "dimension_numbers": NHWC}
    options = defaults | options
    dtype = options.pop("dtype", jnp.bfloat16)
    images = normal(2, 4, 4, 4, dtype=dtype)
    kernel = normal(3, 3, 4 // options.get("feature_group_count", 1), 4, seed=1, dtype=dtype)
    ours = functools.partial(amx.conv_general_dilated, **options)
    plain = functools.partial(lax.conv_general_dilated, **options)
    assert uses_lax(ours, images, kernel) is not covered
    if covered:
        assert max(largest_differences(ours, plain, images, kernel)) < 2**-6
    else:
        np.testing.assert_array_equal(ours(images, kernel), plain(images, kernel))


def test_patches_in_bfloat16_that_would_fill_the_memory_are_left_to_xla(monkeypatch):
    images, kernel = normal(2, 4, 4, 4, dtype=jnp.bfloat16), normal(3, 3, 4, 6)

    def layer(images, kernel):
        return amx.conv_relu_pool(images, kernel, jnp.zeros(6), stride=1, pool=None)

    assert not uses_lax(layer, images, kernel)
    monkeypatch.setattr(amx, "MAX_PATCH_BYTES", 4 * 9 * 4 * 2 * 16 - 1)
    assert uses_lax(layer, images, kernel)


def test_matrix_products_in_bfloat16():
    x, gradient = normal(5, 24, dtype=jnp.bfloat16), normal(5, 7, seed=9, dtype=jnp.bfloat16)
    weights = normal(24, 7, seed=1)
    dimensions = (((1,), (0,)), ((), ()))

    def multiply(x, weights):
        return bfloat16.dot_general(x, weights, dimensions, precision=None)

    y, pull_back = jax.vjp(multiply, x, weights)
    by_x, by_weights = pull_back(gradient)
    assert y.dtype == by_x.dtype == jnp.bfloat16
    x, gradient, low = (
        each.astype(jnp.bfloat16).astype(jnp.float32) for each in (x, gradient, weights)
    )
    pairs = ((y.astype(jnp.float32), x @ low), (by_x.astype(jnp.float32), gradient @ low.T))
    assert max(shares(pairs)) < 2**-8
    assert shares([(by_weights, x.T @ gradient)])[0] < 4e-7  # not rounded


def test_the_gradient_of_a_dense_layers_kernel_is_not_rounded():
    x, kernel = normal(5, 8), normal(8, 7, seed=1)

    def loss(kernel, chosen):
        layer = nn.Dense(
            7,
            use_bias=False,
            dtype="bfloat16",
            promote_dtype=chosen.promote_dtype,
            dot_general=chosen.dot_general,
        )
        return layer.apply({"params": {"kernel": kernel}}, x).astype(jnp.float32).sum()

    for chosen, rounds in ((ops.AMX, False), (ops.PLAIN, True)):
        gradient = jax.grad(loss)(kernel, chosen)
        assert (gradient == gradient.astype(jnp.bfloat16).astype(jnp.float32)).all() == rounds


@pytest.mark.parametrize(
    ("dtype", "left", "dimensions"),
    [
        (jnp.float32, (5, 8), (((1,), (0,)), ((), ()))),
        (jnp.bfloat16, (2, 5, 8), (((2,), (0,)), ((), ()))),
        (jnp.bfloat16, (8, 8), (((0,), (0,)), ((), ()))),
    ],
)
def test_other_products_are_left_to_xla(dtype, left, dimensions):
    x, weights = normal(*left, dtype=dtype), normal(8, 8, seed=1, dtype=dtype)
    ours = bfloat16.dot_general(x, weights, dimensions)
    np.testing.assert_array_equal(ours, lax.dot_general(x, weights, dimensions))


# In small what the trainer has: both ways to convolve, with pooling and without.
NETWORK = {
    "num_classes": 5,
    "features": (8, 5),
    "kernels": (3, 5),
    "strides": (1, 1),
    "pools": (True, False),
    "hidden": (),
}


def test_a_network_is_as_near_to_float32_as_xlas_in_bfloat16():
    images, labels = normal(16, 8, 8, 3), jnp.arange(16) % 5
    shapes = jax.eval_shape(
        lambda: AlexNet(**NETWORK).init(jax.random.key(0), images, train=False)["params"]
    )
    parameters = jax.tree.map(
        lambda leaf: normal(*leaf.shape) / np.prod(leaf.shape[:-1]) ** 0.5, shapes
    )

    @jax.jit
    def gradients(parameters, images):
        """By parameters and images: in float32, and in bfloat16 by this package and by XLA."""

        def loss(parameters, images, model):
            logits = model.apply({"params": parameters}, images, train=False)
            return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(16), labels])

        return [
            jax.grad(loss, argnums=(0, 1))(
                parameters, images, AlexNet(dtype=dtype, ops=chosen, **NETWORK)
            )
            for dtype, chosen in (
                ("float32", ops.PLAIN),
                ("bfloat16", ops.AMX),
                ("bfloat16", ops.PLAIN),
            )
        ]

    def distances(low, right):
        """Of each array, as shares of its length."""
        pairs = zip(jax.tree.leaves(low), jax.tree.leaves(right), strict=True)
        return [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs]

    right, ours, plain = jax.device_get(gradients(parameters, images))
    ours, plain = distances(ours, right), distances(plain, right)
    assert min(ours) > 1e-4  # it is in bfloat16 that this computes
    assert np.mean(ours) < 1.5 * np.mean(plain)
    assert max(ours) < 1.5 * max(plain)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_network_has_the_same_parameters_and_no_convolution_of_xlas(norm):
    images = jnp.zeros((1, 8, 8, 3))
    shapes = [
        jax.eval_shape(lambda model=model: model.init(jax.random.key(0), images, train=False))
        for model in (
            AlexNet(norm=norm, **NETWORK),
            AlexNet(norm=norm, dtype="bfloat16", ops=ops.AMX, **NETWORK),
        )
    ]
    assert shapes[0] == shapes[1]
    variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes[1])
    for chosen, used in ((ops.AMX, False), (ops.PLAIN, True)):
        model = AlexNet(norm=norm, dtype="bfloat16", ops=chosen, **NETWORK)
        assert (
            uses_lax(lambda x, model=model: model.apply(variables, x, train=False), images) is used
        )


def test_the_layer_starts_as_flaxs_does():
    init, images = nn.initializers.he_normal(), jnp.zeros((1, 4, 4, 3))
    layers = (ConvReluPool(4, 3, 1, None, init, ops.AMX), nn.Conv(4, (3, 3), kernel_init=init))
    ours, right = jax.jit(lambda: [layer.init(jax.random.key(5), images) for layer in layers])()
    jax.tree.map(np.testing.assert_array_equal, ours, right)


def test_between_two_operations_nothing_changes_the_order_of_the_numbers():
    images, narrow, wide = normal(4, 8, 8, 3), normal(3, 3, 3, 5), normal(3, 3, 5, 7)

    def layers(images, narrow, wide):
        x = images.astype(jnp.bfloat16)
        x = amx.conv_relu_pool(x, narrow, jnp.zeros(5), stride=1, pool=None)
        return amx.conv_relu_pool(x, wide, jnp.zeros(7), stride=1, pool=None)

    program = jax.jit(layers).lower(images, narrow, wide).compile().as_text()
    main = program[program.index("ENTRY") :]
    # conditional(which branch, its operands, the other's operands)
    (first, _), (_, operands) = re.findall(r"%(\S+) = .* conditional\(\S+ \S+ %(\S+)\)", main)
    (between,) = re.findall(rf"%(\S+) = \S+ get-tuple-element\(%{re.escape(first)}\)", main)
    assert re.search(rf"%{re.escape(operands)} = .* tuple\(.*%{re.escape(between)}\b", main)


def test_bfloat16_under_vmap():
    images, kernels = normal(2, 2, 4, 4, 3, dtype=jnp.bfloat16), normal(2, 3, 3, 3, 4)

    @jax.jit
    def gradients(images, kernel):
        def layer(images, kernel):
            x = amx.conv_relu_pool(images, kernel, jnp.zeros(4), stride=1, pool=(2, 2))
            return jnp.sin(x.astype(jnp.float32)).sum()

        return jax.grad(layer, argnums=(0, 1))(images, kernel)

    together = jax.jit(jax.vmap(gradients))(images, kernels)
    for i in range(2):
        alone = gradients(images[i], kernels[i])
        for ours, right in zip(together, alone, strict=True):
            ours, right = (x.astype(jnp.float32) for x in (ours[i], right))
            np.testing.assert_allclose(ours, right, rtol=1e-5, atol=1e-5)


def test_bfloat16_on_several_devices():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    images, kernel = normal(8, 4, 4, 3), normal(3, 3, 3, 6)

    def layer(images, kernel):
        return amx.conv_relu_pool(
            images.astype(jnp.bfloat16), kernel, jnp.zeros(6), stride=1, pool=(2, 2)
        )

    compute = jax.jit(functools.partial(results_and_gradients, layer))
    shared = compute(jax.device_put(images, split), jax.device_put(kernel, whole))
    for ours, right in zip(shared, compute(images, kernel), strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-5, atol=1e-5)


CPUINFO = """processor\t: 0
model name\t: a CPU
flags\t\t: fpu sse2 avx512f avx512_bf16 amx_bf16 amx_tile
bugs\t\t: spectre_v1

processor\t: 1
flags\t\t: fpu
"""


def test_instruction_sets_are_read_as_linux_lists_them(tmp_path):
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    found = cpu_info.instruction_sets(tmp_path / "cpuinfo")
    assert found == {"fpu", "sse2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile"}
    (tmp_path / "arm").write_text("processor\t: 0\nFeatures\t: fp asimd bf16\n")
    assert cpu_info.instruction_sets(tmp_path / "arm") == frozenset()
    assert cpu_info.instruction_sets(tmp_path / "none") == frozenset()


def test_a_cpu_is_named_by_linux_or_else_by_its_architecture(tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: AMD EPYC\nflags\t: fpu\n")
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    for processor, name in (("POWER9", "POWER9"), ("", "riscv64")):
        monkeypatch.setattr(platform, "processor", lambda processor=processor: processor)
        assert cpu_info.cpu_name(tmp_path / "cpuinfo") == "AMD EPYC"
        assert cpu_info.cpu_name(tmp_path / "none") == name


def test_cores_are_those_that_the_process_may_use(monkeypatch):
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert cpu_info.cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert cpu_info.cores() == 12


def test_the_switch(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    for dtype in ("float32", "bfloat16"):
        assert ops.choose("off", "cpu", dtype) is ops.PLAIN
        assert ops.choose("auto", "gpu", dtype) is ops.PLAIN
    assert not caplog.records
    monkeypatch.setattr(cpu_info, "cores", lambda: 2)
    assert ops.choose("auto", "cpu", "float32") is ops.FEW_CORES
    assert ops.choose("auto", "cpu", "float32", devices=2) is ops.CPU
    assert ops.choose("on", "gpu", "float32") is ops.CPU
    assert "'on'" in caplog.text
    monkeypatch.setattr(cpu_info, "cores", lambda: 3)
    assert ops.choose("auto", "cpu", "float32") is ops.CPU


def test_the_switch_in_bfloat16(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(cpu_info, "instruction_sets", lambda: frozenset({"avx2"}))
    assert ops.choose("auto", "cpu", "bfloat16") is ops.PLAIN
    assert caplog.records[-1].levelname == "WARNING"
    assert "no AMX" in caplog.text
    assert ops.choose("on", "cpu", "bfloat16") is ops.AMX
    assert "no instructions for them" in caplog.text
    monkeypatch.setattr(cpu_info, "instruction_sets", lambda: frozenset({"amx_bf16", "avx2"}))
    assert ops.choose("auto", "cpu", "bfloat16") is ops.AMX
    assert "has amx_bf16" in caplog.text
    assert ops.choose("auto", "cpu", "bfloat16", devices=2) is ops.PLAIN
    assert "2 devices" in caplog.text
    assert ops.choose("on", "cpu", "bfloat16", devices=2) is ops.AMX


@pytest.mark.parametrize(
    ("name", "dtype", "part"),
    [
        ("CPU", "float32", "conv_relu_pool"),
        ("FEW_CORES", "float32", "conv_relu_pool"),
        ("FEW_CORES", "float32", "conv_general_dilated"),
        ("AMX", "bfloat16", "conv_general_dilated"),
    ],
)
def test_a_kernel_that_computes_something_else_is_not_used(name, dtype, part, monkeypatch, caplog):
    right = getattr(getattr(ops, name), part)

    def wrong(*arguments, **options):
        return right(*arguments, **options) * jnp.asarray(1.2, dtype)

    monkeypatch.setattr(ops, name, getattr(ops, name)._replace(**{part: wrong}))
    monkeypatch.setattr(cpu_info, "cores", lambda: 1 if name == "FEW_CORES" else 8)
    assert ops.choose("on", "cpu", dtype) is ops.PLAIN
    assert "differ" in caplog.text


@pytest.mark.parametrize("instructions", ["SSE4_2", "AVX2"])
def test_a_cpu_with_fewer_instructions_computes_the_same(instructions):
    """The self-check passes, results and gradients included, whatever XLA may use of this CPU."""
    code = "from alexnet_jax import ops; print(ops.choose('on', 'cpu', 'float32') is ops.PLAIN)"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_cpu_max_isa={instructions}",
    }
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout == "False\n"
