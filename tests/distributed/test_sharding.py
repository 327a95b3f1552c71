import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax.distributed import sharding
from alexnet_jax.errors import InputError
from alexnet_jax.ops import cpu_info


def shards(array):
    """Device to what it holds."""
    return {shard.device: np.asarray(shard.data) for shard in array.addressable_shards}


@pytest.mark.parametrize(
    ("batch_size", "devices", "nearest"), [(130, 8, "128 or 136"), (5, 8, "8"), (7, 3, "6 or 9")]
)
def test_a_batch_that_devices_cannot_share_is_refused(batch_size, devices, nearest):
    with pytest.raises(InputError, match=rf"is {batch_size}, which {devices}.*: {nearest}\.$"):
        sharding.check_batch_size(batch_size, devices)


@pytest.mark.parametrize(("batch_size", "devices"), [(128, 8), (8, 8), (7, 1)])
def test_a_batch_that_devices_can_share_passes(batch_size, devices):
    sharding.check_batch_size(batch_size, devices)


def test_mesh_has_all_devices_or_those_given():
    assert list(sharding.make_mesh().devices) == jax.devices()
    some = jax.devices()[2:5]
    mesh = sharding.make_mesh(some)
    assert list(mesh.devices) == some
    assert mesh.axis_names == (sharding.AXIS,)


def test_a_mesh_of_gpus_is_not_on_cpu_and_is_named():
    gpu = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100")
    gpus = types.SimpleNamespace(devices=np.array([gpu] * 4), size=4)
    assert not sharding.on_cpu(gpus)
    assert sharding.hardware(gpus) == "4 x NVIDIA H100"


def test_a_mesh_of_cpus_is_on_cpu_and_is_named():
    one, all_devices = sharding.make_mesh(jax.devices()[:1]), sharding.make_mesh()
    assert sharding.on_cpu(one)
    assert sharding.on_cpu(all_devices)
    name = rf"\d+ cores? of {re.escape(cpu_info.cpu_name())}"
    assert re.fullmatch(name, sharding.hardware(one))
    assert re.fullmatch(rf"8 x cpu on {name}", sharding.hardware(all_devices))


def test_replicated_gives_every_device_the_whole():
    mesh, array = sharding.make_mesh(), np.arange(6)
    held = shards(jax.device_put(array, sharding.replicated(mesh)))
    assert set(held) == set(jax.devices())
    for part in held.values():
        np.testing.assert_array_equal(part, array)


def test_place_puts_on_each_device_its_part():
    mesh = sharding.make_mesh()
    arrays = {"a": np.arange(48, dtype=np.int32).reshape(16, 3), "b": np.arange(8, dtype=np.uint8)}
    placed = sharding.place(arrays, sharding.split(mesh))
    for name, array in arrays.items():
        assert placed[name].dtype == array.dtype
        for device, part in zip(jax.devices(), np.split(array, 8), strict=True):
            np.testing.assert_array_equal(shards(placed[name])[device], part)
    for part in shards(sharding.place(arrays["a"], sharding.replicated(mesh))).values():
        np.testing.assert_array_equal(part, arrays["a"])


@pytest.mark.parametrize("dimension", [0, 1])
def test_split_gives_each_device_its_part(dimension):
    mesh, array = sharding.make_mesh(), np.arange(16 * 24).reshape(16, 24)
    held = shards(jax.device_put(array, sharding.split(mesh, dimension)))
    for device, part in zip(jax.devices(), np.split(array, 8, dimension), strict=True):
        np.testing.assert_array_equal(held[device], part)


def test_split_batch_spreads_every_leaf_inside_jit():
    mesh = sharding.make_mesh()
    batch = {"image": jnp.zeros((16, 4, 4, 3)), "label": jnp.arange(16)}
    spread = jax.jit(sharding.split_batch(mesh))(batch)
    assert spread["image"].addressable_shards[0].data.shape == (2, 4, 4, 3)
    held = shards(spread["label"])
    for i, device in enumerate(mesh.devices):
        np.testing.assert_array_equal(held[device], [2 * i, 2 * i + 1])


def test_jit_update_donates_the_state_and_jit_eval_does_not():
    mesh = sharding.make_mesh()
    state = jax.device_put(jnp.arange(8.0), sharding.replicated(mesh))
    batch = jax.device_put(jnp.ones(8), sharding.split(mesh))
    total = sharding.jit_eval(lambda state, batch: (state * batch).sum(), mesh)(state, batch)
    assert float(total) == 28
    new, metric = sharding.jit_update(lambda s, b: (s + b, b.sum()), mesh)(state, batch)
    assert state.is_deleted()
    assert not batch.is_deleted()
    for result in (total, new, metric):
        assert result.sharding.is_fully_replicated
    np.testing.assert_array_equal(new, np.arange(8) + 1)
