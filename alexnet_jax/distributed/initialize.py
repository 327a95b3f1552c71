"""Joins the processes of a run, as flags or the environment of a cluster describe them.

Every process runs the same program. What only one of them may see (a signal, a clock, a wrong file)
is first agreed on (`collectives`), and one that fails takes the others with it (`watchdog`): a
process that went its own way would leave the others waiting.
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
from alexnet_jax.errors import AGREED, InputError

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

    Args:
        flags: All of them, or none where a cluster's environment describes the processes;
            `num_processes=1` alone means a single process whatever the environment says.
        environment: Variables of the process.

    Raises:
        InputError: The flags are incomplete, contradict each other, or are out of range.
    """
    coordinator, count, process = flags
    if count is not None and count < 1:
        raise InputError(f"--num_processes={count} is out of range; it must be at least 1.")
    if count == 1 and coordinator is None and process in (None, 0):
        return None
    if flags == ProcessFlags():
        try:
            return _cluster_arguments(environment)
        except (KeyError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"the environment of a cluster cannot be read ({error!r}); correct it, or give "
                "--num_processes=1 to train in a single process."
            ) from None
    if coordinator is None or count is None or process is None:
        given = [f"--{name}" for name, value in flags._asdict().items() if value is not None]
        missing = [f"--{name}" for name, value in flags._asdict().items() if value is None]
        raise InputError(
            f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} given without "
            f"{' and '.join(missing)}; give all three, or none under SLURM, Open MPI or Kubernetes."
        )
    if not 0 <= process < count:
        raise InputError(
            f"--process_id={process} is out of range with --num_processes={count}; "
            f"it must be at least 0 and less than {count}."
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
    """Detects clusters that JAX knows, and Open MPI 5; JAX would also take a lone task for one."""
    # `srun` sets the node list of its step: a program in the batch script itself is on its own.
    if "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1:
        return {"cluster_detection_method": "slurm"}
    count = int(environment.get("OMPI_COMM_WORLD_SIZE", 1))
    if count > 1 and "OMPI_MCA_orte_hnp_uri" in environment:
        return {"cluster_detection_method": "ompi"}
    if count > 1:  # Open MPI 5, which JAX does not know
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
    # Every pod has the first variable; the second only those of an indexed job, which work together
    # where the package is installed with which JAX asks for the others.
    pod = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys()
    if pod and importlib.util.find_spec("kubernetes"):
        return {"cluster_detection_method": "k8s"}
    return None


@contextmanager
def initialized(flags: ProcessFlags) -> Iterator[int]:
    """Joins the other processes, if there are any; at the end waits for them and leaves.

    Enter it before anything asks JAX for a device. Yields the index of this process.

    Raises:
        InputError: See `initialize_arguments`; or JAX cannot use the environment of a cluster.
    """
    arguments = initialize_arguments(flags, os.environ)
    if arguments is None:
        yield 0
        return
    # Its handler of SIGTERM would swallow the signal while `preemption` does not listen.
    jax.config.update("jax_enable_preemption_service", False)
    address = arguments.get("coordinator_address", "")
    # JAX itself would end the process by SIGABRT and a stack trace when its time is over.
    timer = threading.Timer(CONNECT_SECONDS, _exit_unconnected, [address])
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
            f"the processes could not be joined ({' '.join(str(error).split())}); correct this, "
            "or give --num_processes=1 to train in a single process."
        ) from None
    finally:
        timer.cancel()
    with watchdog.exit_on_error():
        lifeline = watchdog.Lifeline(address.rpartition(":")[0].strip("[]"))
        try:
            yield process
        except AGREED:
            lifeline.release()
            raise
        lifeline.release()


def _exit_unconnected(address: str) -> None:
    where = f"at {address} " if address else ""
    watchdog.exit_now(
        f"error: the processes have not all connected {where}within {CONNECT_SECONDS} s; start all "
        "of them with the same --coordinator and --num_processes, and check that nothing between "
        "their hosts, such as a firewall, blocks them."
    )
