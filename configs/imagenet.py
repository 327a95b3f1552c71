"""AlexNet on ImageNet as in the paper of 2012; or another one: --config=configs/imagenet.py:NAME.

python -m alexnet_jax.main --config=configs/imagenet.py --config.data.name=imagenet2012

imagenet2012 is TFDS's, which wants the archives of image-net.org in data_dir/downloads/manual. A
tree of train/CLASS/IMAGE and val/CLASS/IMAGE does as well: docs/imagenet.md. NAME is alexnet_2012
(default), alexnet_owt, or another network that images of this size suit.
"""

from ml_collections import ConfigDict

from alexnet_jax.config import default_config


def get_config(model: str = "alexnet_2012") -> ConfigDict:
    """Returns the config."""
    config = default_config(model)
    config.data.name = "imagenet2012"
    config.data.test_split = "validation"  # TFDS's test split has no labels
    config.data.validation_fraction = 0.01  # of train, by which the learning rate falls
    config.data.image_size = 256
    config.data.crop_size = 227 if model == "alexnet_2012" else 224
    config.data.workers = 8
    config.augment.crop_padding = 0
    config.augment.pca_jitter = 0.1
    config.train.batch_size = 128
    config.train.epochs = 90
    config.eval.batch_size = 512
    if model == "alexnet_2012":  # the kernels begin so small that unit variance would vanish
        config.data.normalization = "subtract_mean"
    config.optimizer.name = "sgd_2012"
    config.optimizer.learning_rate = 0.01
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 5e-4
    config.optimizer.schedule = "plateau"
    config.optimizer.step_factor = 0.1
    return config
