"""Ends a process whose devices would wait forever for another one, which no exception reaches."""

import contextlib
import logging
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Listener, wait
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from alexnet_jax.errors import AGREED, EXIT_CTRL_C, EXIT_LOST

log = logging.getLogger(__name__)

# Seconds without a heartbeat until JAX takes a process for dead and ends the others by SIGABRT. A
# killed one is noticed at once, by its closed connection; this is for hosts that vanish.
HEARTBEAT_SECONDS = 30
# Seconds for the news of a lost process to overtake the errors that it causes.
_NEWS_SECONDS = 2.0
_ADDRESS_BYTES = 512
_CONNECTION_ERRORS = (OSError, EOFError, AuthenticationError, ValueError)


@contextmanager
def lifeline(host: str = "") -> Iterator[None]:
    """Connects process 0 and the others; when a connection breaks, all processes end.

    At its end each process waits for the others, and may exit from then on. Where processes cannot
    be connected, JAX's heartbeats remain.

    Args:
        host: Where the others reach process 0; "" for them to try what it calls itself.
    """
    released = threading.Event()
    with exit_on_error():
        if jax.process_count() > 1:
            arguments = (*_exchange_address(host), released)
            threading.Thread(target=_watch, args=arguments, daemon=True).start()
    try:
        with exit_on_error():
            yield
    finally:
        released.set()
        jax.distributed.shutdown()


def _exchange_address(host: str) -> tuple[Listener | None, list[str]]:
    """Returns what process 0 listens with, and on all processes its key, port and hosts."""
    text, listener = "", None
    if jax.process_index() == 0:
        key = secrets.token_bytes(16)
        listener = Listener(("", 0), backlog=jax.process_count(), authkey=key)
        hosts = [host or socket.gethostname()]
        with contextlib.suppress(OSError):  # a name without an address
            hosts.append(socket.gethostbyname(hosts[0]))
        text = " ".join([key.hex(), str(listener.address[1]), *hosts])
    padded = np.frombuffer(text.encode().ljust(_ADDRESS_BYTES), np.uint8)
    return listener, bytes(multihost_utils.broadcast_one_to_all(padded)).decode().split()


def _watch(listener: Listener | None, address: list[str], released: threading.Event) -> None:
    connections = _accept(listener) if listener else _connect(*address)
    if not connections:
        return
    broken: Any = wait(connections)[0]
    lost = connections[broken]
    with contextlib.suppress(OSError, EOFError):
        lost = int(broken.recv_bytes())  # process 0 says which one is gone before it ends, too
    if released.is_set():
        return
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.send_bytes(str(lost).encode())
    exit_now(
        f"error: process {lost} of this run is gone, and none can continue without it; rerun all "
        "of them with the same commands to resume from the last checkpoint."
    )


def _accept(listener: Listener) -> dict[Any, int]:
    """Returns the connections of process 0, with the index of the process at the other end."""
    connections: dict[Any, int] = {}
    while len(connections) < jax.process_count() - 1:
        with contextlib.suppress(*_CONNECTION_ERRORS):
            connection = listener.accept()
            connections[connection] = int(connection.recv_bytes())
    return connections


def _connect(key: str, port: str, *hosts: str) -> dict[Any, int]:
    for host in hosts:
        try:
            connection = Client((host, int(port)), authkey=bytes.fromhex(key))
            connection.send_bytes(str(jax.process_index()).encode())
            return {connection: 0}
        except _CONNECTION_ERRORS as error:
            reason = error
    log.warning(
        "Cannot connect to process 0 (%s); if a process dies, this one notices after %d s.",
        reason,
        HEARTBEAT_SECONDS,
    )
    return {}


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Ends a process that fails alone at once: the others wait for it, and its cleanup for them.

    Errors that all processes raise together (`AGREED`) pass, and with a single process all do.
    """
    try:
        yield
    except AGREED:
        raise
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        if isinstance(error, KeyboardInterrupt):
            exit_now("Stopped; nothing saved is lost.", EXIT_CTRL_C)
        time.sleep(_NEWS_SECONDS)
        traceback.print_exc()
        exit_now("This process ends here, and with it the others.", code=1)


def exit_now(message: str, code: int = EXIT_LOST) -> NoReturn:
    """Ends the process although other threads wait, in vain, for other processes."""
    with contextlib.suppress(OSError):  # nobody reads it
        print(message, file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(code)
