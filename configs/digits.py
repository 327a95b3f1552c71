"""A small AlexNet on scikit-learn's handwritten digits: needs no internet, ends in a minute.

python -m alexnet_jax.main --config=configs/digits.py

Test accuracy 99.22% (mean of seeds 0 to 4, standard deviation 0.46; 360 images), 17 s on one core
of an AMD EPYC with AVX-512, in float32.
"""

from ml_collections import ConfigDict

from alexnet_jax.config import default_config


def get_config() -> ConfigDict:
    """Returns the config."""
    config = default_config("alexnet")
    config.data.name = "digits"
    config.data.image_size = 16
    config.augment.crop_padding = 1
    config.augment.flip = False  # a mirrored digit is another sign
    config.model.features = (16, 32, 48, 32, 32)
    config.model.hidden = (128, 128)
    config.model.norm = "batch"
    config.model.dropout = 0.2
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_epochs = 1.0
    config.train.batch_size = 64
    config.train.epochs = 20
    return config
