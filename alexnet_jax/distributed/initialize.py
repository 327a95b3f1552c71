"""Joins the processes of a run, as flags or the environment of a cluster describe them.

Every process runs the same program. What only one of them may see, such as a signal or an error,
they agree on (`collectives`), and one that fails ends the others (`watchdog`): none waits in vain.
"""

import importlib.util
import os
import threading
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax

from alexnet_jax.distributed import watchdog
from alexnet_jax.errors import InputError

# Seconds for all processes to start; the nodes of a cluster do not do so at once.
CONNECT_SECONDS = 300


class ProcessFlags(NamedTuple):
    """The flags --coordinator, --num_processes and --process_id; None where not given."""

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def initialize_arguments(
    flags: ProcessFlags, environment: Mapping[str, str]
) -> dict[str, Any] | None:
    """Returns the arguments of `jax.distributed.initialize`; None for a single process.

    Raises:
        InputError: The flags are incomplete, contradict each other, or are out of range.
    """
    coordinator, count, process = flags
    if flags == ProcessFlags():
        return _cluster_arguments(environment)
    if count == 1 and coordinator is None and process in (None, 0):
        return None
    if coordinator is None or count is None or process is None:
        given = " and ".join(f"--{k}" for k, value in flags._asdict().items() if value is not None)
        raise InputError(
            "--coordinator, --num_processes and --process_id go together, and there is only "
            f"{given}; give all three, or none under SLURM, Open MPI or Kubernetes."
        )
    if not 0 <= process < count:
        raise InputError(
            f"--process_id={process} with --num_processes={count} is out of range; processes are "
            "numbered from 0 to one less than their number."
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise InputError(
            f"--coordinator={coordinator} is not an address; it must be host:port of process 0, "
            "such as node1:12345."
        )
    return {
        "coordinator_address": coordinator,
        "num_processes": count,
        "process_id": process,
        "cluster_detection_method": "deactivate",
    }


def _cluster_arguments(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Detects clusters that JAX knows, and Open MPI 5; JAX would take a lone task for one, too."""
    # `srun` sets the node list of its step: a program in the batch script itself is on its own.
    if "SLURM_STEP_NODELIST" in environment and environment.get("SLURM_NTASKS", "1") != "1":
        return {"cluster_detection_method": "slurm"}
    count = int(environment.get("OMPI_COMM_WORLD_SIZE", 1))
    if count > 1 and "OMPI_MCA_orte_hnp_uri" in environment:
        return {"cluster_detection_method": "ompi"}
    if count > 1:  # Open MPI 5, which JAX does not detect
        if environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") != str(count):
            raise InputError(
                "Open MPI 5 on several hosts does not say where process 0 is; give "
                "--coordinator=host:port, --num_processes=$OMPI_COMM_WORLD_SIZE and "
                "--process_id=$OMPI_COMM_WORLD_RANK."
            )
        job = environment.get("PMIX_NAMESPACE", "").encode()
        return {
            "coordinator_address": f"127.0.0.1:{61440 + zlib.crc32(job) % 4096}",
            "num_processes": count,
            "process_id": int(environment["OMPI_COMM_WORLD_RANK"]),
            "local_device_ids": [int(environment["OMPI_COMM_WORLD_LOCAL_RANK"])],
        }
    # Every pod has the first variable, those of an indexed job the second; JAX finds the others
    # with the package.
    pod = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys()
    if pod and importlib.util.find_spec("kubernetes"):
        return {"cluster_detection_method": "k8s"}
    return None


@contextmanager
def initialized(flags: ProcessFlags) -> Iterator[int]:
    """Joins the other processes, if there are any; at the end waits for them.

    Enter it before anything asks JAX for a device. Yields the index of this process.

    Raises:
        InputError: The flags are wrong, or the environment of a cluster cannot be used.
    """
    arguments = initialize_arguments(flags, os.environ)
    if arguments is None:
        yield 0
        return
    # Its handler of SIGTERM would swallow the signal while `preemption` does not listen.
    jax.config.update("jax_enable_preemption_service", False)
    host, _, port = arguments.get("coordinator_address", "").rpartition(":")
    message = (
        f"error: the processes have not all connected {f'at {host}:{port} ' if host else ''}within "
        f"{CONNECT_SECONDS} s; start all of them with the same --coordinator and --num_processes, "
        "and check that nothing between their hosts, such as a firewall, blocks them."
    )
    # JAX itself would end the process by SIGABRT and a stack trace when its time is over.
    timer = threading.Timer(CONNECT_SECONDS, watchdog.exit_now, [message])
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=CONNECT_SECONDS + 60,
            heartbeat_timeout_seconds=watchdog.HEARTBEAT_SECONDS,
        )
        process = jax.process_index()  # starts the devices, which takes all processes
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputError(
            f"the processes cannot be joined ({error!r}); correct this, or give --num_processes=1 "
            "to train in a single process."
        ) from None
    finally:
        timer.cancel()
    with watchdog.lifeline(host.strip("[]")):
        yield process
