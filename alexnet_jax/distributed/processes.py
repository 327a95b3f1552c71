"""Many processes that train as one: how they meet, agree, and end together.

JAX's distributed runtime joins them. Every process runs the same program; what only one of them
may see (a signal, a clock, a wrong file) is first agreed upon, since a process that went its own
way would leave the others waiting. With one process nothing here costs anything.
"""

import contextlib
import functools
import hashlib
import importlib.util
import json
import logging
import os
import secrets
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Listener, wait
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from alexnet_jax.distributed import sharding
from alexnet_jax.errors import (
    EXIT_CTRL_C,
    EXIT_LOST,
    Diverged,
    InputError,
    Interrupted,
    SaveFailed,
)

log = logging.getLogger(__name__)

# Seconds in which all processes must have come; the nodes of a cluster do not start at once.
CONNECT_SECONDS = 300
# Seconds without a sign of life until a process counts as dead and JAX ends the others, by SIGABRT.
# A killed one is noticed at once, by its closed connection; this is for hosts that vanish.
HEARTBEAT_SECONDS = 30
# Seconds for the news of a lost process to overtake the errors that it causes.
_NEWS_SECONDS = 2.0

# What all processes raise at the same point, if any does.
AGREED = (InputError, Diverged, SaveFailed, Interrupted)
# What a process tells the others of, which would wait for it in vain.
TOLD = {"InputError": InputError, "SaveFailed": SaveFailed}
_LONGEST_MESSAGE = 2000  # bytes of an error that processes tell each other


