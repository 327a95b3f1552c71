"""The classic AlexNet recipe on CIFAR-10: no normalisation, Adam, dropout, flips and crops.

python -m alexnet_jax.main --config=configs/cifar10_classic.py

Not yet measured on the test set: docs/results.md says how it will be.
"""

from ml_collections import ConfigDict

from alexnet_jax.config import default_config


def get_config() -> ConfigDict:
    """Returns the config."""
    config = default_config("alexnet")
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_epochs = 1.0
    config.test.views = "flip"
    return config
