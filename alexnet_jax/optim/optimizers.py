"""From the options to an Optax transformation of gradients to updates."""

from typing import Any

import jax
import optax

from alexnet_jax.optim.lookahead import lookahead
from alexnet_jax.optim.muon import muon, normalize_filters
from alexnet_jax.optim.options import OptimizerConfig
from alexnet_jax.optim.patterns import matching
from alexnet_jax.optim.plateau import scale_by_plateau


def create_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, *, steps: int = 1
) -> optax.GradientTransformation:
    """Builds the optimizer that the options describe.

    From the inside: the optimizer, or Muon for its kernels; the factors of the schedule "plateau"
    and of `lr_multipliers`; `normalize_filters`; `lookahead`; clipping; accumulation. Frozen
    parameters have no part in any of it.

    Args:
        config: The options.
        schedule: Learning rate, from `create_schedule`.
        steps: Batches of the whole run, for the decay of `lookahead`.
    """
    optimizer = _scaled(_base(config, schedule), config, plateau=config.name != "sgd_2012")
    if config.muon_learning_rate:
        kernels = _scaled(muon(config, schedule), config)
        if config.muon_normalize_filters:
            kernels = normalize_filters(kernels)
        optimizer = optax.partition(
            {True: kernels, False: optimizer}, lambda params: matching(params, config.muon_pattern)
        )
    if config.lookahead_period:
        updates = max(1, steps // config.accumulate_steps)
        optimizer = lookahead(
            optimizer,
            config.lookahead_period,
            lambda count: config.lookahead_decay * (count / updates) ** config.lookahead_power,
            updates,
        )
    if config.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    if config.accumulate_steps > 1:
        optimizer = optax.MultiSteps(optimizer, config.accumulate_steps).gradient_transformation()
    if config.frozen:
        optimizer = optax.partition(
            {True: optax.set_to_zero(), False: optimizer},
            lambda params: matching(params, *config.frozen),
        )
    return optimizer


def _base(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Builds the optimizer that `config.optimizer.name` names.

    "adam" is Kingma and Ba (2015); "adamw" adds decoupled weight decay (Loshchilov and Hutter,
    2019); the weight decay of "sgd" is an L2 term of the loss. "sgd_2012" differs where the
    learning rate e changes, which is inside of the momentum: v = m v - e (d w + g), w = w + v
    (Krizhevsky, Sutskever and Hinton, 2012, section 5).
    """
    decay = optax.add_decayed_weights(config.weight_decay, mask=kernels_only)
    match config.name:
        case "adam":
            return optax.adam(schedule, config.b1, config.b2, config.eps)
        case "adamw":
            return optax.adamw(
                schedule,
                config.b1,
                config.b2,
                config.eps,
                weight_decay=config.weight_decay,
                mask=kernels_only,
            )
        case "sgd":
            sgd = optax.sgd(schedule, config.momentum or None, config.nesterov)
            return optax.chain(decay, sgd)
        case "sgd_2012":
            scale = optax.scale_by_learning_rate(schedule)
            if config.schedule == "plateau":
                scale = optax.chain(scale, scale_by_plateau())
            return optax.chain(decay, scale, optax.trace(config.momentum))


def _scaled(
    optimizer: optax.GradientTransformation, config: OptimizerConfig, *, plateau: bool = True
) -> optax.GradientTransformation:
    """Adds what changes the learning rate beside the schedule."""
    if plateau and config.schedule == "plateau":
        optimizer = optax.chain(optimizer, scale_by_plateau())
    if config.lr_multipliers:
        optimizer = optax.chain(optimizer, multiply_updates(config.lr_multipliers))
    return optimizer


def kernels_only(params: Any) -> Any:
    """Returns the mask of weight decay: kernels, not biases and not scales of normalization."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def multiply_updates(
    multipliers: tuple[tuple[str, float], ...],
) -> optax.GradientTransformation:
    """Multiplies the updates of some parameters, and with them their learning rate.

    airbench (Jordan, 2024) multiplies those of the biases of batch normalization by 64.

    Args:
        multipliers: Pairs of a pattern and a factor; where several match, their product counts.
    """

    def multiply(updates: Any, params: Any) -> Any:
        del params
        for pattern, factor in multipliers:
            marks = matching(updates, pattern)
            updates = jax.tree.map(lambda u, m, f=factor: u * f if m else u, updates, marks)
        return updates

    return optax.stateless(multiply)