class Flags(NamedTuple):
    """What the command line says of the processes; None where it says nothing."""

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def find(flags: Flags, environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Finds out whether this process is one of many.

    Args:
        flags: All of them, or none where a cluster's environment says it; `num_processes=1` alone
            is a process on its own wherever it runs.
        environment: Variables of the process.

    Returns:
        Arguments of `jax.distributed.initialize`; None for a process on its own.

    Raises:
        InputError: The flags are incomplete, contradict each other, or are impossible.
    """
    coordinator, count, process = flags
    if count is not None and count < 1:
        raise InputError(f"--num_processes={count} is impossible; it must be at least 1.")
    if count == 1 and coordinator is None and process in (None, 0):
        return None
    if flags == Flags():
        return _find_cluster(environment)
    missing = [name for name, value in zip(Flags._fields, flags, strict=True) if value is None]
    if missing:
        given = [name for name in Flags._fields if name not in missing]
        raise InputError(
            f"{_listed(given)} {'is' if len(given) == 1 else 'are'} given without "
            f"{_listed(missing)}; give all three, or none where SLURM, Open MPI or Kubernetes "
            "says them."
        )
    assert coordinator is not None
    assert count is not None
    assert process is not None
    if not 0 <= process < count:
        raise InputError(
            f"--process_id={process} is impossible with --num_processes={count}; "
            f"it must be at least 0 and less than {count}."
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise InputError(
            f"--coordinator={coordinator} is no address; it must be host:port of process 0, such "
            "as node1:12345."
        )
    return {
        "coordinator_address": coordinator,
        "num_processes": count,
        "process_id": process,
        "cluster_detection_method": "deactivate",
    }


def _find_cluster(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Recognises clusters whose environment JAX can read, and tasks that are one of several."""
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
    # Every pod has the first; the second only those of an indexed job, whose pods work together
    # if the package is there with which JAX asks for the others.
    if (
        {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys()
    ) and importlib.util.find_spec("kubernetes"):
        return {"cluster_detection_method": "k8s"}
    return None


def _listed(names: list[str]) -> str:
    return " and ".join(f"--{name}" for name in names)


@contextmanager
def joined(flags: Flags) -> Iterator[int]:
    """Joins the other processes, if there are any, and takes leave of them at the end.

    To be entered before anything asks JAX for a device.

    Args:
        flags: See `find`.

    Yields:
        The index of this process; 0 for one on its own.

    Raises:
        InputError: See `find`; or a cluster's environment is not as JAX needs it.
    """
    try:
        arguments = find(flags, os.environ)
    except (KeyError, ValueError) as error:
        raise InputError(
            f"the environment of a cluster cannot be read ({error!r}); correct that, or give "
            "--num_processes=1 to run on its own."
        ) from None
    if arguments is None:
        yield 0
        return
    # Its handler of SIGTERM would swallow the signal while `interrupts` does not listen.
    jax.config.update("jax_enable_preemption_service", False)
    # The runtime itself ends the process by SIGABRT and a stack trace when its time is over.
    watch = threading.Timer(CONNECT_SECONDS, _nobody_came, [arguments])
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=CONNECT_SECONDS + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
        process = jax.process_index()  # starts the devices, for which all processes must be there
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputError(
            f"the processes could not be joined ({' '.join(str(error).split())}); correct that, "
            "or give --num_processes=1 to run on its own."
        ) from None
    finally:
        watch.cancel()
    with nobody_left_waiting():
        lifeline = _Lifeline(process, jax.process_count())
        try:
            yield process
        except AGREED:
            lifeline.let_go()
            raise
        lifeline.let_go()


class _Lifeline:
    """Connections between the first process and the others, which break when one of them dies.

    They end a process whose devices wait for one that is gone, which no exception would reach.
    Where they cannot be made, JAX's heartbeats remain.
    """

    def __init__(self, process: int, count: int) -> None:
        """Connects all processes and starts to watch, in a thread."""
        self._leaving = False
        if count == 1:
            return
        if process == 0:
            token = secrets.token_bytes(16)
            listener = Listener(("", 0), backlog=count, authkey=token)
            _tell_all(f"{listener.address[1]} {token.hex()}")
            watch = functools.partial(self._watch_all, listener, count)
        else:
            port, secret = _tell_all("")[0].split()
            coordinator = jax._src.distributed.global_state.coordinator_address
            assert coordinator is not None
            address = (coordinator.rpartition(":")[0].strip("[]"), int(port))
            watch = functools.partial(self._watch_first, process, address, bytes.fromhex(secret))
        threading.Thread(target=watch, daemon=True).start()

    def let_go(self) -> None:
        """Waits until all processes have come so far; from here on they may end."""
        self._leaving = True
        jax.distributed.shutdown()

    def _watch_all(self, listener: Listener, count: int) -> None:
        others: dict[Any, int] = {}
        while len(others) < count - 1:
            try:
                connection = listener.accept()
                others[connection] = int(connection.recv_bytes())
            except (OSError, EOFError, AuthenticationError, ValueError):  # of a stranger
                continue
        gone = others[wait(others)[0]]  # they never send anything
        if not self._leaving:
            for connection in others:
                with contextlib.suppress(OSError):
                    connection.send_bytes(str(gone).encode())
            self._lost(gone)

    def _watch_first(self, process: int, address: tuple[str, int], token: bytes) -> None:
        try:
            connection = Client(address, authkey=token)
            connection.send_bytes(str(process).encode())
        except (OSError, EOFError, AuthenticationError, ValueError) as error:
            log.warning(
                "process %d has no connection to process 0 (%s); should another die, it will be "
                "noticed only after %d s.",
                process,
                error,
                HEARTBEAT_SECONDS,
            )
            return
        try:
            gone = int(connection.recv_bytes())
        except (OSError, EOFError):
            gone = 0
        if not self._leaving:
            self._lost(gone)

    def _lost(self, process: int) -> None:
        _end(
            f"error: process {process} of this run is gone, and none can go on without it; start "
            "all of them again with the same commands, and they go on from the last checkpoint."
        )


def _nobody_came(arguments: dict[str, Any]) -> None:
    address = arguments.get("coordinator_address")
    where = f"at {address} " if address else ""
    _end(
        f"error: the processes have not all come together {where}within {CONNECT_SECONDS} s; "
        "start all of them with the same coordinator and number, and see that nothing stands "
        "between their hosts, such as a firewall."
    )


@contextmanager
def nobody_left_waiting() -> Iterator[None]:
    """Ends a process that fails alone at once, for any cleaning up would wait for the others.

    They wait for this one in turn, and would until their time is over. Errors that all processes
    have agreed upon pass, as does everything where a process is on its own.
    """
    try:
        yield
    except AGREED:
        raise
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        if isinstance(error, KeyboardInterrupt):
            _end("Stopped; nothing saved is lost.", EXIT_CTRL_C)
        time.sleep(_NEWS_SECONDS)
        traceback.print_exc()
        _end("This process ends here, and with it the others.", code=1)


def _end(message: str, code: int = EXIT_LOST) -> NoReturn:
    """Ends the process while other threads, in vain, wait for other processes."""
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


@contextmanager
def alone() -> Iterator[None]:
    """Ends this process at once on an error that no other has met, for they wait for it.

    For what each process does for itself while all compute together; where a process is on its own
    the error passes.
    """
    try:
        yield
    except (InputError, SaveFailed) as error:
        if jax.process_count() == 1:
            raise
        _end(f"error: {error}", error.exit_code)


@contextmanager
def together() -> Iterator[None]:
    """Lets no process go on if any has met one of `TOLD` inside: then each of them raises it.

    Every process must come here, and inside may do what only one of them does.

    Raises:
        InputError: As the first process that has met an error, with which it was.
        SaveFailed: Likewise.
    """
    if jax.process_count() == 1:
        yield
        return
    said = ""
    try:
        yield
    except tuple(TOLD.values()) as error:
        said = f"{type(error).__name__} {error}"
    for process, kind_and_message in enumerate(_tell_all(said)):
        if kind_and_message:
            kind, _, message = kind_and_message.partition(" ")
            raise TOLD[kind](message if process == 0 else f"process {process}: {message}")


def same_everywhere(value: Any, what: str) -> None:
    """Makes sure, inside no `together`, that every process has the same JSON value.

    Raises:
        InputError: Says that `what` differs, and in which process.
    """
    if jax.process_count() == 1:
        return
    content = json.dumps(value, sort_keys=True).encode()
    first, *others = _tell_all(hashlib.sha256(content).hexdigest())
    for process, other in enumerate(others, 1):
        if other != first:
            raise InputError(f"{what} of process {process} is not that of process 0; it must be.")


def _tell_all(text: str) -> list[str]:
    """Returns the text of every process, in their order; long ones are cut."""
    content = text.encode()[:_LONGEST_MESSAGE].ljust(_LONGEST_MESSAGE, b"\0")
    gathered = multihost_utils.process_allgather(np.frombuffer(content, np.uint8))
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in gathered]


class Agreement:
    """What any process wishes for, made known to all of them at the same call.

    One's own wishes are sent behind the work that the devices have been given before, and are
    answered at the call after: so no device and no process waits for another on their account.
    """

    def __init__(self, mesh: Mesh) -> None:
        """Prepares to agree among the processes whose devices `mesh` has."""
        self._sharding = sharding.split(mesh)
        self._rows = mesh.size
        # As integers, which every collective can take the maximum of.
        self._any = jax.jit(
            lambda wishes: wishes.max(axis=0), out_shardings=sharding.replicated(mesh)
        )
        self._sent: jax.Array | None = None

    def __call__(self, *wishes: bool) -> tuple[bool, ...]:
        """Says whether any process has wished for each, one call ago if there are many.

        Args:
            wishes: As many at every call, which all processes make after the same steps.
        """
        if jax.process_count() == 1:
            return wishes
        answered, self._sent = self._sent, self._any(self._spread(wishes))
        if answered is None:
            return (False,) * len(wishes)
        return tuple(bool(wish) for wish in np.asarray(answered))

    def forget(self) -> None:
        """Drops the wishes not yet answered, as when they have just been fulfilled."""
        self._sent = None

    def _spread(self, wishes: tuple[bool, ...]) -> jax.Array:
        rows = np.broadcast_to(np.array(wishes, np.int32), (self._rows, len(wishes)))
        return sharding.place(rows, self._sharding)
