"""The CPU's kernels against XLA's operations: results, gradients, and what falls back."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from alexnet_jax import ops
from alexnet_jax.ops import convolution, pooling

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
    assert max(largest_differences(ours, plain, images, weights)) < 2e-6
    assert not uses_lax(ours, images, weights)


@pytest.mark.parametrize(
    "options",
    [
        {"feature_group_count": 2},
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
    weights = normal(3, 3, 16 // options.get("feature_group_count", 1), 16, seed=1, dtype=dtype)

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
    monkeypatch.setattr(convolution, "_PATCHES_BYTES", 4 * 2 * 8 * 8 * 100 - 1)
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
    assert max(differences) < 2e-6


@pytest.mark.parametrize(
    ("shape", "window", "stride"),
    [((8, 6), 2, 2), ((7, 8), 2, 2), ((9, 9), 3, 2), ((8, 8), 4, 4)],
)
def test_pooling_equals_xlas_to_the_bit(shape, window, stride):
    # Rounded, so that many pixels are equal: the gradient must go to the same of them.
    x = jnp.round(normal(3, *shape, 5))

    def pool(op):
        return lambda x: op(x, (window,) * 2, (stride,) * 2)

    ours = results_and_gradients(pool(pooling.max_pool), x)
    plain = results_and_gradients(pool(nn.max_pool), x)
    jax.tree.map(np.testing.assert_array_equal, ours, plain)


def test_the_switch(caplog):
    caplog.set_level(logging.INFO)
    assert ops.choose("off", "cpu") is ops.PLAIN
    assert ops.choose("auto", "gpu") is ops.PLAIN
    assert not caplog.records
    assert ops.choose("auto", "cpu") is ops.CPU
    assert ops.choose("on", "gpu") is ops.CPU
    assert "'on'" in caplog.text


def test_a_kernel_that_computes_something_else_is_not_used(monkeypatch, caplog):
    wrong = ops.CPU._replace(max_pool=lambda x, *_: nn.avg_pool(x, (2, 2), (2, 2)))
    monkeypatch.setattr(ops, "CPU", wrong)
    assert ops.choose("auto", "cpu") is ops.PLAIN
    assert "differ" in caplog.text
