"""A trainer used alone, as a learning-rate finder would."""

import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alexnet_jax.config import default_config, validate
from alexnet_jax.data.load import load_data
from alexnet_jax.distributed import sharding
from alexnet_jax.metrics import compute, summarize
from alexnet_jax.steps import order_key
from alexnet_jax.trainer import Trainer, initial_state


def test_a_trainer_takes_a_schedule_of_ones_own(tmp_path):
    options = default_config()
    options.data.name, options.data.data_dir = "digits", str(tmp_path)
    options.data.image_size = 8
    options.augment.crop_padding = 1
    options.model.features = options.model.kernels = options.model.strides = (1,)
    options.model.pools = (True,)
    options.model.hidden = (8,)
    options.optimizer.name, options.optimizer.momentum = "sgd", 0.0
    options.optimizer.nesterov = False
    options.train.batch_size, options.train.epochs = 256, 1
    config = validate(options)
    mesh = sharding.make_mesh(jax.devices()[:2])
    data = load_data(config, mesh)
    rates = optax.exponential_decay(1e-6, 1, 10)  # grows tenfold at each update
    trainer = Trainer.create(config, data, mesh, schedule=rates)
    state = initial_state(trainer, data)
    moved, losses = [], []
    with data.train.feeds(order_key(state.key), 0) as feeds:
        for step, feed in feeds:
            before = jax.device_get(state.params)
            state, metrics = trainer.step(state, feed)
            losses.append(summarize(compute(metrics))["loss"])
            after = jax.device_get(state.params)
            moved.append(np.abs(after["logits"]["bias"] - before["logits"]["bias"]).max())
            assert trainer.learning_rate(state, step) == pytest.approx(10.0 ** (step - 7))
    assert len(losses) == 5
    assert np.isfinite(losses).all()
    for small, large in itertools.pairwise(moved):
        assert 2 < large / small < 50


def test_the_step_of_the_readme():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    names = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], names)
    batch = {
        "image": jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((4,), jnp.int32),
        "mask": jax.ShapeDtypeStruct((4,), bool),
    }
    state, _ = jax.eval_shape(names["step"], names["run"], batch)
    assert state.step.shape == ()
