"""Keeps the terminal of a program free of messages that say nothing to its user."""

import functools
import logging
import sys
import warnings


@functools.cache
def silence_orbax() -> None:
    """Hides what Orbax prints; the library raises, or logs in one line, what matters of it.

    Where one array of a checkpoint fails, Orbax abandons the others, whose errors are printed with
    tracebacks: by asyncio, by threads whose event loop is closed, and by coroutines when they are
    collected. Hiding them changes hooks of the whole process, so it is for programs only.
    """
    import absl.logging  # takes a tenth of a second, which --help does without

    # Not `getLogger("absl")`, which makes a logger of the wrong class before absl is imported.
    absl.logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
    logging.getLogger("asyncio").addFilter(
        lambda record: "exception was never retrieved" not in record.getMessage()
    )
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    excepthook, unraisablehook = sys.excepthook, sys.unraisablehook

    def abandoned(error: BaseException | None) -> bool:
        return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"

    def show(kind, error, trace):  # type: ignore[no-untyped-def]  # as sys.excepthook
        if not abandoned(error):
            excepthook(kind, error, trace)

    def show_unraisable(args: "sys.UnraisableHookArgs") -> None:
        code = getattr(args.object, "cr_code", None)  # of a coroutine
        if not abandoned(args.exc_value) and "orbax" not in getattr(code, "co_filename", ""):
            unraisablehook(args)

    sys.excepthook, sys.unraisablehook = show, show_unraisable
