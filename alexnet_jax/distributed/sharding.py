"""Devices: a one-dimensional mesh, where arrays lie on it, and how a step is compiled for it.

With many processes (see `processes`) the mesh is of the devices of all of them, and an array on it
is one array, of which each process holds the parts that lie on its own devices.
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
    """Whether the devices are CPUs, whose compiler wants other programs."""
    return mesh.devices.flat[0].platform == "cpu"


def hardware(mesh: Mesh) -> str:
    """Names what computes: "8 x NVIDIA H100", or "2 cores of AMD EPYC"."""
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
    """Puts arrays of the host on the devices.

    With many processes each must have at least the parts that its own devices are to hold, in
    arrays of the global shape; these are copied, and nothing is sent between processes.
    """

    def place_one(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(place_one, tree)


def split_batch(mesh: Mesh) -> Callable[[Any], Any]:
    """Returns the function that, inside jit, spreads a batch over the devices."""
    return lambda batch: jax.lax.with_sharding_constraint(batch, split(mesh))


def jit_update(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Compiles a function from a state to a new state and metrics; the old state is given up.

    Its memory becomes the new state's, so the caller must not use it afterwards.
    """
    return jax.jit(function, donate_argnums=0, out_shardings=replicated(mesh))


def jit_eval(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Compiles a function that reads its arguments and leaves them as they are."""
    return jax.jit(function, out_shardings=replicated(mesh))


def check_batch_size(batch_size: int, devices: int) -> None:
    """Refuses a batch that the devices cannot share equally.

    Raises:
        InputError: Names the nearest sizes that they can.
    """
    if batch_size % devices:
        below = batch_size // devices * devices
        near = f"{below} or {below + devices}" if below else f"{devices}"
        raise InputError(
            f"config.train.batch_size is {batch_size}, which {devices} devices cannot share "
            f"equally; the nearest that they can: {near}."
        )
