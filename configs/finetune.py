"""Goes on from the network of any run folder, on other classes: --config=configs/finetune.py:RUN.

python -m alexnet_jax.main --config=configs/finetune.py:runs/cifar10 --config.data.name=flowers

The network and the size of its images are those of RUN; the last layer begins anew. To train that
layer alone, add --config.optimizer.frozen="('conv*','norm*','fc*')", without 'norm*' where the
network has no normalisation.
"""

from pathlib import Path

from ml_collections import ConfigDict

from alexnet_jax.config import default_config
from alexnet_jax.run import directory


def get_config(run: str = "") -> ConfigDict:
    """Returns the config, with the network of a run folder; without one, AlexNet from scratch."""
    config = default_config()
    if run:
        start = directory.read_config(Path(run).expanduser())
        config = default_config(start.model.name)
        config.model.update(start.model.fields)
        for key in ("image_size", "crop_size", "normalization"):
            config.data[key] = getattr(start.data, key)
        config.augment.update(vars(start.augment))
        config.init.from_run = run
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 3e-4
    config.optimizer.weight_decay = 0.01
    config.optimizer.warmup_epochs = 1.0
    config.train.batch_size = 32
    return config
