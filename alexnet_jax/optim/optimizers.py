"""From a `config.optimizer` section to an Optax schedule and an Optax transformation."""

import math
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from ml_collections import ConfigDict
from optax.contrib import MuonDimensionNumbers, muon

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
    if config.schedule in ("constant", "plateau"):  # the latter by `scale_by_plateau`
        main = optax.constant_schedule(peak)
    elif config.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, rest, alpha=config.end_lr_fraction)
    elif config.schedule == "linear":
        main = optax.linear_schedule(peak, peak * config.end_lr_fraction, rest)
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


def _matching(pattern: str, params: Any) -> Any:
    """Marks the parameters whose path, "norm1/bias", a shell pattern matches."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: fnmatchcase(
            jax.tree_util.keystr(path, simple=True, separator="/"), pattern
        ),
        params,
    )


def _matching_any(patterns: tuple[str, ...], params: Any) -> Any:
    marks = [_matching(pattern, params) for pattern in patterns]
    return jax.tree.map(lambda _, *each: any(each), params, *marks)


def check_patterns(config: ConfigDict, params: Any) -> None:
    """Refuses patterns that match none of a network's parameters, or what they cannot be for.

    Args:
        config: The section.
        params: Of the network; their shapes suffice.

    Raises:
        InputError: Names the option and the pattern, and lists the parameters.
    """
    patterns = dict.fromkeys(config.frozen, "frozen")
    patterns |= {pattern: "lr_multipliers" for pattern, _ in config.lr_multipliers}
    if config.muon_learning_rate:
        patterns[config.muon_pattern] = "muon_pattern"
    if config.frozen and all(jax.tree.leaves(_matching_any(config.frozen, params))):
        raise InputError(
            f"config.optimizer.frozen is {config.frozen}, which is all parameters; leave some to "
            "train."
        )
    frozen = _matching_any(config.frozen, params) if config.frozen else None
    for pattern, option in patterns.items():
        marks = _matching(pattern, params)
        if frozen is not None and option != "frozen":
            trained = jax.tree.map(lambda mark, still: mark and not still, marks, frozen)
            if any(jax.tree.leaves(marks)) and not any(jax.tree.leaves(trained)):
                raise InputError(
                    f"config.optimizer.{option} has {pattern!r}, which matches frozen parameters "
                    f"alone; leave it out, or let some of them train: config.optimizer.frozen is "
                    f"{config.frozen}."
                )
        if not any(jax.tree.leaves(marks)):
            paths = [
                jax.tree_util.keystr(path, simple=True, separator="/")
                for path, _ in jax.tree_util.tree_leaves_with_path(params)
            ]
            raise InputError(
                f"config.optimizer.{option} has {pattern!r}, which matches none of the "
                f"parameters: {', '.join(paths)}."
            )
        if option == "muon_pattern":
            for mark, leaf in zip(jax.tree.leaves(marks), jax.tree.leaves(params), strict=True):
                if mark and leaf.ndim < 2:
                    raise InputError(
                        f"config.optimizer.muon_pattern is {pattern!r}, which matches biases or "
                        "scales, too; Muon is for kernels, such as those of 'conv*/kernel'."
                    )


def muon_share(config: ConfigDict, params: Any) -> str:
    """Says how many of the parameters that are trained Muon does; "" if it is off.

    Args:
        config: The section.
        params: Of the network; their shapes suffice.
    """
    if not config.muon_learning_rate:
        return ""
    marks = jax.tree.leaves(_matching(config.muon_pattern, params))
    still = jax.tree.leaves(_matching_any(config.frozen, params))
    sizes = [
        0 if frozen else math.prod(leaf.shape)
        for leaf, frozen in zip(jax.tree.leaves(params), still, strict=True)
    ]
    share = sum(size for size, mark in zip(sizes, marks, strict=True) if mark)
    return (
        f"Muon trains {share:,} of {sum(sizes):,} parameters, those of {config.muon_pattern!r}; "
        f"{config.name!r} the rest."
    )


def multiply_rates(multipliers: tuple[tuple[str, float], ...]) -> Any:
    """Multiplies the updates of some parameters, and with them their learning rate.

    airbench (Jordan, 2024) has 64 for the biases of batch normalisation.

    Args:
        multipliers: Pairs of a shell pattern of paths, such as "norm*/bias", and a factor; where
            several patterns match, all count.

    Returns:
        A stateless `optax.GradientTransformation`, for behind those that make steps of gradients.
    """

    def multiply(updates: Any, params: Any) -> Any:
        del params
        for pattern, factor in multipliers:
            marks = _matching(pattern, updates)
            updates = jax.tree.map(lambda u, m, f=factor: u * f if m else u, updates, marks)
        return updates

    return optax.stateless(multiply)


class LookaheadState(NamedTuple):
    """State of `lookahead`.

    Attributes:
        inner: State of the optimizer inside.
        slow: The slow weights.
        made: int32[], updates so far.
    """

    inner: optax.OptState
    slow: Any
    made: Array


def lookahead(
    inner: optax.GradientTransformation, period: int, decay: Callable[[Array], Array], updates: int
) -> optax.GradientTransformation:
    """Every few updates takes a step from slow weights towards the fast ones, which go on there.

    Zhang et al. (2019), "Lookahead Optimizer: k steps forward, 1 step back", with a step size that
    may change, as airbench's does, which averages the statistics of batch normalisation, too; here
    these stay those of the latest batches. Optax's own wants pairs of parameters where a network is
    applied; this one keeps the slow weights in its state.

    Args:
        inner: What moves the fast weights; its state is kept when they are set back.
        period: Updates between two steps of the slow weights.
        decay: Share of the slow weights that such a step keeps, by the number of updates made.
        updates: Of the whole run; the last one ends on the slow weights, too.
    """

    def init(params: Any) -> LookaheadState:
        # Copies, because a buffer that stands in a state twice cannot be donated.
        slow = jax.tree.map(jnp.copy, params)
        return LookaheadState(inner.init(params), slow, jnp.zeros((), jnp.int32))

    def update(
        gradients: Any, state: LookaheadState, params: Any = None
    ) -> tuple[Any, LookaheadState]:
        steps, inner_state = inner.update(gradients, state.inner, params)
        count = state.made + 1
        now = (count % period == 0) | (count == updates)
        kept = jnp.asarray(decay(count), jnp.float32)
        fast = optax.apply_updates(params, steps)
        slow = jax.tree.map(
            lambda s, f: jnp.where(now, (kept * s + (1 - kept) * f).astype(s.dtype), s),
            state.slow,
            fast,
        )
        steps = jax.tree.map(lambda u, s, p: jnp.where(now, s - p, u), steps, slow, params)
        return steps, LookaheadState(inner_state, slow, count)

    return optax.GradientTransformation(init, update)


def unit_filters(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Brings kernels to the norm of as many unit filters as they have, before each update.

    Behind them must stand a normalisation, to which their scale is nothing; so their learning rate
    stays what it is, in place of falling as they grow (airbench94_muon, Jordan, 2024).

    Args:
        inner: Makes the updates of kernels [..., O], with all that scales these: behind this, it
            would scale the way to the norm, too.
    """

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        units = jax.tree.map(
            lambda p: p * (p.shape[-1] ** 0.5 / jnp.maximum(jnp.linalg.norm(p), 1e-12)), params
        )
        steps, state = inner.update(gradients, state, units)
        return jax.tree.map(lambda u, n, p: u + (n - p), steps, units, params), state

    return optax.GradientTransformation(inner.init, update)


