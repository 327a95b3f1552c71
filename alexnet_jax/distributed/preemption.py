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
        yield lambda: False  # only the main thread gets signals
        return
    requested = threading.Event()
    old: dict[int, Any] = {}

    def on_signal(number: int, frame: Any) -> None:
        requested.set()  # first of all, for whatever telling it may meet
        restore()
        log.info("%s: saving; once more to stop at once.", signal.Signals(number).name)

    def restore() -> None:
        for each, handler in old.items():
            signal.signal(each, handler)

    for each in (signal.SIGINT, signal.SIGTERM):
        old[each] = signal.signal(each, on_signal)
    try:
        yield requested.is_set
    finally:
        restore()
