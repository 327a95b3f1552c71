"""AlexNet for 32x32 images on CIFAR-10: the default, 20 epochs that 2 cores of a CPU can do.

python -m alexnet_jax.main --config=configs/cifar10.py

On the JPEG copy (--config.data.name=cifar10_jpeg), trained on all 50,000 images, seeds 0, 1 and 2:
88.49% of the test images (standard deviation 0.22), 89.92% (0.19) with views, after 31 minutes of
training on one core of an AMD EPYC with AVX-512; the steps of an epoch take 71 s on two.
docs/results.md says how it was found.
"""

from ml_collections import ConfigDict

from alexnet_jax.config import default_config


def get_config() -> ConfigDict:
    """Returns the config."""
    config = default_config("alexnet")
    # A frozen layer in front, measured on the images; it has no bias, so that no gradient is
    # computed of what has the most pixels.
    config.model.whitening = 2
    config.model.whitening_bias = False
    # Channels are cheap where there are few pixels, so the layers widen as the image shrinks.
    config.model.features = (32, 48, 128, 160, 192)
    config.model.pools = (True, False, True, False, True)
    config.model.pool_to = 1  # where something is in the image is of no account
    config.model.hidden = (256, 256)
    config.model.norm = "batch"
    config.model.norm_scale = False
    config.model.norm_momentum = 0.95  # over 20 batches, which at the end differ by chance alone
    config.model.activation = "gelu"
    config.model.pool_first = True
    config.model.kernel_init = "dirac"
    config.model.dropout = 0.0  # in 20 epochs it would cost more than it brings
    config.augment.crop_padding = 3
    config.augment.alternating_flip = True
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_epochs = 1.0
    config.optimizer.weight_decay = 0.16
    # Normalisation makes a kernel's scale nothing, so that a high rate costs no stability; with the
    # decay it does what Muon does here.
    config.optimizer.lr_multipliers = (("norm*/bias", 10.0), ("conv*/kernel", 4.0))
    config.train.label_smoothing = 0.1
    config.eval.tta = "flip_translate"
    return config
