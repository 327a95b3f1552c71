"""A run folder for the commands that use a network."""

import jax
import pytest
from made_up_run import make_run

import alexnet_jax
from alexnet_jax.distributed import sharding


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    make_mesh = sharding.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda: make_mesh(jax.devices()[:1]))
        # The compilation cache of the commands would be the user's.
        patch.setattr("alexnet_jax.environment.prepare", list)
        data_dir = tmp_path_factory.mktemp("data")
        folder, _ = make_run(tmp_path_factory.mktemp("runs") / "tiny", data_dir)
        yield folder


@pytest.fixture(scope="module")
def network(run):
    return alexnet_jax.load(run)
