"""A run folder that no training has made: tests of what uses a network need none that is good."""

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax.checkpoint import manager
from alexnet_jax.config import default_config, flatten
from alexnet_jax.data.source import load_source
from alexnet_jax.models import create_model
from alexnet_jax.run import files
from alexnet_jax.state import TrainState

SIZE = 8
# By step. The newest two are kept, and the best.
ACCURACIES = {10: 0.9, 20: 0.5, 30: 0.7}


def tiny_config(data_dir):
    config = default_config()
    config.data.name = "digits"
    config.data.data_dir = str(data_dir)
    config.data.image_size = SIZE
    config.cpu_kernels = "off"
    config.model.features = (8, 8)
    config.model.kernels = (3, 3)
    config.model.strides = (1, 1)
    config.model.pools = (True, True)
    config.model.hidden = (16,)
    config.model.norm = "batch"
    config.train.ema_decay = 0.5
    config.eval.batch_size = 100
    return config


def make_run(folder, data_dir):
    """Writes the folder, with other weights and averages at each step."""
    config = tiny_config(data_dir)
    train, test = (load_source(config.data, split) for split in ("train", "test"))
    folder.mkdir()
    files.write_json(folder / "config.json", dict(flatten(config)))
    info = {
        "name": "digits",
        "class_names": list(train.class_names),
        "image_shape": [SIZE, SIZE, 3],
        "mean": [0.3, 0.35, 0.4],
        "deviation": [0.3, 0.25, 0.2],
        "checksums": {"train": train.checksum(), "test": test.checksum()},
        "images": {"train": 1295, "validation": 142, "test": 360},
    }
    files.write_json(folder / "dataset.json", info)
    module = create_model(config.model, 10)
    shapes = jax.eval_shape(
        lambda: module.init(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)), train=False)
    )
    draw = np.random.default_rng(0)

    def weights():
        # All positive, as a variance must be, but for the kernels: about 1 in each layer.
        def array(leaf):
            if len(leaf.shape) == 1:
                return jnp.asarray(draw.uniform(0.5, 1, leaf.shape), jnp.float32)
            scale = 1 / np.sqrt(np.prod(leaf.shape[:-1]))
            return jnp.asarray(scale * draw.standard_normal(leaf.shape), jnp.float32)

        found = jax.tree.map(array, shapes)
        return {"params": found["params"], "model_state": {"batch_stats": found["batch_stats"]}}

    checkpoints = manager.Checkpoints(folder / "checkpoints")
    states = {}
    for step, accuracy in ACCURACIES.items():
        states[step] = TrainState(
            step=jnp.int32(step),
            **weights(),
            opt_state={"mean": jnp.ones(1000)},
            ema=weights(),
            key=jax.random.key(0),
        )
        checkpoints.save(states[step], {}, accuracy)
    checkpoints.finish()
    checkpoints.close()
    return folder, states
