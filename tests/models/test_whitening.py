"""The frozen first layer: what it measures, where it lies, and that nothing trains it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from alexnet_jax.data.augment import create_normalize
from alexnet_jax.models import init_from_data, whitening
from alexnet_jax.models.alexnet import AlexNet
from alexnet_jax.models.whitening import COLLECTION, EPSILON, NAME, whitening_kernels
from alexnet_jax.state import create_state
from alexnet_jax.steps import train_step

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
SMALL = {"features": (4,), "kernels": (3,), "strides": (1,), "pools": (True,), "hidden": (8,)}


def smooth_images(count=40, size=12):
    """Neighboring pixels and channels resemble each other, as in photographs."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(40, 216, (count, size // 4, size // 4, 1)) + rng.integers(
        -20, 20, (count, size // 4, size // 4, 3)
    )
    images = coarse.repeat(4, 1).repeat(4, 2) + rng.integers(-15, 16, (count, size, size, 3))
    return images.astype(np.uint8)


def torch_patches(images, side):
    """[N * positions, k, k, C] of the normalized images, by PyTorch's unfold."""
    x = (torch.tensor(images).double() / 255 - torch.tensor(MEAN).double()) / torch.tensor(
        STD
    ).double()
    patches = x.permute(0, 3, 1, 2).unfold(2, side, 1).unfold(3, side, 1)
    return patches.permute(0, 2, 3, 4, 5, 1).reshape(-1, side, side, 3).numpy()


@pytest.mark.parametrize("side", [1, 2, 3])
def test_the_kernels_whiten_the_patches(side):
    images = smooth_images()
    kernels = whitening_kernels(images, MEAN, STD, side)
    size = 3 * side**2
    assert kernels.shape == (side, side, 3, 2 * size)
    assert kernels.dtype == np.float32
    np.testing.assert_array_equal(kernels[..., size:], -kernels[..., :size])
    patches = torch_patches(images, side).reshape(-1, size)
    outputs = patches @ kernels[..., :size].reshape(size, size)
    moments = outputs.T @ outputs / len(outputs)
    # Variance v / (v + epsilon) along each eigenvector, and none in common.
    values = np.linalg.eigvalsh(patches.T @ patches / len(patches))[::-1]
    np.testing.assert_allclose(moments, np.diag(values / (values + EPSILON)), atol=1e-5)


def test_the_kernels_do_not_depend_on_the_order_of_the_images():
    images = smooth_images(600)
    shuffled = images[np.random.default_rng(1).permutation(len(images))]
    measure = functools.partial(whitening_kernels, mean=MEAN, std=STD, side=2)
    np.testing.assert_array_equal(measure(images), measure(shuffled))


def test_the_kernels_do_not_depend_on_how_many_images_go_together(monkeypatch):
    images = smooth_images(7)
    measure = functools.partial(whitening_kernels, images, MEAN, STD, 2)
    together = measure()
    monkeypatch.setattr(whitening, "CHUNK_BYTES", 3 * 8 * 12 * 11 * 11)
    np.testing.assert_array_equal(measure(), together)


def test_the_network_convolves_with_them_and_keeps_the_size():
    images = smooth_images(3)
    model = AlexNet(num_classes=5, whitening=2, **SMALL)
    fixed = init_from_data(model, lambda count: images, MEAN, STD)
    kernel = fixed[COLLECTION][NAME]["kernel"]
    rng = np.random.default_rng(0)
    variables = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.float32(images), train=False)
    )
    params = jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), variables["params"])
    normalized = create_normalize(MEAN, STD)(jnp.asarray(images))
    _, seen = model.apply(
        {"params": params, **fixed}, normalized, train=False, capture_intermediates=True
    )
    ours = seen["intermediates"][NAME]["__call__"][0]
    x = torch.nn.functional.pad(
        torch.tensor(np.asarray(normalized)).permute(0, 3, 1, 2), (0, 1) * 2
    )
    theirs = torch.nn.functional.conv2d(
        x, torch.tensor(kernel).permute(3, 2, 0, 1), torch.tensor(np.asarray(params[NAME]["bias"]))
    ).permute(0, 2, 3, 1)
    assert ours.shape == (3, 12, 12, 24)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4, atol=1e-4)
    assert params["conv1"]["kernel"].shape == (3, 3, 24, 4)


def test_a_state_has_them_and_training_leaves_them():
    images = smooth_images(8)
    model = AlexNet(num_classes=5, whitening=2, norm="batch", **SMALL)
    fixed = init_from_data(model, lambda count: images, MEAN, STD)
    optimizer = optax.sgd(0.1)
    create = functools.partial(create_state, model, optimizer, (12, 12, 3), 0)
    state = jax.jit(functools.partial(create, ema=True, variables=fixed))()
    assert jax.tree.map(jnp.shape, state.model_state) == jax.tree.map(
        jnp.shape, jax.eval_shape(create).model_state
    )
    step = functools.partial(
        train_step,
        model=model,
        optimizer=optimizer,
        normalize=create_normalize(MEAN, STD),
        steps_per_epoch=1,
        ema_decay=0.5,
    )
    batch = {"image": images, "label": np.arange(8) % 5, "mask": np.ones(8, bool)}
    after, _ = jax.jit(step)(state, batch)
    measured = fixed[COLLECTION][NAME]["kernel"]
    for kept in (state.model_state, after.model_state, after.ema["model_state"]):
        np.testing.assert_array_equal(kept[COLLECTION][NAME]["kernel"], measured)
    assert (np.asarray(after.params[NAME]["bias"]) != 0).any()


def test_without_whitening_no_image_is_looked_at():
    def read_images(count):
        raise AssertionError

    assert init_from_data(AlexNet(num_classes=5, **SMALL), read_images, MEAN, STD) == {}
    model = AlexNet(num_classes=5, whitening=2, whitening_bias=False, **SMALL)
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False)
    )
    assert NAME not in shapes["params"]