def _muon(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Muon (Jordan et al., 2024), with each filter a row of the matrix that it orthogonalises."""

    def dimensions(params: Any) -> Any:
        return jax.tree.map(
            lambda leaf: MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1), params
        )

    relative = config.muon_learning_rate / config.learning_rate
    return muon(
        lambda count: relative * schedule(count),
        beta=config.muon_momentum,
        weight_decay=config.muon_weight_decay,
        muon_weight_dimension_numbers=dimensions,
    )


class PlateauState(NamedTuple):
    """State of `scale_by_plateau`.

    Attributes:
        factor: float32[], of the learning rate.
        best: float32[], highest validation accuracy so far.
        waited: int32[], epochs since then, or since the factor last changed.
    """

    factor: Array
    best: Array
    waited: Array


def scale_by_plateau() -> optax.GradientTransformation:
    """Multiplies updates by a factor that `after_validation` lowers and the state keeps."""

    def init(params: Any) -> PlateauState:
        del params
        return PlateauState(jnp.float32(1), jnp.float32(-1), jnp.int32(0))

    def update(updates: Any, state: PlateauState, params: Any = None) -> tuple[Any, PlateauState]:
        del params
        return jax.tree.map(lambda u: u * state.factor.astype(u.dtype), updates), state

    return optax.GradientTransformation(init, update)


def _is_plateau(node: Any) -> bool:
    return isinstance(node, PlateauState)


def after_validation(opt_state: Any, accuracy: Array | float, config: ConfigDict) -> Any:
    """Lowers the learning rate of the schedule "plateau" where the accuracy stopped improving.

    Krizhevsky, Sutskever and Hinton (2012), section 5, do so by hand.

    Args:
        opt_state: Of `create_optimizer`; another schedule leaves it as it is.
        accuracy: On the validation images, after an epoch.
        config: The section; `plateau_patience` without improvement multiply by `step_factor`.
    """

    def look(node: Any) -> Any:
        if not _is_plateau(node):
            return node
        waited = jnp.where(accuracy > node.best, 0, node.waited + 1)
        lower = waited >= config.plateau_patience
        return PlateauState(
            factor=jnp.where(lower, node.factor * config.step_factor, node.factor),
            best=jnp.maximum(node.best, accuracy),
            waited=jnp.where(lower, 0, waited),
        )

    return jax.tree.map(look, opt_state, is_leaf=_is_plateau)


def plateau_factor(opt_state: Any) -> float:
    """Returns what the schedule "plateau" multiplies the learning rate by; 1 under another.

    Of replicas (see `replicas`) it is the mean.
    """
    found = [node for node in jax.tree.leaves(opt_state, is_leaf=_is_plateau) if _is_plateau(node)]
    return float(np.mean(jax.device_get(found[0].factor))) if found else 1.0


def create_optimizer(
    config: ConfigDict, schedule: optax.Schedule, *, steps: int = 1
) -> optax.GradientTransformation:
    """Builds the transformation from gradients to updates.

    "adam" is Kingma and Ba (2015), "adamw" adds decoupled weight decay (Loshchilov and Hutter,
    2019), "sgd" has (Nesterov) momentum and its weight decay is an L2 term of the loss.
    "sgd_2012" differs where the learning rate e changes, which stands inside of the momentum:
    v = m v - e (d w + g), w = w + v (Krizhevsky, Sutskever and Hinton, 2012, section 5). Where
    `muon_learning_rate` is not 0, Muon takes their place for the kernels of `muon_pattern`. Around
    them stand, from the inside, `lr_multipliers`, Muon's `unit_filters`, `lookahead`,
    clipping, accumulation; and parameters that are `frozen` have no part in any of it.

    Args:
        config: The section.
        schedule: Learning rate, from `create_schedule`.
        steps: Batches of the whole run, over which the decay of `lookahead` grows.
    """
    plateau = config.schedule == "plateau"

    def lowered(main: optax.GradientTransformation) -> optax.GradientTransformation:
        return optax.chain(main, scale_by_plateau()) if plateau else main

    def multiplied(main: optax.GradientTransformation) -> optax.GradientTransformation:
        if not config.lr_multipliers:
            return main
        return optax.chain(main, multiply_rates(config.lr_multipliers))

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
    elif config.name == "sgd_2012":
        main = optax.chain(
            optax.add_decayed_weights(config.weight_decay, mask=kernels_only),
            lowered(optax.scale_by_learning_rate(schedule)),
            optax.trace(config.momentum),
        )
    else:
        main = optax.chain(
            optax.add_decayed_weights(config.weight_decay, mask=kernels_only),
            optax.sgd(schedule, config.momentum or None, config.nesterov),
        )
    if config.name != "sgd_2012":
        main = lowered(main)
    main = multiplied(main)
    if config.muon_learning_rate:
        kernels = multiplied(lowered(_muon(config, schedule)))
        main = optax.partition(
            {
                True: unit_filters(kernels) if config.muon_normalize_filters else kernels,
                False: main,
            },
            lambda params: _matching(config.muon_pattern, params),
        )
    if config.lookahead_period:
        updates = max(1, steps // config.accumulate_steps)
        main = lookahead(
            main,
            config.lookahead_period,
            lambda count: config.lookahead_decay * (count / updates) ** config.lookahead_power,
            updates,
        )
    if config.clip_norm:
        main = optax.chain(optax.clip_by_global_norm(config.clip_norm), main)
    if config.accumulate_steps > 1:
        main = optax.MultiSteps(main, config.accumulate_steps).gradient_transformation()
    if config.frozen:
        main = optax.partition(
            {True: optax.set_to_zero(), False: main},
            lambda params: _matching_any(config.frozen, params),
        )
    return main
