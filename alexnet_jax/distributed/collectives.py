"""What the processes of a run agree on: errors, equal values, wishes. Free with a single one."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from alexnet_jax.distributed import sharding, watchdog
from alexnet_jax.errors import InputError, SaveFailed

_ERRORS = {"InputError": InputError, "SaveFailed": SaveFailed}
_MESSAGE_BYTES = 2000


@contextmanager
def fail_alone() -> Iterator[None]:
    """Ends this process at once on an error that the others, which wait for it, have not met.

    With a single process the error passes.
    """
    try:
        yield
    except (InputError, SaveFailed) as error:
        if jax.process_count() == 1:
            raise
        watchdog.exit_now(f"error: {error}", error.exit_code)


@contextmanager
def fail_together() -> Iterator[None]:
    """Raises in all processes the first InputError or SaveFailed that any of them met inside."""
    if jax.process_count() == 1:
        yield
        return
    own = ""
    try:
        yield
    except (InputError, SaveFailed) as error:
        own = f"{type(error).__name__} {error}"
    for process, text in enumerate(_gather(own)):
        if text:
            kind, _, message = text.partition(" ")
            raise _ERRORS[kind](message if process == 0 else f"process {process}: {message}")


def check_equal(value: Any, what: str) -> None:
    """Raises an InputError unless all processes have the same JSON value; `what` names it."""
    content = json.dumps(value, sort_keys=True).encode()
    digest = np.frombuffer(hashlib.sha256(content).digest(), np.uint8)
    with fail_together():
        if (digest != multihost_utils.broadcast_one_to_all(digest)).any():
            raise InputError(f"{what} differs from that of process 0; it must be the same.")


def _gather(text: str) -> list[str]:
    """Returns the texts of all processes, in their order; long ones are cut."""
    content = text.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
    gathered = multihost_utils.process_allgather(np.frombuffer(content, np.uint8))
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in gathered]


class AnyProcess:
    """Tells all processes at the same call whether any of them wishes something.

    Wishes are queued behind the work of the devices and answered at the next call, so that no
    device and no process waits for another one.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._sharding = sharding.split(mesh)
        self._rows = mesh.size
        # As integers, which every collective can take the maximum of.
        self._any = jax.jit(lambda x: x.max(axis=0), out_shardings=sharding.replicated(mesh))
        self._sent: jax.Array | None = None

    def __call__(self, *wishes: bool) -> tuple[bool, ...]:
        """Returns for each wish whether any process had it, one call ago with many processes.

        All processes must call it after the same steps, with as many wishes every time.
        """
        if jax.process_count() == 1:
            return wishes
        rows = np.broadcast_to(np.array(wishes, np.int32), (self._rows, len(wishes)))
        answered, self._sent = self._sent, self._any(sharding.place(rows, self._sharding))
        if answered is None:
            return (False,) * len(wishes)
        return tuple(bool(wish) for wish in np.asarray(answered))

    def forget(self) -> None:
        """Drops the wishes that are not yet answered, after they have been fulfilled."""
        self._sent = None
