"""From the classic recipe on CIFAR-10 to the best, one change a row; `:3` is the fourth of them.

The test set stays closed: rows are to choose by.

python scripts/ablation.py

runs them all; a single one:

python -m alexnet_jax.main --config=configs/ablation.py:3
"""

import runpy
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from alexnet_jax.errors import InputError

# What each row changes on top of those before it; the last is configs/cifar10_best.py.
STEPS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("classic", {}),
    ("batch_norm", {"model.norm": "batch", "model.norm_momentum": 0.95, "model.norm_scale": False}),
    ("no_dropout", {"model.dropout": 0.0}),
    ("small_hidden_layers", {"model.hidden": (256, 256)}),
    (
        "adamw",
        {
            "optimizer.name": "adamw",
            "optimizer.learning_rate": 2e-3,
            "optimizer.weight_decay": 0.16,
        },
    ),
    ("linear", {"optimizer.schedule": "linear"}),
    ("label_smoothing", {"train.label_smoothing": 0.2}),
    ("wider_shifts", {"augment.crop_padding": 4}),
    ("alternating_flip", {"augment.alternating_flip": True}),
    ("whitening", {"model.whitening": 2, "model.whitening_bias": False}),
    ("dirac", {"model.kernel_init": "dirac"}),
    ("gelu_after_pooling", {"model.activation": "gelu", "model.pool_first": True}),
    ("later_pooling", {"model.pools": (True, False, True, False, True)}),
    ("average_pooling", {"model.pool_to": 1}),
    (
        "bias_rates",
        {"optimizer.lr_multipliers": (("norm*/bias", 10.0),)},
    ),
    ("larger_batches", {"train.batch_size": 256}),
    (
        "muon",
        {
            "optimizer.muon_learning_rate": 0.04,
            "optimizer.muon_momentum": 0.9,
            "optimizer.muon_normalize_filters": True,
        },
    ),
    ("widths", {"model.features": (64, 64, 192, 192, 256)}),
)


def get_config(row: str = "0") -> ConfigDict:
    """Returns the config of a row, counted from 0."""
    if not (row.isdecimal() and int(row) < len(STEPS)):
        raise InputError(f"there is no row {row!r}; it must be a number from 0 to {len(STEPS) - 1}")
    classic = Path(__file__).with_name("cifar10_classic.py")
    config: ConfigDict = runpy.run_path(str(classic))["get_config"]()
    config.eval.tta = "flip_translate"
    config.eval.test = False
    for _, changes in STEPS[: int(row) + 1]:
        config.update_from_flattened_dict(changes)
    return config
