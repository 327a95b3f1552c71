import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alexnet_jax.errors import InputError
from alexnet_jax.optim.lookahead import lookahead
from alexnet_jax.optim.muon import muon_share
from alexnet_jax.optim.optimizers import create_optimizer, kernels_only
from alexnet_jax.optim.options import OptimizerConfig
from alexnet_jax.optim.patterns import check_patterns
from alexnet_jax.optim.plateau import after_validation, plateau_factor
from alexnet_jax.optim.schedules import create_schedule

PARAMS = {
    "conv1": {"kernel": jnp.full((3, 3, 2, 4), 2.0), "bias": jnp.full(4, 2.0)},
    "norm1": {"scale": jnp.full(4, 2.0), "bias": jnp.full(4, 2.0)},
    "logits": {"kernel": jnp.full((4, 5), 2.0), "bias": jnp.full(5, 2.0)},
}


def section(**options):
    return OptimizerConfig(**options)


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
        end_lr_fraction=0.1,
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


def random_like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.float32(rng.normal(size=leaf.shape)), tree)


def run(optimizer, params, gradients):
    """The parameters after each update."""
    update, state, seen = jax.jit(optimizer.update), optimizer.init(params), []
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    return seen


def test_rates_are_multiplied_where_patterns_match():
    gradients = random_like(PARAMS, 0)
    options = {"name": "sgd", "momentum": 0.0}
    plain = one_update(gradients, **options)
    patterns = {"lr_multipliers": (("norm*/bias", 64.0), ("*/bias", 0.5))}
    factors = {"norm1/bias": 32.0, "conv1/bias": 0.5, "logits/bias": 0.5}
    for layer, leaves in one_update(gradients, **options, **patterns).items():
        for leaf, update in leaves.items():
            factor = factors.get(f"{layer}/{leaf}", 1.0)
            np.testing.assert_allclose(update, factor * plain[layer][leaf], rtol=1e-6)


@pytest.mark.parametrize("power", [0.0, 3.0])
def test_lookahead_follows_its_formula(power):
    """SGD on the fast weights, in NumPy; and the last update ends on the slow ones."""
    params, total, period = {"w": jnp.arange(4.0)}, 8, 3
    gradients = [random_like(params, seed) for seed in range(total)]
    options = section(
        name="sgd",
        momentum=0.0,
        lookahead_period=period,
        lookahead_decay=0.8,
        lookahead_power=power,
    )
    optimizer = create_optimizer(options, optax.constant_schedule(0.1), steps=total)
    fast = slow = np.arange(4.0)
    for count, ours in enumerate(run(optimizer, params, gradients), 1):
        fast = fast - 0.1 * np.asarray(gradients[count - 1]["w"])
        if count % period == 0 or count == total:
            decay = 0.8 * (count / total) ** power
            fast = slow = decay * slow + (1 - decay) * fast
        np.testing.assert_allclose(ours["w"], fast, rtol=1e-5, atol=1e-6)


def test_lookahead_keeps_no_buffer_twice():
    params = jnp.arange(4.0)
    state = lookahead(optax.sgd(0.1), 2, lambda count: 0.5, 4).init(params)
    assert state.slow.unsafe_buffer_pointer() != params.unsafe_buffer_pointer()


