"""What a run has left that was really trained, and how to stop one at a step."""

import os
import signal
from contextlib import contextmanager

import orbax.checkpoint as ocp
import pytest

from alexnet_jax.run import writers


def saved(folder, step):
    """Reads a checkpoint with Orbax alone: {"params": ..., "rest": ...}."""
    restore = ocp.args.StandardRestore()
    with ocp.CheckpointManager((folder / "checkpoints").absolute()) as manager:
        found = manager.restore(step, args=ocp.args.Composite(params=restore, rest=restore))
    return {"params": found.params, "rest": found.rest}


def records(folder):
    """Reads metrics.jsonl, without what the clock has a say in."""
    found = writers.read_metrics(folder / "metrics.jsonl")
    for record in found:
        record.pop("images_per_second", None)
    return found


@contextmanager
def stopped_at(step):
    """Sends SIGTERM to this process when a run comes to tell of a step."""
    update = writers.Progress.update

    def stop_then_update(self, record):
        if record["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)
        update(self, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writers.Progress, "update", stop_then_update)
        yield
