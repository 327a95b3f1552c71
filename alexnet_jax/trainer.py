"""The compiled functions of a run: `steps` and `state`, bound to its options and devices."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alexnet_jax import ops, seeds, steps
from alexnet_jax.checkpoint import checksums
from alexnet_jax.checkpoint.initialize_from import InitialWeights
from alexnet_jax.checkpoint.manager import Checkpoints
from alexnet_jax.config import Config
from alexnet_jax.data.augment import Augment, create_augment, create_normalize
from alexnet_jax.data.feed import Feed
from alexnet_jax.data.load import RunData
from alexnet_jax.data.options import input_size
from alexnet_jax.data.sampling import Batch
from alexnet_jax.data.tta import create_tta
from alexnet_jax.distributed import collectives, sharding
from alexnet_jax.metrics import EvalMetrics, TrainMetrics
from alexnet_jax.models import create_model, init_from_data
from alexnet_jax.optim.optimizers import create_optimizer
from alexnet_jax.optim.plateau import after_validation, plateau_factor
from alexnet_jax.optim.schedules import create_schedule
from alexnet_jax.state import TrainState, create_state

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Trainer:
    """What a training loop calls.

    With several seeds the arrays of states and metrics have one more dimension, the first.

    Attributes:
        init: From variables that replace initial ones to the state at step 0. Not compiled: it is
            also evaluated for its shapes alone.
        step: Takes K steps; the state before them is donated.
        eval: By suffix: "" and, with test-time augmentation, "_tta".
        predict: As `eval`, of one seed, with what `steps.eval_step_with_predictions` keeps.
        after_validation: Given the validation accuracy, float32[], of each seed; donates the state.
        pick: Returns the state of one of `seeds`, by index.
        learning_rate: From a state and a step of the same epoch to the learning rate of that step,
            the mean of several seeds.
        sharding: Of the state.
        image_shape: (H, W, C) of what the network takes.
    """

    init: Callable[[Mapping[str, Any]], TrainState]
    step: Callable[[TrainState, Feed], tuple[TrainState, TrainMetrics]]
    eval: Mapping[str, Callable[[TrainState, Batch], EvalMetrics]]
    predict: Callable[[TrainState, Batch], tuple[EvalMetrics, dict[str, Array]]]
    after_validation: Callable[[TrainState, np.ndarray], TrainState]
    pick: Callable[[TrainState, int], TrainState]
    learning_rate: Callable[[TrainState, int], float]
    seeds: tuple[int, ...]
    sharding: NamedSharding
    model: nn.Module
    image_shape: tuple[int, int, int]
    augment: Augment

    @classmethod
    def create(
        cls, config: Config, data: RunData, mesh: Mesh, schedule: optax.Schedule | None = None
    ) -> "Trainer":
        """Binds the functions to the options and compiles them for the devices.

        `schedule`, from updates to the learning rate, replaces that of the options.

        Raises:
            InputError: The run has no update, or more steps than can be counted.
        """
        compiler = seeds.choose(config.seed, config.num_seeds, mesh)
        if config.num_seeds > 1:
            how = "sequentially" if sharding.on_cpu(mesh) else "vectorized"
            log.info("Training %d seeds from %d on, %s.", config.num_seeds, config.seed, how)
        platform = mesh.devices.flat[0].platform
        kernels = ops.choose(
            config.cpu_kernels, platform, config.model.fields["dtype"], devices=mesh.size
        )
        model = create_model(config.model, num_classes=len(data.info["class_names"]), ops=kernels)
        side = input_size(config.data)
        schedule = schedule or create_schedule(
            config.optimizer, data.steps_per_epoch, config.train.epochs
        )
        optimizer = create_optimizer(
            config.optimizer, schedule, steps=config.train.epochs * data.steps_per_epoch
        )
        augment = create_augment(
            config.augment,
            data.info["mean"],
            config.data.crop_size,
            data.info.get("principal_colours", ()),
        )
        normalize = create_normalize(
            data.info["mean"], data.info["deviation"], config.data.crop_size
        )
        train_step = functools.partial(
            steps.train_step,
            model=model,
            optimizer=optimizer,
            normalize=normalize,
            augment=augment,
            steps_per_epoch=data.steps_per_epoch,
            label_smoothing=config.train.label_smoothing,
            ema_decay=config.train.ema_decay,
        )
        train_steps = functools.partial(
            steps.train_steps,
            step_fn=train_step,
            constrain=compiler.split_batch,
            unroll=sharding.on_cpu(mesh),
        )
        eval_step = functools.partial(steps.eval_step, model=model, normalize=normalize)
        predict = functools.partial(
            steps.eval_step_with_predictions, model=model, normalize=normalize
        )
        evals = {"": compiler.eval(eval_step)}
        if tta := create_tta(config.eval.tta, config.augment, config.data.crop_size):
            evals["_tta"] = compiler.eval(functools.partial(eval_step, tta=tta))

        def init(variables: Mapping[str, Any]) -> TrainState:
            create = functools.partial(
                create_state,
                model,
                optimizer,
                (side, side, 3),
                ema=config.train.ema_decay > 0,
                variables=variables,
            )
            return compiler.init(create)

        return cls(
            init=init,
            step=compiler.step(train_steps),
            eval=evals,
            predict=sharding.jit_eval(predict, mesh),
            after_validation=_after_validation(config, compiler),
            pick=compiler.pick,
            learning_rate=functools.partial(_learning_rate, config, schedule),
            seeds=compiler.seeds,
            sharding=compiler.sharding,
            model=model,
            image_shape=(side, side, 3),
            augment=augment,
        )

    def variables_of_one(self, state: TrainState) -> dict[str, Any]:
        """Returns the shapes of one seed's variables, as `module.apply` takes them."""
        shapes: TrainState = jax.eval_shape(lambda state: self.pick(state, 0), state)
        return shapes.variables


