"""The classic AlexNet recipe on CIFAR-10: no normalisation, Adam, dropout, flips and crops.

python -m alexnet_jax.main --config=configs/cifar10_classic.py

The network is half as wide as the original's convolutions, with 1,024 hidden units, so that a CPU
can train it. On the JPEG copy (--config.data.name=cifar10_jpeg), trained on all 50,000 images,
seeds 0, 1 and 2: 83.07% of the test images (standard deviation 0.09), 84.59% (0.12) mirrored, too,
after 26 minutes of training on one core of an AMD EPYC with AVX-512. docs/results.md has the rest.
"""

from ml_collections import ConfigDict

from alexnet_jax.config import default_config


def get_config() -> ConfigDict:
    """Returns the config."""
    config = default_config("alexnet")
    config.model.features = (32, 96, 192, 128, 128)
    config.model.hidden = (1024, 1024)
    config.model.dropout = 0.2  # with the paper's 0.5 so few units learn too little in 20 epochs
    config.augment.crop_padding = 2
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_epochs = 1.0
    config.eval.tta = "flip"
    return config
