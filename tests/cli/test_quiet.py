"""Programs hide what Orbax leaves behind; the library changes nothing of the process."""

import subprocess
import sys
import textwrap


def run(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )


def test_a_program_hides_closed_event_loops_and_no_other_error():
    """They may come after the checkpoints are closed; on a busy machine they do."""
    found = run("""
        import sys
        from alexnet_jax.cli.quiet import silence_orbax
        silence_orbax()
        sys.excepthook(RuntimeError, RuntimeError("Event loop is closed"), None)
        sys.excepthook(RuntimeError, RuntimeError("of another kind"), None)
    """)
    assert found.stderr == "RuntimeError: of another kind\n"


def test_the_library_leaves_hooks_loggers_and_warnings_as_they_are(tmp_path):
    found = run(
        """
        import logging, sys, warnings
        from pathlib import Path
        def of_the_process():
            loggers = [logging.getLogger(name) for name in ("", "absl", "asyncio", "jax")]
            found = [(x.level, list(x.handlers), list(x.filters)) for x in loggers]
            return sys.excepthook, sys.unraisablehook, list(warnings.filters), found
        import orbax.checkpoint  # which changes some of them itself
        before = of_the_process()
        import jax
        from alexnet_jax.checkpoint import initialize_from, manager
        from alexnet_jax.state import TrainState
        one = jax.numpy.int32(1)
        state = TrainState(one, {"x": one}, {}, (), {}, jax.random.key(0))
        checkpoints = manager.Checkpoints(Path(sys.argv[1]) / "checkpoints")
        checkpoints.save(state, {})
        checkpoints.finish()
        checkpoints.restore(lambda: state, one.sharding)
        checkpoints.close()
        for one, other in zip(before, of_the_process()):
            assert one == other, (one, other)
        """,
        tmp_path,
    )
    assert found.stderr == ""
