import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec
from sklearn.metrics import confusion_matrix

from alexnet_jax.config import TrainConfig, default_config
from alexnet_jax.data.augment import create_augment, create_normalize
from alexnet_jax.data.feed import InMemoryFeed
from alexnet_jax.data.in_memory import InMemoryDataset
from alexnet_jax.data.options import AugmentConfig
from alexnet_jax.data.sampling import epoch_order, padded_batches
from alexnet_jax.data.tta import create_tta
from alexnet_jax.distributed import sharding
from alexnet_jax.metrics import EvalMetrics, TrainMetrics
from alexnet_jax.models.alexnet import AlexNet
from alexnet_jax.optim.optimizers import create_optimizer
from alexnet_jax.state import TrainState, create_state
from alexnet_jax.steps import (
    ORDER_STREAM,
    eval_step,
    eval_step_with_predictions,
    order_key,
    predict_step,
    train_step,
    train_steps,
)

try:  # to compare numbers with, and not a part of every environment
    import torch
    import torch.nn.functional as F
except ImportError:
    torch = None

CLASSES, SIZE = 5, 16
NORMALIZE = create_normalize((0.5, 0.4, 0.3), (0.3, 0.25, 0.2))
SGD = optax.sgd(0.1)


def network(depth=2, **options):
    """Two convolutions; or one, where it does not matter what is trained."""
    fields = {"features": (4, 6), "kernels": (3, 5), "strides": (1, 1), "pools": (True, True)}
    fields = {name: values[:depth] for name, values in fields.items()}
    defaults = {"hidden": (16,), "dropout": 0.0}
    return AlexNet(num_classes=CLASSES, **fields | defaults | options)


def optimizer_of(rate, **options):
    section = default_config().optimizer
    section.update(options)
    return create_optimizer(section, rate if callable(rate) else lambda count: rate)


def step_of(model, optimizer=SGD, **options):
    fixed = {"normalize": NORMALIZE, "steps_per_epoch": 5} | options
    return functools.partial(train_step, model=model, optimizer=optimizer, **fixed)


def new_state(model, optimizer=SGD, key=0):
    """A state with values drawn by NumPy, as compiling the model's own takes long."""
    images = jnp.zeros((1, SIZE, SIZE, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: jnp.float32(
            rng.normal(0, (2 / np.prod(leaf.shape[:-1])) ** 0.5, leaf.shape)
            if leaf.ndim > 1
            else rng.uniform(0.5, 1, leaf.shape)
        ),
        shapes,
    )
    params = variables.pop("params")
    return TrainState(
        step=jnp.int32(0),
        params=params,
        model_state=variables,
        opt_state=optimizer.init(params),
        ema={},
        key=jax.random.key(key),
    )


def examples(seed, count):
    rng = np.random.default_rng(seed)
    # Each image has its own colour, so that they differ after pooling too.
    images = rng.integers(1, 256, (count, 1, 1, 3)) * rng.random((count, SIZE, SIZE, 3))
    return images.astype(np.uint8), rng.integers(CLASSES, size=count, dtype=np.int32)


def batch_of(seed, count=16, masked=()):
    images, labels = examples(seed, count)
    return {"image": images, "label": labels, "mask": ~np.isin(np.arange(count), masked)}


def run(step, state, batches):
    metrics = []
    for batch in batches:
        state, measured = step(state, batch)
        metrics.append(measured)
    return state, metrics


def figures(metrics):
    return jax.device_get(metrics).compute()


def learned(state):
    return {"params": state.params, "model_state": state.model_state}


def difference(new, old):
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), new, old)


