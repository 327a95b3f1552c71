"""5 convolutions + 3 fully connected layers on CIFAR-10 with all that helps, 20 epochs.

python -m alexnet_jax.main --config=configs/cifar10_best.py

Most of it are airbench's techniques (Jordan, 2024). The frozen convolution that whitens the patches
is measured, not trained, and not counted among the 5.

Not yet measured on the test set: docs/results.md says how it will be.
"""

from ml_collections import ConfigDict

from alexnet_jax.config import default_config


def get_config() -> ConfigDict:
    """Returns the config."""
    config = default_config("alexnet")
    config.model.whitening = 2
    config.model.features = (128, 384, 384, 384, 384)
    config.model.hidden = (1024, 1024)
    config.model.norm = "batch"
    config.model.norm_scale = False
    config.model.norm_momentum = 0.6
    config.model.activation = "gelu"
    config.model.pool_first = True
    config.model.kernel_init = "dirac"
    config.model.dropout = 0.1
    config.augment.alternating_flip = True
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 2e-3  # of the fully connected layers and the biases
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_epochs = 1.0
    config.optimizer.weight_decay = 0.02
    config.optimizer.rate_patterns = ("norm*/bias",)
    config.optimizer.rate_factors = (10.0,)
    config.optimizer.muon_rate = 0.12
    config.optimizer.muon_momentum = 0.6
    config.optimizer.muon_unit_filters = True
    config.optimizer.lookahead_period = 5
    config.optimizer.lookahead_decay = 0.77
    config.optimizer.lookahead_power = 3.0
    config.train.batch_size = 500
    config.train.label_smoothing = 0.2
    config.test.views = "flip_translate"
    return config
