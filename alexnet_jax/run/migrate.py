"""Options of runs that were begun before some were renamed, by the names that they have now."""

from collections.abc import Mapping
from typing import Any

_RENAMED = {
    "augment.crop_fill": "augment.pad_mode",
    "augment.pca_colour": "augment.pca_jitter",
    "data.normalize": "data.normalization",
    "data.read_ahead": "data.prefetch",
    "data.resident": "data.in_memory",
    "init.anew": "init.reinitialize",
    "init.run": "init.from_run",
    "optimizer.final_fraction": "optimizer.end_lr_fraction",
    "optimizer.muon_rate": "optimizer.muon_learning_rate",
    "optimizer.muon_unit_filters": "optimizer.muon_normalize_filters",
    "optimizer.plateau_epochs": "optimizer.plateau_patience",
    "test.measure": "eval.test",
    "test.views": "eval.tta",
    "train.eval_batch_size": "eval.batch_size",
}
_VALUES = {
    "augment.pad_mode": {"black": "constant"},
    "data.normalization": {"deviation": "standardize", "mean": "subtract_mean"},
}
_PATTERNS, _FACTORS = "optimizer.rate_patterns", "optimizer.rate_factors"


def migrate(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of a ``config.json`` of any version, by their present names.

    Args:
        options: Values by "section.name"; those with present names are returned as they are.
    """
    migrated = {_RENAMED.get(key, key): value for key, value in options.items()}
    for key, values in _VALUES.items():
        if isinstance(migrated.get(key), str):
            migrated[key] = values.get(migrated[key], migrated[key])
    if isinstance(migrated.get(_PATTERNS), list) and isinstance(migrated.get(_FACTORS), list):
        pairs = zip(migrated.pop(_PATTERNS), migrated.pop(_FACTORS), strict=True)
        migrated["optimizer.lr_multipliers"] = [list(pair) for pair in pairs]
    return migrated