def assert_near(ours, theirs, bound):
    """The norm of the error of each array is at most `bound` of the norm of the array."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, x), y in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        error = np.linalg.norm(x - y) / np.linalg.norm(y)
        assert error <= bound, f"{jax.tree_util.keystr(path)}: {error}"


def assert_same(ours, theirs):
    for (path, x), y in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        assert (x == y).all(), jax.tree_util.keystr(path)


def assert_differ(ours, theirs):
    """In every array; what is drawn at random reaches all of them."""
    for x, y in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        assert np.abs(np.asarray(x) - np.asarray(y)).max() > 1e-6


# Against PyTorch: the same mathematics, written by others


class TorchTwin:
    """`network` in PyTorch, with parameters in the layout of ours."""

    def __init__(self, model, state):
        self.model = model
        self.params = jax.tree.map(lambda x: torch.tensor(np.asarray(x)), state.params)
        jax.tree.map(lambda x: x.requires_grad_(), self.params)
        self.statistics = jax.tree.map(
            lambda x: torch.tensor(np.asarray(x)), state.model_state.get("batch_stats", {})
        )
        self.averaged = {}  # layer to the number of pixels its batch statistics are over

    def __call__(self, images):
        x = (torch.tensor(images).double() / 255 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor(
            [0.3, 0.25, 0.2]
        )
        x = x.float().permute(0, 3, 1, 2)
        for i, pool in enumerate(self.model.pools, start=1):
            conv = self.params[f"conv{i}"]
            x = F.conv2d(x, conv["kernel"].permute(3, 2, 0, 1), conv.get("bias"), padding="same")
            if self.statistics:
                name = f"norm{i}"
                self.averaged[name] = x.numel() // x.shape[1]
                running, own = self.statistics[name], self.params[name]
                # PyTorch's momentum is the share of the new value, ours that of the old.
                x = F.batch_norm(
                    x, running["mean"], running["var"], own["scale"], own["bias"], True, 1 - 0.9
                )
            x = F.relu(x)
            x = F.max_pool2d(x, 2) if pool else x
        x = x.permute(0, 2, 3, 1).flatten(1)
        for i in range(1, len(self.model.hidden) + 1):
            x = F.relu(x @ self.params[f"fc{i}"]["kernel"] + self.params[f"fc{i}"]["bias"])
        return x @ self.params["logits"]["kernel"] + self.params["logits"]["bias"]


def torch_optimizer(params, name, weight_decay=0.0):
    leaves = jax.tree.leaves(params)
    groups = [
        {"params": [p for p in leaves if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in leaves if p.ndim == 1], "weight_decay": 0.0},
    ]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=True)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name](groups)


@pytest.mark.skipif(torch is None, reason="PyTorch is not installed")
@pytest.mark.parametrize(
    ("options", "norm", "label_smoothing"),
    [
        ({"name": "adam"}, "none", 0.1),
        ({"name": "adamw", "weight_decay": 0.5}, "batch", 0.0),
        ({"name": "sgd", "weight_decay": 0.5}, "none", 0.0),
    ],
)
def test_training_agrees_with_pytorch(options, norm, label_smoothing):
    def rate(count):
        return 0.01 / (count + 1)

    model = network(norm=norm)
    optimizer = optimizer_of(rate, **options)
    state = start = new_state(model, optimizer)
    step = jax.jit(step_of(model, optimizer, label_smoothing=label_smoothing))
    twin = TorchTwin(model, state)
    trainer = torch_optimizer(twin.params, **options)
    for count in range(3):
        # PyTorch has no mask: it gets the unmasked images alone, which batch norm would tell.
        batch = batch_of(count, masked=(3, 4, 9) if norm == "none" else ())
        state, metrics = step(state, batch)
        images, labels = (batch[name][batch["mask"]] for name in ("image", "label"))
        logits, labels = twin(images), torch.tensor(labels).long()
        loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        trainer.zero_grad()
        loss.backward()
        for group in trainer.param_groups:
            group["lr"] = rate(count)
        trainer.step()

        measured = figures(metrics)
        assert measured["loss"] == pytest.approx(loss.item(), rel=1e-5)
        right = (logits.argmax(1) == labels).float().mean()
        assert measured["accuracy"] == pytest.approx(right.item())
        theirs = jax.tree.map(lambda x: x.detach().numpy(), twin.params)
        assert_near(difference(state.params, start.params), difference(theirs, start.params), 1e-4)
    assert int(state.step) == 3
    for name, pixels in twin.averaged.items():
        ours, theirs = state.model_state["batch_stats"][name], twin.statistics[name]
        np.testing.assert_allclose(ours["mean"], theirs["mean"], rtol=1e-4, atol=1e-6)
        # PyTorch averages unbiased variances, n / (n - 1) of ours, onto the same initial value.
        initial = 0.9**3 * start.model_state["batch_stats"][name]["var"]
        unbiased = (ours["var"] - initial) * pixels / (pixels - 1) + initial
        np.testing.assert_allclose(unbiased, theirs["var"], rtol=1e-5)


# Devices


def on_mesh(step, devices):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    update = sharding.jit_update(step, mesh)

    def placed(state, batch):
        # Copied, as the update gives up what it is given.
        state = jax.device_put(jax.tree.map(jnp.copy, state), sharding.replicated(mesh))
        batch = jax.device_put(batch, sharding.split(mesh))
        assert batch["image"].addressable_shards[0].data.shape[0] == 16 // devices
        return update(state, batch)

    return placed


def pmapped(step):
    step = functools.partial(step, axis_name="batch")
    mapped = jax.pmap(step, axis_name="batch", in_axes=(None, 0), out_axes=None)

    def split(x):
        return x.reshape(8, -1, *x.shape[1:])

    return lambda state, batch: mapped(state, jax.tree.map(split, batch))


def shard_mapped(step, check_vma):
    step = functools.partial(step, axis_name=sharding.AXIS)
    whole, part = PartitionSpec(), PartitionSpec(sharding.AXIS)
    specs = {"in_specs": (whole, part), "out_specs": whole, "check_vma": check_vma}
    return jax.jit(jax.shard_map(step, mesh=sharding.make_mesh(), **specs))


@functools.cache
def reference():
    """Three steps on one device."""
    model, optimizer = network(depth=1, norm="batch"), optimizer_of(0.1, name="sgd")
    return run(on_mesh(step_of(model, optimizer), 1), new_state(model, optimizer), BATCHES)


# Two images a device: none, one or both of them masked.
BATCHES = [batch_of(seed, masked=(0, 1, 2, 5, 9, 13)) for seed in range(3)]


@pytest.mark.parametrize("how", ["jit", "pmap", "shard_map", "shard_map unchecked"])
def test_eight_devices_train_as_one(how, strict_dtypes):
    axis_name = {"jit": None, "pmap": "batch"}.get(how, sharding.AXIS)
    model = network(depth=1, norm="batch", axis_name=axis_name)
    optimizer = optimizer_of(0.1, name="sgd")
    step = step_of(model, optimizer)
    if how == "jit":
        step = on_mesh(step, 8)
    elif how == "pmap":
        step = pmapped(step)
    else:
        step = shard_mapped(step, check_vma=how == "shard_map")
    state, metrics = run(step, new_state(model, optimizer), BATCHES)
    expected_state, expected_metrics = reference()
    assert_near(learned(state), learned(expected_state), 1e-5)
    for ours, theirs in zip(metrics, expected_metrics, strict=True):
        assert figures(ours)["loss"] == pytest.approx(figures(theirs)["loss"], rel=1e-5)
        assert figures(ours)["accuracy"] == figures(theirs)["accuracy"]
        assert int(ours.accuracy.count) == 10


def test_random_draws_do_not_depend_on_the_number_of_devices():
    model = network(depth=1, norm="batch", dropout=0.5)
    step = step_of(model, augment=create_augment(AugmentConfig()))
    one, eight = (run(on_mesh(step, n), new_state(model), BATCHES)[0] for n in (1, 8))
    assert_near(learned(eight), learned(one), 1e-5)


def test_mapped_devices_draw_each_their_own():
    seen = []

    def augment(keys, epoch, images, labels):
        data = jax.random.key_data(keys.step)
        jax.debug.callback(lambda data: seen.append(data.tobytes()), data)
        return images, labels

    model = network(depth=1)
    pmapped(step_of(model, augment=augment))(new_state(model), batch_of(0))
    jax.effects_barrier()
    assert len(set(seen)) == 8


# What a step is a function of


def test_masked_examples_have_no_influence():
    model = network(depth=1)
    step = jax.jit(step_of(model))
    batch, other = batch_of(0, masked=(2, 11)), batch_of(1)
    kept = batch["mask"].reshape(-1, 1, 1, 1)
    changed = {
        "image": np.where(kept, batch["image"], other["image"]),
        "label": np.where(batch["mask"], batch["label"], (batch["label"] + 1) % CLASSES),
        "mask": batch["mask"],
    }
    state = new_state(model)
    assert_same(step(state, changed), step(state, batch))
    unmasked = {**changed, "mask": np.ones(16, bool)}
    assert_differ(step(state, unmasked)[0].params, step(state, batch)[0].params)


@pytest.mark.parametrize("source", ["dropout", "augmentation"])
def test_draws_are_a_function_of_key_and_step(source):
    model = network(depth=1, dropout=0.5 if source == "dropout" else 0.0)
    on = create_augment(AugmentConfig())
    step = jax.jit(step_of(model, augment=on if source == "augmentation" else None))
    batch, state = batch_of(0), new_state(model)
    first, metrics = step(state, batch)
    assert_same((first, metrics), step(state, batch))
    assert_same(first.key, state.key)
    for other in (state.replace(step=jnp.int32(1)), state.replace(key=jax.random.key(1))):
        assert_differ(step(other, batch)[0].params, first.params)


def test_ema_follows_its_formula():
    model = network(depth=1, norm="batch")
    step = jax.jit(step_of(model, ema_decay=0.8))
    state = new_state(model)
    average = learned(state)
    state = state.replace(ema=jax.tree.map(jnp.copy, average))
    for count in range(3):
        state, _ = step(state, batch_of(count))
        average = jax.tree.map(lambda a, new: 0.8 * a + 0.2 * new, average, learned(state))
    assert_near(state.ema, average, 1e-6)
    assert_same(learned(state.averaged()), state.ema)
    assert_differ(state.ema, learned(state))


def test_without_ema_the_last_weights_are_evaluated():
    state = new_state(network(depth=1))
    assert state.averaged() is state


class Linear(nn.Module):
    """What is initialised quickly without `jit`, where no buffer stands for two arrays."""

    @nn.compact
    def __call__(self, images, *, train):
        x = nn.BatchNorm(use_running_average=not train)(images)
        return nn.Dense(CLASSES, kernel_init=nn.initializers.uniform())(x.mean((1, 2)))


def test_a_new_state_can_be_donated_again_and_again():
    state = create_state(Linear(), SGD, (SIZE, SIZE, 3), 0, ema=True)
    assert_same(state.ema, learned(state))
    mesh = sharding.make_mesh(jax.devices()[:1])
    update = sharding.jit_update(step_of(Linear(), ema_decay=0.9), mesh)
    for count in range(2):
        state, _ = update(state, batch_of(count))
    assert int(state.step) == 2


def test_a_new_state_is_a_function_of_its_seed():
    first, again, other = (create_state(Linear(), SGD, (SIZE, SIZE, 3), seed) for seed in (0, 0, 1))
    assert_same(again, first)
    assert int(first.step) == 0
    assert first.ema == {}
    kernels = [state.params["Dense_0"]["kernel"] for state in (first, other)]
    assert_differ(*kernels)
    assert (jax.random.key_data(other.key) != jax.random.key_data(first.key)).any()


# Several steps


def ordered(state, images, labels, position, batch_size):
    """The batch by its definition, for the first epoch."""
    chosen = np.asarray(epoch_order(jax.random.fold_in(state.key, ORDER_STREAM), 0, len(labels)))
    chosen = chosen[position * batch_size :][:batch_size]
    return {"image": images[chosen], "label": labels[chosen], "mask": np.ones(batch_size, bool)}


@pytest.mark.parametrize("unroll", [False, True])
def test_several_steps_equal_one_after_the_other(unroll):
    model, optimizer = network(depth=1, dropout=0.5), optimizer_of(0.1, name="sgd")
    images, labels = examples(0, 23)
    step = step_of(model, optimizer, augment=create_augment(AugmentConfig()))
    start = new_state(model, optimizer)
    batches = [ordered(start, images, labels, position, 4) for position in range(4)]
    expected, each = run(jax.jit(step), start, batches)

    several = jax.jit(functools.partial(train_steps, step_fn=step, unroll=unroll))
    order = np.asarray(epoch_order(jax.random.fold_in(start.key, ORDER_STREAM), 0, len(labels)))
    rows = order[:16].reshape(2, 2, 4)
    state, first = several(start, InMemoryFeed(images, labels, rows[0]))
    state, second = several(state, InMemoryFeed(images, labels, rows[1]))
    if unroll:
        assert_same(state, expected)
    else:  # XLA arranges the sums inside of a loop in another way
        assert_near(learned(state), learned(expected), 1e-5)
        assert_same(state.step, expected.step)
    ours, theirs = first.merge(second), functools.reduce(TrainMetrics.merge, each)
    assert figures(ours)["loss"] == pytest.approx(figures(theirs)["loss"], rel=1e-6)
    assert_same(ours.accuracy, theirs.accuracy)
    assert int(ours.accuracy.count) == 16


@pytest.mark.parametrize("unroll", [False, True])
def test_an_epoch_visits_each_image_at_most_once(unroll):
    size, batch_size, epochs = 23, 4, 3

    def step(state, batch):
        """Writes down the labels, which tell the images apart."""
        visits = jax.lax.dynamic_update_slice(
            state.params, batch["label"], (state.step * batch_size,)
        )
        ones = jnp.ones(batch_size)
        metrics = TrainMetrics.single_from_model_output(
            loss=ones, logits=ones[:, None], labels=batch["label"], mask=batch["mask"]
        )
        return state.replace(step=state.step + 1, params=visits), metrics

    images, labels = examples(0, size)[0], np.arange(size, dtype=np.int32)
    state = TrainState(
        step=jnp.int32(0),
        params=jnp.full(epochs * 20, -1, jnp.int32),
        model_state={},
        opt_state=(),
        ema={},
        key=jax.random.key(0),
    )
    dataset = InMemoryDataset.place(
        images,
        labels,
        np.arange(size),
        TrainConfig(batch_size=batch_size, epochs=epochs, steps_per_dispatch=5),
        sharding.make_mesh(jax.devices()[:1]),
    )
    several = jax.jit(functools.partial(train_steps, step_fn=step, unroll=unroll))
    with dataset.feeds(order_key(state.key), 0) as feeds:
        for _, feed in feeds:
            state, _ = several(state, feed)
    visits = np.asarray(state.params).reshape(epochs, 20)
    assert [len(set(epoch)) for epoch in visits.tolist()] == [20] * epochs
    assert visits.min() >= 0
    assert len({epoch.tobytes() for epoch in visits}) == epochs
    assert len({frozenset(epoch) for epoch in visits.tolist()}) > 1  # the left-over images too


def test_accumulated_batches_equal_the_joined_one():
    model = network(depth=1)
    parts = [batch_of(seed, count=8) for seed in range(6)]
    several = optimizer_of(0.1, name="sgd", accumulate_steps=3)
    start = new_state(model, several)
    step = jax.jit(step_of(model, several))
    state, _ = run(step, start, parts[:2])
    assert_same(state.params, start.params)
    state, _ = run(step, state, parts[2:])

    once = optimizer_of(0.1, name="sgd")
    whole = [
        jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts[i : i + 3]) for i in (0, 3)
    ]
    expected, _ = run(jax.jit(step_of(model, once)), new_state(model, once), whole)
    assert_near(state.params, expected.params, 1e-5)


# Evaluation


@pytest.mark.parametrize(
    ("how", "batch_size"), [("jit", 1), ("jit", 8), ("jit", 23), ("jit", 40), ("pmap", 8)]
)
def test_evaluation_counts_every_image_once(how, batch_size, strict_dtypes):
    model = network(depth=1, norm="batch", dropout=0.5)
    images, labels = examples(0, 23)
    state = new_state(model)
    step = functools.partial(eval_step, model=model, normalize=NORMALIZE)
    measure = pmapped(step) if how == "pmap" else jax.jit(step)
    parts = [measure(state, batch) for batch in padded_batches(images, labels, batch_size)]
    ours = figures(functools.reduce(EvalMetrics.merge, parts))

    logits = model.apply(state.variables, NORMALIZE(jnp.asarray(images)), train=False)
    logits = np.asarray(logits, np.float64)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(23), labels]
    predicted = logits.argmax(1)
    assert ours["loss"] == pytest.approx(losses.mean(), rel=1e-6)
    assert ours["accuracy"] == (predicted == labels).mean()
    np.testing.assert_array_equal(
        ours["confusion"], confusion_matrix(labels, predicted, labels=range(CLASSES))
    )


def test_views_are_predicted_one_by_one_and_averaged():
    model = network(depth=1, norm="batch")
    state = new_state(model)
    images = jnp.asarray(examples(0, 6)[0])
    predict = functools.partial(predict_step, model=model, normalize=NORMALIZE)
    tta = create_tta("flip", AugmentConfig())
    ours = jax.jit(functools.partial(predict, tta=tta))(state, images)
    theirs = (predict(state, images) + predict(state, images[:, :, ::-1])) / 2
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_images_are_flipped_by_epoch_and_not_by_step():
    seen, alternating = [], create_augment(AugmentConfig(crop_padding=0, alternating_flip=True))
    model = network(depth=1)
    state, batch = new_state(model), batch_of(0)

    def look(keys, epoch, images, labels):
        images, labels = alternating(keys, epoch, images, labels)
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), images)
        return images, labels

    step = jax.jit(step_of(model, augment=look, steps_per_epoch=2))
    for count in range(4):  # two epochs of two steps
        step(state.replace(step=jnp.int32(count)), batch)
    jax.effects_barrier()
    first, second, third, fourth = seen
    np.testing.assert_array_equal(second, first)
    np.testing.assert_array_equal(third, first[:, :, ::-1])
    np.testing.assert_array_equal(fourth, third)
    assert (first != batch["image"]).any()
    assert (third != batch["image"]).any()


def test_judging_measures_alike_and_keeps_the_answers(strict_dtypes):
    """On a mesh of devices, whose parts of the batch come together, as on one."""
    model = network(depth=1)
    state = new_state(model)
    batch = batch_of(0, count=24, masked=(3, 23))
    options = {"model": model, "normalize": NORMALIZE}
    mesh = sharding.make_mesh()
    judge = functools.partial(eval_step_with_predictions, **options, top_k=3, num_images=5)
    metrics, answers = sharding.jit_eval(judge, mesh)(
        state, sharding.place(batch, sharding.split(mesh))
    )
    measured = figures(jax.jit(functools.partial(eval_step, **options))(state, batch))
    ours = figures(metrics)
    assert ours["loss"] == pytest.approx(measured["loss"], rel=1e-6)
    np.testing.assert_array_equal(ours["confusion"], measured["confusion"])

    logits = model.apply(state.variables, NORMALIZE(jnp.asarray(batch["image"])), train=False)
    every = np.exp(np.asarray(logits, np.float64))
    every /= every.sum(axis=1, keepdims=True)
    order = np.argsort(-every, axis=1)[:, :3]
    answers = jax.device_get(answers)
    np.testing.assert_array_equal(answers["classes"], order)
    np.testing.assert_allclose(
        answers["probabilities"], np.take_along_axis(every, order, axis=1), rtol=1e-5
    )
    np.testing.assert_allclose(
        answers["label_probability"], every[np.arange(24), batch["label"]], rtol=1e-5
    )
    np.testing.assert_array_equal(answers["mask"], batch["mask"])
    wrong = np.flatnonzero(batch["mask"] & (order[:, 0] != batch["label"]))
    surest = wrong[np.argsort(-every[wrong, order[wrong, 0]])][:5]
    assert len(surest) == 5
    np.testing.assert_array_equal(answers["mistakes"], surest)
    np.testing.assert_array_equal(answers["pictures"], batch["image"][surest])
