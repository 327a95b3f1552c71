"""AlexNet for 32x32 images on CIFAR-10.

python -m alexnet_jax.main --config=configs/cifar10.py
"""

from ml_collections import ConfigDict

from alexnet_jax.config import default_config


def get_config() -> ConfigDict:
    """Returns the config."""
    config = default_config("alexnet")
    config.model.norm = "batch"
    config.model.hidden = (1024, 1024)
    config.optimizer.warmup_epochs = 1.0
    return config
