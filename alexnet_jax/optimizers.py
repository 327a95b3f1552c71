"""From a `config.optimizer` section to an Optax schedule and an Optax transformation."""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from alexnet_jax.errors import InputError


def create_schedule(config: ConfigDict, steps_per_epoch: int, epochs: int) -> optax.Schedule:
    """Returns the learning rate as a function of the number of updates made.

    Args:
        config: The section; rates are per update, durations in epochs.
        steps_per_epoch: Batches in an epoch; `accumulate_steps` of them make one update.
        epochs: Length of the run.

    Raises:
        InputError: The run has more steps than can be counted, or no update in all of them.
    """
    steps = steps_per_epoch * epochs
    if steps >= 2**31:
        raise InputError(
            f"config.train.epochs is {epochs}, which makes {steps:,} steps; the most are "
            f"{2**31 - 1:,}, which is {(2**31 - 1) // steps_per_epoch:,} epochs."
        )
    if config.accumulate_steps > steps:
        raise InputError(
            f"config.optimizer.accumulate_steps is {config.accumulate_steps}, so that the run's "
            f"{steps:,} steps would make no update; it must be at most {steps:,}."
        )
    updates_per_epoch = steps_per_epoch / config.accumulate_steps
    warmup = round(config.warmup_epochs * updates_per_epoch)
    rest = max(1, round(epochs * updates_per_epoch) - warmup)
    peak = config.learning_rate
    if config.schedule == "constant":
        main = optax.constant_schedule(peak)
    elif config.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction)
    elif config.schedule == "linear":
        main = optax.linear_schedule(peak, peak * config.final_fraction, rest)
    else:
        factors: dict[int, float] = {}
        for epoch in config.step_epochs:
            if epoch >= epochs:  # Never reached, and maybe beyond what a step can be.
                continue
            boundary = round(epoch * updates_per_epoch) - warmup
            factors[boundary] = factors.get(boundary, 1.0) * config.step_factor
        main = optax.piecewise_constant_schedule(peak, factors)
    if not warmup:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), main], [warmup])


def kernels_only(params: Any) -> Any:
    """Marks what weight decay acts on: kernels, not biases and not scales of normalisation."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def create_optimizer(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Builds the transformation from gradients to updates.

    "adam" is Kingma and Ba (2015), "adamw" adds decoupled weight decay (Loshchilov and Hutter,
    2019), "sgd" has (Nesterov) momentum and its weight decay is an L2 term of the loss.

    Args:
        config: The section.
        schedule: Learning rate, from `create_schedule`.
    """
    if config.name == "adam":
        main = optax.adam(schedule, config.b1, config.b2, config.eps)
    elif config.name == "adamw":
        main = optax.adamw(
            schedule,
            config.b1,
            config.b2,
            config.eps,
            weight_decay=config.weight_decay,
            mask=kernels_only,
        )
    else:
        main = optax.chain(
            optax.add_decayed_weights(config.weight_decay, mask=kernels_only),
            optax.sgd(schedule, config.momentum, config.nesterov),
        )
    if config.clip_norm:
        main = optax.chain(optax.clip_by_global_norm(config.clip_norm), main)
    if config.accumulate_steps > 1:
        return optax.MultiSteps(main, config.accumulate_steps).gradient_transformation()
    return main
