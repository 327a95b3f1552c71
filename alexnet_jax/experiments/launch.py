"""Training runs in child processes."""

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any


def train(
    arguments: Sequence[str],
    should_stop: Callable[[], bool],
    *,
    poll_seconds: float = 0.2,
    **options: Any,
) -> int:
    """Trains in a child process and waits for its end.

    The child is asked by SIGTERM, once, to save and exit: as soon as `should_stop()` is true, or
    where an exception ends the waiting, such as of a second Ctrl-C.

    Args:
        arguments: The command line of `alexnet_jax.main`.
        should_stop: Called every `poll_seconds`.
        poll_seconds: At least so long is waited between two calls.
        options: For `subprocess.Popen`.

    Returns:
        The child's exit code, negative where a signal killed it.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "alexnet_jax.main", *arguments],
        start_new_session=True,  # else Ctrl-C would reach it twice, and the second one kills it
        **options,
    )
    stopping = False
    try:
        while True:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=poll_seconds)
            if not stopping and should_stop():
                stopping = True
                process.send_signal(signal.SIGTERM)
    finally:
        if not stopping and process.poll() is None:
            process.send_signal(signal.SIGTERM)
