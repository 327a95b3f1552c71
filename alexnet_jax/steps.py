"""The training and the evaluation step: pure functions of a state and a batch.

Each runs as it is, under `jit` (also over a mesh of devices, where the batch has global meaning),
or, given `axis_name`, as the body of `pmap` and `shard_map`, each device with its part of the
batch.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import Array
from jaxtyping import Float, Int, UInt8

from alexnet_jax.data.augment import Augment, Keys, Normalize
from alexnet_jax.data.feed import Feed
from alexnet_jax.data.sampling import Batch
from alexnet_jax.data.tta import TTA
from alexnet_jax.metrics import EvalMetrics, TrainMetrics, over_devices
from alexnet_jax.state import TrainState

# Streams of random numbers, so that no epoch's order shares its bits with a step's draws.
ORDER_STREAM, STEP_STREAM, RUN_STREAM = 0, 1, 2


def order_key(key: Array) -> Array:
    """Returns the key of `sampling.epoch_order` of a run, or R of them for keys[R]."""
    derive = functools.partial(jax.random.fold_in, data=ORDER_STREAM)
    return jax.vmap(derive)(key) if key.ndim else derive(key)


def cross_entropy(
    logits: Float[Array, "batch classes"],
    labels: Int[Array, " batch"] | Float[Array, "batch classes"],
    label_smoothing: float = 0.0,
) -> Float[Array, " batch"]:
    """Softmax cross-entropy of each example, in nats.

    Labels are classes, or weights of all classes. Label smoothing is that of Szegedy et al. (2016).
    """
    if labels.ndim == 1 and not label_smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    weights = jax.nn.one_hot(labels, logits.shape[-1]) if labels.ndim == 1 else labels
    if label_smoothing:
        weights = optax.smooth_labels(weights, label_smoothing)
    return optax.softmax_cross_entropy(logits, weights)


def _masked_mean(values: Array, mask: Array, axis_name: str | None) -> Array:
    total, count = jnp.where(mask, values, 0).sum(), mask.sum()
    if axis_name is not None:
        total, count = jax.lax.psum((total, count), axis_name)
    return total / count.astype(total.dtype)


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    normalize: Normalize,
    steps_per_epoch: int,
    augment: Augment | None = None,
    label_smoothing: float = 0.0,
    ema_decay: float = 0.0,
    axis_name: str | None = None,
) -> tuple[TrainState, TrainMetrics]:
    """Augments, runs the network forward and backward, and updates the state.

    Args:
        state: Before the step.
        batch: image uint8[B, H, W, C], label int32[B], mask bool[B]. Images whose mask is false
            count for nothing, but for batch statistics, which are of all images.
        model: The network.
        optimizer: Of `state.opt_state`.
        normalize: From uint8 images to the network's input.
        steps_per_epoch: Tells the epoch, which `augment` is given.
        augment: Random change of the uint8 images, and of the labels.
        label_smoothing: See `cross_entropy`.
        ema_decay: Share of the old average kept at each step; used if `state.ema` is kept.
        axis_name: Mapped device axis that the batch is split over, if any.

    Returns:
        The state after the step, and the loss and accuracy of this batch before it.
    """
    key = jax.random.fold_in(jax.random.fold_in(state.key, STEP_STREAM), state.step)
    if axis_name is not None:  # without this every device would draw the same
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
    augment_key, dropout_key = jax.random.split(key)
    images, labels = batch["image"], batch["label"]
    if augment is not None:
        keys = Keys(step=augment_key, run=jax.random.fold_in(state.key, RUN_STREAM))
        images, labels = augment(keys, state.step // steps_per_epoch, images, labels)
    images = normalize(images)

    def loss_fn(params: Any) -> tuple[Array, tuple[Array, Array, Any]]:
        logits, model_state = model.apply(
            {"params": params, **state.model_state},
            images,
            train=True,
            rngs={"dropout": dropout_key},
            mutable=list(state.model_state),
        )
        losses = cross_entropy(logits, labels, label_smoothing)
        # The mean over all devices is inside what is differentiated, and the gradients are
        # averaged below: shard_map differentiates a sum over devices exactly, pmap gives each
        # device its share, and both come out as the gradient of the global mean.
        return _masked_mean(losses, batch["mask"], axis_name), (losses, logits, model_state)

    gradients, (losses, logits, model_state) = jax.grad(loss_fn, has_aux=True)(state.params)
    if axis_name is not None:
        gradients, model_state = jax.lax.pmean((gradients, model_state), axis_name)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema:
        new = {"params": params, "model_state": model_state}
        ema = optax.incremental_update(new, ema, 1 - ema_decay)
    metrics = TrainMetrics.single_from_model_output(
        loss=losses, logits=logits, labels=batch["label"], mask=batch["mask"]
    )
    state = state.replace(
        step=state.step + 1, params=params, model_state=model_state, opt_state=opt_state, ema=ema
    )
    return state, over_devices(metrics, axis_name)


def predict_step(
    state: TrainState,
    images: UInt8[Array, "batch height width channels"],
    *,
    model: nn.Module,
    normalize: Normalize,
    tta: TTA | None = None,
) -> Float[Array, "batch classes"]:
    """Returns logits; with test-time augmentation, those of several views combined."""

    def predict(images: Array) -> Array:
        logits: Any = model.apply(state.variables, normalize(images), train=False)
        return logits

    if tta is None:
        return predict(images)
    # One after the other: as one batch they need memory in proportion to their number.
    return tta.combine(jax.lax.map(predict, tta.views(images)))


def eval_step(
    state: TrainState,
    batch: Batch,
    *,
    model: nn.Module,
    normalize: Normalize,
    tta: TTA | None = None,
    axis_name: str | None = None,
) -> EvalMetrics:
    """Evaluates the network on a batch, as `train_step` takes it, counting only unmasked examples.

    Returns:
        Sums and counts over the batch of all devices.
    """
    logits = predict_step(state, batch["image"], model=model, normalize=normalize, tta=tta)
    return over_devices(_eval_metrics(logits, batch), axis_name)


def _eval_metrics(logits: Array, batch: Batch) -> EvalMetrics:
    metrics: EvalMetrics = EvalMetrics.single_from_model_output(
        loss=cross_entropy(logits, batch["label"]),
        logits=logits,
        labels=batch["label"],
        mask=batch["mask"],
    )
    return metrics


def eval_step_with_predictions(
    state: TrainState,
    batch: Batch,
    *,
    model: nn.Module,
    normalize: Normalize,
    top_k: int = 5,
    num_images: int = 36,
) -> tuple[EvalMetrics, dict[str, Array]]:
    """Evaluates the network as `eval_step` does, and keeps its top K predictions.

    Returns:
        The metrics; and label int32[B], mask bool[B], `classes` int32[B, K], the top K, their
        `probabilities` float32[B, K], `label_probability` float32[B], and, of the most confident
        errors and, where these are fewer than P, of any other rows, also of those that the mask
        leaves out, the rows `mistakes` int32[P] and `pictures` uint8[P, H, W, C]. P is at most
        `num_images`.
    """
    logits = predict_step(state, batch["image"], model=model, normalize=normalize)
    all_probabilities = jax.nn.softmax(logits)
    probabilities, classes = jax.lax.top_k(all_probabilities, min(top_k, logits.shape[-1]))
    label, mask = batch["label"], batch["mask"]
    wrong = mask & (classes[:, 0] != label)
    confidence = jnp.where(wrong, probabilities[:, 0], -1.0)
    rows = jax.lax.top_k(confidence, min(num_images, len(label)))[1]
    predictions = {
        "label": label,
        "mask": mask,
        "classes": classes,
        "probabilities": probabilities,
        "label_probability": jnp.take_along_axis(all_probabilities, label[:, None], axis=1)[:, 0],
        "mistakes": rows,
        "pictures": batch["image"][rows],
    }
    return _eval_metrics(logits, batch), predictions


def train_steps(
    state: TrainState,
    feed: Feed,
    *,
    step_fn: Callable[[TrainState, Batch], tuple[TrainState, TrainMetrics]],
    constrain: Callable[[Batch], Batch] = lambda batch: batch,
    unroll: bool = False,
) -> tuple[TrainState, TrainMetrics]:
    """Takes the K steps of a feed in one call.

    Args:
        state: Before the steps.
        feed: Of K batches.
        step_fn: `train_step` with everything but state and batch bound.
        constrain: Shards a batch over the devices.
        unroll: Compile the steps one after the other, not as a loop. XLA's CPU backend brings the
            convolutions of a backward pass into a fast layout only outside of loops; in a scan,
            even of one step, CIFAR-10's network takes 156 s a step instead of 4.6 s (2 cores,
            jaxlib 0.10.2).

    Returns:
        The state after the steps, and their metrics merged.
    """

    def body(state: TrainState, i: Array | int) -> tuple[TrainState, TrainMetrics]:
        return step_fn(state, constrain(feed.batch(i)))

    if not unroll and feed.num_steps > 1:
        state, metrics = jax.lax.scan(body, state, jnp.arange(feed.num_steps))
        return state, metrics.reduce()
    state, metrics = body(state, 0)
    for i in range(1, feed.num_steps):
        state, more = body(state, i)
        metrics = metrics.merge(more)
    return state, metrics