def newton_schulz(matrix):
    """Jordan (2024), in NumPy: the quintic that brings singular values near 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("unit_filters", [False, True])
def test_muon_follows_its_formula_and_leaves_the_rest_to_the_other(unit_filters):
    params = random_like(PARAMS, 0)
    gradients = [random_like(PARAMS, seed) for seed in range(1, 4)]
    options = section(
        name="sgd",
        learning_rate=0.1,
        momentum=0.0,
        muon_learning_rate=0.3,
        muon_momentum=0.6,
        muon_normalize_filters=unit_filters,
    )
    ours = run(create_optimizer(options, optax.constant_schedule(0.1)), params, gradients)
    weights, momentum = np.asarray(params["conv1"]["kernel"]).reshape(-1, 4).T, 0.0
    for count, (gradient, seen) in enumerate(zip(gradients, ours, strict=True), 1):
        g = np.asarray(gradient["conv1"]["kernel"]).reshape(-1, 4).T  # a row for each filter
        momentum = 0.6 * momentum + g
        if unit_filters:
            weights = weights * (2 / np.linalg.norm(weights))  # 4 ** 0.5
        # Nesterov's, as NAdam (Dozat, 2016) corrects it; its scale counts for nothing.
        ahead = g / (1 - 0.6**count) + 0.6 * momentum / (1 - 0.6 ** (count + 1))
        weights = weights - 0.3 * newton_schulz(ahead)
        np.testing.assert_allclose(
            seen["conv1"]["kernel"], weights.T.reshape(3, 3, 2, 4), rtol=1e-3, atol=1e-3
        )
    rest = run(optax.sgd(0.1), params, gradients)[-1]
    for layer, leaf in (("conv1", "bias"), ("norm1", "scale"), ("logits", "kernel")):
        np.testing.assert_allclose(ours[-1][layer][leaf], rest[layer][leaf], rtol=1e-6)


def test_muon_follows_the_schedule():
    options = section(name="sgd", learning_rate=0.5, muon_learning_rate=0.25)
    optimizer = create_optimizer(options, lambda count: 0.5 / (count + 1))
    steps = [PARAMS, *run(optimizer, PARAMS, [random_like(PARAMS, 1)] * 2)]
    kernels = [np.asarray(params["conv1"]["kernel"]) for params in steps]
    first, second = (np.linalg.norm(b - a) for a, b in itertools.pairwise(kernels))
    assert second == pytest.approx(first / 2, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"lr_multipliers": (("nrom*/bias", 2.0),)},
            r"lr_multipliers has 'nrom\*/bias', which matches none",
        ),
        (
            {"muon_learning_rate": 1.0, "muon_pattern": "x"},
            "muon_pattern has 'x', .* conv1/bias, conv1/ker",
        ),
        (
            {"muon_learning_rate": 1.0, "muon_pattern": "conv*"},
            r"'conv\*', which matches biases or scales",
        ),
        (
            {"muon_learning_rate": 1.0, "frozen": ("conv*",)},
            "muon_pattern has .* matches frozen parameters",
        ),
        (
            {"lr_multipliers": (("conv1/*", 2.0),), "frozen": ("conv1/*",)},
            "lr_multipliers has 'conv1/.*', which matches frozen parameters alone",
        ),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(options, says):
    with pytest.raises(InputError, match=says):
        check_patterns(section(**options), PARAMS)
    check_patterns(section(lr_multipliers=(("norm*/bias", 2.0),), muon_learning_rate=0.1), PARAMS)


def test_sgd_of_2012_is_the_rule_of_the_paper():
    """Section 5: v = 0.9 v - 0.0005 e w - e g and w = w + v, with an e that changes."""
    rates = [0.1, 0.1, 0.01, 0.01, 0.001]
    config = section(name="sgd_2012", momentum=0.9, weight_decay=5e-4, nesterov=True)
    optimizer = create_optimizer(config, lambda count: jnp.array(rates)[count])
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.float32(rng.normal(size=(3, 2)))}
    w, v, state = np.float64(params["kernel"]), 0.0, optimizer.init(params)
    for rate in rates:
        g = rng.normal(size=(3, 2))
        updates, state = optimizer.update({"kernel": jnp.float32(g)}, state, params)
        params = optax.apply_updates(params, updates)
        v = 0.9 * v - 0.0005 * rate * w - rate * g
        w = w + v
        np.testing.assert_allclose(params["kernel"], w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"accumulate_steps": 2}, {"frozen": ("conv1/*",)}])
@pytest.mark.parametrize("name", ["adam", "sgd_2012"])
def test_a_plateau_lowers_the_rate(name, options):
    config = section(name=name, schedule="plateau", plateau_patience=2, step_factor=0.1, **options)
    state = create_optimizer(config, optax.constant_schedule(1.0)).init(PARAMS)
    # The third has waited twice for more than 0.5; the seventh twice for more than 0.6.
    accuracies = [0.5, 0.4, 0.5, 0.6, 0.6, 0.59, 0.7, 0.7]
    expected = [1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01]
    for accuracy, factor in zip(accuracies, expected, strict=True):
        state = after_validation(state, accuracy, config)
        assert plateau_factor(state) == pytest.approx(factor)


def test_a_plateau_scales_the_updates():
    config = section(name="sgd", momentum=0.0, schedule="plateau", plateau_patience=1)
    optimizer = create_optimizer(config, optax.constant_schedule(0.1))
    state = optimizer.init(PARAMS)
    for _ in range(2):
        state = after_validation(state, 0.5, config)
    gradients = jax.tree.map(jnp.ones_like, PARAMS)
    updates, _ = optimizer.update(gradients, state, PARAMS)
    for update in jax.tree.leaves(updates):
        np.testing.assert_allclose(update, -0.1 * 0.1, rtol=1e-6)


def test_other_schedules_do_not_go_by_the_accuracy():
    config = section(schedule="cosine")
    state = create_optimizer(config, optax.constant_schedule(1.0)).init(PARAMS)
    after = after_validation(state, 0.5, config)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, after, state)
    assert plateau_factor(state) == 1


@pytest.mark.parametrize("factor", [0.1, 3.0])
def test_what_scales_the_rate_leaves_filters_at_their_norm(factor):
    options = section(
        name="sgd",
        momentum=0.0,
        learning_rate=1.0,
        muon_learning_rate=0.02,
        muon_normalize_filters=True,
        lr_multipliers=(("conv1/*", factor),),
        schedule="plateau",
        plateau_patience=1,
        step_factor=0.5,
    )
    optimizer = create_optimizer(options, optax.constant_schedule(1.0))
    params, gradients = random_like(PARAMS, 0), random_like(PARAMS, 1)
    state = optimizer.init(params)
    for _ in range(2):
        state = after_validation(state, 0.5, options)
    for _ in range(4):
        updates, state = optimizer.update(gradients, state, params)
        before = np.asarray(params["conv1"]["kernel"])
        params = optax.apply_updates(params, updates)
        unit = before * (2 / np.linalg.norm(before))  # 4 ** 0.5
        # The orthogonalised matrix has 4 rows, each of a norm about 1.
        moved = np.linalg.norm(np.asarray(params["conv1"]["kernel"]) - unit)
        assert moved == pytest.approx(0.02 * factor * 0.5 * 2, rel=0.3)
    bias = updates["conv1"]["bias"]
    np.testing.assert_allclose(bias, -factor * 0.5 * gradients["conv1"]["bias"], rtol=1e-6)


def test_muon_says_what_it_trains():
    assert muon_share(section(), PARAMS) == ""
    sizes = [leaf.size for leaf in jax.tree.leaves(PARAMS)]
    says = muon_share(section(muon_learning_rate=0.1), PARAMS)
    assert says.startswith(f"Muon trains {PARAMS['conv1']['kernel'].size} of {sum(sizes)} param")
    says = muon_share(section(muon_learning_rate=0.1, frozen=("norm1/*",)), PARAMS)
    trained = sum(sizes) - sum(leaf.size for leaf in jax.tree.leaves(PARAMS["norm1"]))
    assert f" of {trained} param" in says


@pytest.mark.parametrize("options", [{}, {"accumulate_steps": 2, "clip_norm": 1.0}])
def test_frozen_parameters_stay_and_have_no_state(options):
    config = section(name="adamw", weight_decay=0.1, frozen=("conv*", "norm1/scale"), **options)
    optimizer = create_optimizer(config, optax.constant_schedule(0.1))
    state = optimizer.init(PARAMS)
    trained = sum(
        x.size
        for name in ("norm1/bias", "logits/kernel", "logits/bias")
        for x in [PARAMS[name.split("/")[0]][name.split("/")[1]]]
    )
    arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sum(leaf.size for leaf in arrays) == trained * (3 if options else 2)
    gradients = jax.tree.map(jnp.ones_like, PARAMS)
    for _ in range(options.get("accumulate_steps", 1)):
        updates, state = optimizer.update(gradients, state, PARAMS)
    moved = jax.tree.map(lambda leaf: bool(jnp.any(leaf != 0)), updates)
    assert moved == {
        "conv1": {"kernel": False, "bias": False},
        "norm1": {"scale": False, "bias": True},
        "logits": {"kernel": True, "bias": True},
    }


def test_all_frozen_is_refused():
    with pytest.raises(InputError, match="which is all parameters"):
        check_patterns(section(frozen=("conv*", "*")), PARAMS)
    with pytest.raises(InputError, match=r"optimizer\.frozen has 'cnov[*]'"):
        check_patterns(section(frozen=("cnov*",)), PARAMS)
