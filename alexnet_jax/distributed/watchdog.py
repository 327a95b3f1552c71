"""Ends a process whose devices would wait forever for another one, which no exception reaches."""

import contextlib
import functools
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

_NOT_ONE_OF_US = (OSError, EOFError, AuthenticationError, ValueError)


class Lifeline:
    """Connections between process 0 and the others; when one breaks, all processes end.

    Where they cannot be made, JAX's heartbeats remain.
    """

    def __init__(self, host: str = "") -> None:
        """Connects all processes and starts to watch, in a thread.

        Args:
            host: Where the others reach process 0; "" for them to try what it calls itself.
        """
        self._released = False
        if jax.process_count() == 1:
            return
        listener, content = None, b""
        if jax.process_index() == 0:
            token = secrets.token_bytes(16)
            listener = Listener(("", 0), backlog=jax.process_count(), authkey=token)
            hosts = [host] if host else _own_hosts()
            content = " ".join([token.hex(), str(listener.address[1]), *hosts]).encode()
        padded = np.frombuffer(content.ljust(_ADDRESS_BYTES), np.uint8)
        told = bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))).decode()
        secret, port, *hosts = told.split()
        watch = (
            functools.partial(self._watch_others, listener, jax.process_count())
            if listener
            else functools.partial(self._watch_first, hosts, int(port), bytes.fromhex(secret))
        )
        threading.Thread(target=watch, daemon=True).start()

    def release(self) -> None:
        """Waits until all processes come to this point; from then on each may end."""
        self._released = True
        jax.distributed.shutdown()

    def _watch_others(self, listener: Listener, count: int) -> None:
        others: dict[Any, int] = {}
        while len(others) < count - 1:
            with contextlib.suppress(*_NOT_ONE_OF_US):
                connection = listener.accept()
                others[connection] = int(connection.recv_bytes())
        lost = others[wait(others)[0]]  # they never send anything
        if not self._released:
            for connection in others:
                with contextlib.suppress(OSError):
                    connection.send_bytes(str(lost).encode())
            _exit_without(lost)

    def _watch_first(self, hosts: list[str], port: int, token: bytes) -> None:
        for host in hosts:
            try:
                connection = Client((host, port), authkey=token)
                connection.send_bytes(str(jax.process_index()).encode())
                break
            except _NOT_ONE_OF_US as error:
                reason = error
        else:
            log.warning(
                "Process %d cannot connect to process 0 (%s); if another one dies, this will be "
                "noticed only after %d s.",
                jax.process_index(),
                reason,
                HEARTBEAT_SECONDS,
            )
            return
        try:
            lost = int(connection.recv_bytes())
        except (OSError, EOFError):
            lost = 0
        if not self._released:
            _exit_without(lost)


def _own_hosts() -> list[str]:
    """Returns this host's address and name; either may mean nothing, or itself, to another host."""
    name = socket.gethostname()
    with contextlib.suppress(OSError):
        return [name, socket.gethostbyname(name)]
    return [name]


def _exit_without(process: int) -> NoReturn:
    exit_now(
        f"error: process {process} of this run is gone, and none can continue without it; rerun "
        "all of them with the same commands to resume from the last checkpoint."
    )


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
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)
