"""Ctrl-C and SIGTERM as a request that a loop answers when it is ready to."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger(__name__)


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turns the first SIGINT or SIGTERM into a request to stop; a second one ends the process."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread receives signals
        return
    requested = threading.Event()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def on_signal(number: int, frame: Any) -> None:
        requested.set()  # first, whatever happens to the message
        restore()
        name = signal.Signals(number).name
        log.info("Received %s: saving a checkpoint. Send it again to exit immediately.", name)

    for number in handlers:
        signal.signal(number, on_signal)
    try:
        yield requested.is_set
    finally:
        restore()