def _after_validation(
    config: Config, compiler: seeds.SingleSeed
) -> Callable[[TrainState, np.ndarray], TrainState]:
    """Returns what lowers the learning rate of the schedule "plateau"; others change nothing."""
    if config.optimizer.schedule != "plateau":
        return lambda state, _: state

    def update(state: TrainState, accuracy: Array) -> TrainState:
        opt_state = after_validation(state.opt_state, accuracy, config.optimizer)
        return state.replace(opt_state=opt_state)

    return compiler.update(update)


def _learning_rate(config: Config, schedule: optax.Schedule, state: TrainState, step: int) -> float:
    updates = (step - 1) // config.optimizer.accumulate_steps
    rate = float(schedule(updates))
    if config.optimizer.schedule == "plateau":  # only then wait for the device
        rate *= plateau_factor(state.opt_state)
    return rate


def initial_state(
    trainer: Trainer, data: RunData, source: InitialWeights | None = None
) -> TrainState:
    """Returns the state of step 0, with what is measured on images, and the weights of `source`.

    Raises:
        InputError: The weights of `source` do not fit.
    """
    mean, std = data.info["mean"], data.info["deviation"]
    variables = init_from_data(trainer.model, data.examples, mean, std)
    if source and source.variables:
        shapes = jax.eval_shape(trainer.init, {})
        fitting = source.select(trainer.variables_of_one(shapes))
        everywhere = NamedSharding(trainer.sharding.mesh, PartitionSpec())
        variables |= sharding.place(fitting, everywhere)
    return jax.jit(trainer.init, out_shardings=trainer.sharding)(variables)


def restore_or_init(
    trainer: Trainer, checkpoints: Checkpoints, data: RunData, source: InitialWeights
) -> tuple[TrainState, dict[str, Any]]:
    """Returns the state of the newest readable checkpoint, or of step 0, alike in all processes.

    With it comes what was saved beside it, or {"train_seconds": 0.0}.

    Raises:
        InputError: No checkpoint can be restored, the weights of `source` do not fit, or the
            processes differ.
    """
    with collectives.fail_together():
        # The shapes say all that a restore needs, so nothing is initialized in vain.
        shapes = functools.cache(lambda: jax.eval_shape(trainer.init, {}))
        restored = checkpoints.restore(shapes, trainer.sharding)
        if restored:
            state, progress = restored
            log.info("Resuming from step %s.", f"{state.steps_taken:,}")
        else:
            state, progress = initial_state(trainer, data, source), {"train_seconds": 0.0}
    collectives.check_equal(state.steps_taken, "the newest readable checkpoint")
    if "whitening" in state.model_state:  # measured by each process for itself
        measured = checksums.fingerprints(state.model_state["whitening"])
        collectives.check_equal(measured, "the whitening of the images")
    return state, progress
