"""AlexNet for 32x32 images on CIFAR-10: the default.

python -m alexnet_jax.main --config=configs/cifar10.py

Not yet measured on the test set: docs/results.md says how it will be.
"""

from ml_collections import ConfigDict

from alexnet_jax.config import default_config


def get_config() -> ConfigDict:
    """Returns the config."""
    config = default_config("alexnet")
    config.model.norm = "batch"
    config.model.hidden = (1024, 1024)
    config.model.dropout = 0.2  # in 20 epochs more would cost more than it brings
    config.optimizer.name = "adamw"
    config.optimizer.weight_decay = 0.05
    config.optimizer.warmup_epochs = 1.0
    config.train.label_smoothing = 0.1
    config.test.views = "flip_translate"
    return config
