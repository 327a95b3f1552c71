"""VGG-11 with batch normalisation on CIFAR-10.

python -m alexnet_jax.main --config=configs/vgg11.py
"""

from ml_collections import ConfigDict

from alexnet_jax.config import default_config


def get_config() -> ConfigDict:
    """Returns the config."""
    config = default_config("vgg")
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.05
    config.optimizer.weight_decay = 5e-4
    config.optimizer.warmup_epochs = 1.0
    return config
