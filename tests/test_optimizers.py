import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alexnet_jax.config import default_config
from alexnet_jax.optimizers import create_optimizer, create_schedule, kernels_only

PARAMS = {
    "conv1": {"kernel": jnp.full((3, 3, 2, 4), 2.0), "bias": jnp.full(4, 2.0)},
    "norm1": {"scale": jnp.full(4, 2.0), "bias": jnp.full(4, 2.0)},
    "logits": {"kernel": jnp.full((4, 5), 2.0), "bias": jnp.full(5, 2.0)},
}


def section(**options):
    config = default_config().optimizer
    config.update(options)
    return config


def one_update(gradients, **options):
    optimizer = create_optimizer(section(**options), optax.constant_schedule(0.1))
    updates, _ = optimizer.update(gradients, optimizer.init(PARAMS), PARAMS)
    return updates


def rates(name, warmup, total, milestones, count):
    """The learning rate after `count` of `total` updates, by formula; the peak is 0.5."""
    if count < warmup:
        return 0.5 * count / warmup
    done = min(1, (count - warmup) / (total - warmup))
    if name == "cosine":
        return 0.5 * (0.1 + 0.9 * (1 + np.cos(np.pi * done)) / 2)
    if name == "linear":
        return 0.5 * (1 - 0.9 * done)
    return 0.5 * 0.2 ** sum(count >= m for m in milestones) if name == "step" else 0.5


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "step"])
@pytest.mark.parametrize("warmup_epochs", [0.0, 2.0, 2.5])
@pytest.mark.parametrize("accumulate_steps", [1, 2])
def test_schedule_follows_its_formula(name, warmup_epochs, accumulate_steps):
    config = section(
        learning_rate=0.5,
        schedule=name,
        warmup_epochs=warmup_epochs,
        accumulate_steps=accumulate_steps,
        final_fraction=0.1,
        step_epochs=(1, 6, 15),  # with a milestone that warm-up passes over
        step_factor=0.2,
    )
    schedule = create_schedule(config, steps_per_epoch=12, epochs=20)
    per_epoch = 12 // accumulate_steps
    warmup, total = round(warmup_epochs * per_epoch), 20 * per_epoch
    milestones = [epoch * per_epoch for epoch in (1, 6, 15)]
    counts = jnp.arange(total + 5)
    ours = jnp.broadcast_to(jax.vmap(schedule)(counts), counts.shape)
    theirs = [rates(name, warmup, total, milestones, int(count)) for count in counts]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_an_epoch_that_accumulation_does_not_divide():
    config = section(learning_rate=1.0, schedule="linear", accumulate_steps=4)
    schedule = create_schedule(config, steps_per_epoch=10, epochs=6)  # 15 updates
    assert [float(schedule(count)) for count in (0, 3, 15)] == pytest.approx([1, 0.8, 0])


def test_kernels_are_told_from_the_rest():
    assert kernels_only(PARAMS) == {
        "conv1": {"kernel": True, "bias": False},
        "norm1": {"scale": False, "bias": False},
        "logits": {"kernel": True, "bias": False},
    }


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_weight_decay_acts_on_kernels_alone(name):
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    updates = one_update(zero, name=name, weight_decay=0.3, momentum=0.0)
    for layer, leaves in updates.items():
        for leaf, update in leaves.items():
            expected = -0.1 * 0.3 * 2.0 if leaf == "kernel" else 0.0
            np.testing.assert_allclose(update, expected, rtol=1e-6, err_msg=f"{layer}/{leaf}")


def norm(tree):
    return np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(tree)))


@pytest.mark.parametrize("length", [0.5, 7.0])
def test_clip_norm_bounds_the_update(length):
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), PARAMS)
    scale = length / norm(gradients)
    gradients = jax.tree.map(lambda leaf: jnp.float32(leaf * scale), gradients)
    updates = one_update(gradients, name="sgd", momentum=0.0, clip_norm=2.0)
    assert norm(updates) == pytest.approx(0.1 * min(length, 2.0), rel=1e-5)
    for update, gradient in zip(*map(jax.tree.leaves, (updates, gradients)), strict=True):
        np.testing.assert_allclose(update, -0.1 * min(1, 2 / length) * gradient, rtol=1e-5)


def test_clip_norm_0_leaves_the_gradient():
    gradients = jax.tree.map(lambda leaf: 100 * leaf, PARAMS)
    updates = one_update(gradients, name="sgd", momentum=0.0, clip_norm=0.0)
    assert norm(updates) == pytest.approx(0.1 * norm(gradients), rel=1e-5)


def test_clip_norm_bounds_the_mean_of_accumulated_gradients():
    options = section(name="sgd", momentum=0.0, clip_norm=1.0, accumulate_steps=2)
    optimizer = create_optimizer(options, optax.constant_schedule(1.0))
    params = jnp.zeros(1)
    state = optimizer.init(params)
    # Clipped one by one, these two would cancel out.
    first, state = optimizer.update(jnp.array([10.0]), state, params)
    second, _ = optimizer.update(jnp.array([-9.5]), state, params)
    np.testing.assert_allclose([first[0], second[0]], [0, -0.25], rtol=1e-5)
