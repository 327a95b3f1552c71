"""Devices: a one-dimensional mesh, how arrays are sharded over it, and how steps are compiled.

With many processes (see `initialize`) the mesh has the devices of all of them; an array on it is
one array, of which each process holds the shards of its own devices.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alexnet_jax.errors import InputError
from alexnet_jax.ops import cpu_info

AXIS = "data"


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lays devices, by default those of all processes, along the axis that splits batches."""
    # Not jax.make_mesh, whose axes are explicit: here jit decides where an operation runs.
    return Mesh(np.array(jax.devices() if devices is None else devices), (AXIS,))


def on_cpu(mesh: Mesh) -> bool:
    """Returns whether the devices are CPUs, for which other programs are faster."""
    return mesh.devices.flat[0].platform == "cpu"


def hardware(mesh: Mesh) -> str:
    """Names the devices: "8 x NVIDIA H100", or "2 cores of AMD EPYC"."""
    devices = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
    if not on_cpu(mesh):
        return devices
    cores = cpu_info.cores()
    host = f"{cores} core{'s' * (cores > 1)} of {cpu_info.cpu_name()}"
    return host if mesh.size == 1 else f"{devices} on {host}"


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh, dimension: int = 0) -> NamedSharding:
    """Each device holds an equal part of the given dimension."""
    return NamedSharding(mesh, PartitionSpec(*[None] * dimension, AXIS))


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Copies arrays of the host to the devices.

    Of many processes, each needs only the shards of its own devices, in arrays of the global shape;
    nothing is sent between processes.
    """
    create = jax.make_array_from_callback
    return jax.tree.map(lambda x: create(x.shape, sharding, lambda index: x[index]), tree)


def split_batch(mesh: Mesh) -> Callable[[Any], Any]:
    """Returns a function that, inside jit, splits a batch over the devices."""
    return lambda batch: jax.lax.with_sharding_constraint(batch, split(mesh))


def jit_update(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Compiles a function from a state to a new state and metrics; the old state is donated."""
    return jax.jit(function, donate_argnums=0, out_shardings=replicated(mesh))


def jit_eval(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Compiles a function whose results every device holds; nothing is donated."""
    return jax.jit(function, out_shardings=replicated(mesh))


def check_batch_size(batch_size: int, devices: int) -> None:
    """Raises an InputError unless the devices can share a batch equally."""
    if batch_size % devices:
        below = batch_size // devices * devices
        near = f"{below} or {below + devices}" if below else f"{devices}"
        raise InputError(
            f"config.train.batch_size is {batch_size}, which {devices} devices cannot share "
            f"equally; the nearest that they can: {near}."
        )
