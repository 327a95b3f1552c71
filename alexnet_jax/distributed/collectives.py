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

# The errors that `fail_together` tells the other processes of.
_TOLD = {"InputError": InputError, "SaveFailed": SaveFailed}
_MESSAGE_BYTES = 2000


@contextmanager
def fail_alone() -> Iterator[None]:
    """Ends this process at once on an error that only it has met, since the others wait for it.

    For what each process does by itself while all train. With a single process the error passes.
    """
    try:
        yield
    except (InputError, SaveFailed) as error:
        if jax.process_count() == 1:
            raise
        watchdog.exit_now(f"error: {error}", error.exit_code)


@contextmanager
def fail_together() -> Iterator[None]:
    """Raises in every process the first InputError or SaveFailed that any process met inside.

    Every process must enter it; inside may be what only one of them does.
    """
    if jax.process_count() == 1:
        yield
        return
    error_text = ""
    try:
        yield
    except tuple(_TOLD.values()) as error:
        error_text = f"{type(error).__name__} {error}"
    for process, text in enumerate(_gather(error_text)):
        if text:
            kind, _, message = text.partition(" ")
            raise _TOLD[kind](message if process == 0 else f"process {process}: {message}")


def check_equal(value: Any, what: str) -> None:
    """Checks, outside of `fail_together`, that all processes have the same JSON value.

    Raises:
        InputError: Names `what` differs, and in which process.
    """
    if jax.process_count() == 1:
        return
    content = json.dumps(value, sort_keys=True).encode()
    first, *others = _gather(hashlib.sha256(content).hexdigest())
    for process, other in enumerate(others, 1):
        if other != first:
            raise InputError(
                f"{what} of process {process} differs from that of process 0; "
                "it must be the same in all processes."
            )


def _gather(text: str) -> list[str]:
    """Returns the texts of all processes, in their order; long ones are cut."""
    content = text.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
    gathered = multihost_utils.process_allgather(np.frombuffer(content, np.uint8))
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in gathered]


class AnyProcess:
    """Tells all processes, at the same call, what any of them wishes for.

    Wishes are sent behind the work that the devices already have, and answered at the next call:
    so no device and no process waits for another on their account.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._sharding = sharding.split(mesh)
        self._rows = mesh.size
        # As integers, which every collective can take the maximum of.
        self._any = jax.jit(lambda x: x.max(axis=0), out_shardings=sharding.replicated(mesh))
        self._sent: jax.Array | None = None

    def __call__(self, *wishes: bool) -> tuple[bool, ...]:
        """Returns for each wish whether any process had it: one call ago if there are many.

        Args:
            wishes: As many at every call, which all processes make after the same steps.
        """
        if jax.process_count() == 1:
            return wishes
        rows = np.broadcast_to(np.array(wishes, np.int32), (self._rows, len(wishes)))
        answered, self._sent = self._sent, self._any(sharding.place(rows, self._sharding))
        if answered is None:
            return (False,) * len(wishes)
        return tuple(bool(wish) for wish in np.asarray(answered))

    def forget(self) -> None:
        """Drops the wishes not yet answered, as when they have just been fulfilled."""
        self._sent = None
