"""The learning rate as a function of the number of updates."""

import optax

from alexnet_jax.errors import InputError
from alexnet_jax.optim.options import OptimizerConfig


def create_schedule(config: OptimizerConfig, steps_per_epoch: int, epochs: int) -> optax.Schedule:
    """Builds the schedule that the options describe.

    Args:
        config: The options.
        steps_per_epoch: Batches in an epoch; `accumulate_steps` of them make one update.
        epochs: Length of the run.

    Raises:
        InputError: The run has more steps than int32 can count, or no update in all of them.
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
    if config.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, rest, alpha=config.end_lr_fraction)
    elif config.schedule == "linear":
        main = optax.linear_schedule(peak, peak * config.end_lr_fraction, rest)
    elif config.schedule == "step":
        factors: dict[int, float] = {}
        for epoch in config.step_epochs:
            if epoch < epochs:  # A later one is never reached, and may be more than int32 holds.
                boundary = round(epoch * updates_per_epoch) - warmup
                factors[boundary] = factors.get(boundary, 1.0) * config.step_factor
        main = optax.piecewise_constant_schedule(peak, factors)
    else:  # "constant", and "plateau", whose factor is applied by `plateau.scale_by_plateau`
        main = optax.constant_schedule(peak)
    if not warmup:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), main], [warmup])
