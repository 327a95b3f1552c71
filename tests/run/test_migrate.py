"""A run that was begun before options were renamed goes on under their present names."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from alexnet_jax.config import default_config, flatten
from alexnet_jax.errors import InputError
from alexnet_jax.run import directory
from alexnet_jax.run.migrate import migrate

OLD = Path(__file__).with_name("config_before_renaming.json")
# The old options in it that differed from their defaults and have another name or value today.
NOW = {
    "data.normalization": "subtract_mean",
    "data.in_memory": "off",
    "data.prefetch": 3,
    "augment.pad_mode": "constant",
    "augment.pca_jitter": 0.1,
    "init.reinitialize": ("logits/*", "fc1/*"),
    "optimizer.end_lr_fraction": 0.01,
    "optimizer.plateau_patience": 4,
    "optimizer.lr_multipliers": (("norm*/bias", 10.0), ("conv*/kernel", 4.0)),
    "optimizer.muon_learning_rate": 0.08,
    "optimizer.muon_normalize_filters": True,
    "eval.batch_size": 100,
    "eval.test": False,
    "eval.tta": "flip",
}


@pytest.fixture
def folder(tmp_path):
    shutil.copy(OLD, tmp_path / directory.CONFIG)
    (tmp_path / directory.METRICS).write_text('{"split": "train", "step": 1}\n')
    return tmp_path


def test_an_old_config_is_read_with_present_names(folder):
    options = dict(flatten(directory.read_config(folder)))
    assert options.keys() == dict(flatten(default_config())).keys()
    assert {key: options[key] for key in NOW} == NOW


def test_an_old_run_resumes(folder):
    config = directory.read_config(folder)
    with directory.RunDirectory.open(folder, config):
        pass
    migrated = json.loads((folder / directory.CONFIG).read_text())
    assert migrated == migrate(json.loads(OLD.read_text()))
    optimizer = dataclasses.replace(config.optimizer, plateau_patience=5)
    config = dataclasses.replace(config, optimizer=optimizer)
    with (
        pytest.raises(InputError, match="plateau_patience was 4 and is 5"),
        directory.RunDirectory.open(folder, config),
    ):
        pass


def test_present_names_stay():
    options = {key: list(v) if isinstance(v, tuple) else v for key, v in NOW.items()}
    assert migrate(options) == options
