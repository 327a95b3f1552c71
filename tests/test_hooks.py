"""Hooks of a person's own: called when they are due, exact on resume, and able to end a run."""

import os
import re
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from trained_run import records, saved

from alexnet_jax import train
from alexnet_jax.config import default_config
from alexnet_jax.errors import Interrupted

pytestmark = [
    pytest.mark.usefixtures("quick_runs"),
    # Orbax and TensorStore leave their event loops to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def config(tmp_path_factory):
    config = default_config()
    config.data.name = "digits"
    config.data.data_dir = str(tmp_path_factory.getbasetemp() / "hooks_data")
    config.data.image_size = 8
    config.augment.crop_padding = 1
    config.model.features = config.model.kernels = config.model.strides = (1,)
    config.model.pools = (True,)
    config.model.hidden = (8,)
    config.train.batch_size = 256  # 5 steps an epoch
    config.train.epochs = 4
    config.eval.test = False
    config.writers.tensorboard = False
    return config


def early_stopping(patience):
    """The example of docs/hooks.md; it also notes what it sees."""
    text = (Path(__file__).parents[1] / "docs" / "hooks.md").read_text()
    example = re.search(r"class EarlyStopping:.*?(?=\n\n\n)", text, re.DOTALL)[0]
    names = {}
    exec(example, names)

    class Noting(names["EarlyStopping"]):
        def __init__(self):
            super().__init__(patience)
            self.state |= {"best": 2.0, "seen": []}  # so that nothing is better

        def __call__(self, info):
            super().__call__(info)
            self.state["seen"].append([info.step, info.validation["accuracy"]])

    return Noting()


class Every:
    def __init__(self, every):
        self.every, self.steps = every, []

    def __call__(self, info):
        self.steps.append(info.step)


class StopAt:
    """Asks as a scheduler does."""

    def __init__(self, step):
        self.step = step

    def __call__(self, info):
        if info.step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("dispatch", [1, 4])
def test_hooks_are_called_when_they_are_due(config, tmp_path, dispatch):
    config.train.steps_per_dispatch = dispatch  # of 4 and 1 steps
    hooks = [Every(1), Every(3), Every("epoch")]
    calls = []
    train.run(config, tmp_path / "run", hooks=[*hooks, lambda info: calls.append(info.metrics)])
    ends = list(range(1, 21)) if dispatch == 1 else [4, 5, 9, 10, 14, 15, 19, 20]
    assert hooks[0].steps == ends
    assert hooks[1].steps == ([3, 6, 9, 12, 15, 18] if dispatch == 1 else [4, 9, 14, 15, 19])
    assert hooks[2].steps == [5, 10, 15, 20]
    written = [r for r in records(tmp_path / "run") if r["split"] == "train"]
    assert [call["loss"] for call in calls] == [record["loss"] for record in written]


def test_a_hook_ends_a_run_early_and_is_exact_on_resume(config, tmp_path):
    whole = early_stopping(3)
    results = train.run(config, tmp_path / "whole", hooks=[whole])
    assert results["step"] == 15
    assert [step for step, _ in whole.state["seen"]] == [5, 10, 15]
    assert (tmp_path / "whole" / "results.json").exists()

    with pytest.raises(Interrupted):
        train.run(config, tmp_path / "run", hooks=[early_stopping(3), StopAt(7)])
    resumed = early_stopping(3)
    train.run(config, tmp_path / "run", hooks=[resumed])
    assert resumed.state == whole.state
    arrays = (jax.tree.leaves(saved(tmp_path / name, 15)) for name in ("whole", "run"))
    for array, its_twin in zip(*arrays, strict=True):
        np.testing.assert_array_equal(array, its_twin)


def test_a_run_that_a_hook_has_ended_is_not_trained_further(config, tmp_path):
    train.run(config, tmp_path / "run", hooks=[early_stopping(1)])
    (tmp_path / "run" / "results.json").unlink()  # as if it had been killed before
    assert train.run(config, tmp_path / "run")["step"] == 5


def test_a_hook_may_stop_within_an_epoch(config, tmp_path):
    def stop(info):
        info.stop = info.step == 7

    assert train.run(config, tmp_path / "run", hooks=[stop])["step"] == 7
    assert saved(tmp_path / "run", 7)["rest"]["step"] == 7
    assert records(tmp_path / "run")[-1]["step"] == 7


def test_a_hook_may_replace_the_state(config, tmp_path):
    def zero(info):
        if info.step == 20:
            info.state = info.state.replace(params=jax.tree.map(lambda x: 0 * x, info.state.params))

    results = train.run(config, tmp_path / "run", hooks=[zero])
    assert results["validation"]["loss"] == pytest.approx(np.log(10))
