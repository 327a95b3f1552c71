"""Trains a network: ``python -m alexnet_jax.main --config=configs/cifar10.py``.

The same command goes on where an interrupted run stopped. Exit codes: 0 finished, 2 bad input,
3 the loss diverged, 69 another process of the run is gone, 74 the end could not be saved,
75 interrupted and saved.
"""

import logging
import shlex
import sys
from typing import NoReturn

from alexnet_jax import command_line, processes, runtime, writers
from alexnet_jax.errors import Diverged, InputError, Interrupted, SaveFailed

EXIT_BAD_INPUT = 2
EXIT_DIVERGED = 3
EXIT_NOT_SAVED = 74  # EX_IOERR of sysexits.h
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: try again


def run() -> None:
    """Runs what the command line asks for; leaves by SystemExit unless all is well."""
    again = shlex.join(["python", "-m", "alexnet_jax.main", *sys.argv[1:]])
    process = 0
    try:
        config, workdir, flags = command_line.parse(sys.argv)
        writers.log_to_terminal()
        notes = runtime.prepare()
        with processes.joined(flags) as process:
            if process:  # the first speaks for all
                writers.log_to_terminal(level=logging.WARNING)
            from alexnet_jax.train import train_and_evaluate  # only now: mistakes fail at once

            train_and_evaluate(config, workdir, notes)
    except InputError as error:
        _leave(f"error: {error}", EXIT_BAD_INPUT, process)
    except Diverged as error:
        _leave(f"error: {error}", EXIT_DIVERGED, process)
    except SaveFailed as error:
        _leave(f"error: {error}", EXIT_NOT_SAVED, process)
    except Interrupted as stop:
        message = f"Saved at step {stop.step:,}. To go on:\n  {again}"
        if flags.num_processes is not None:
            message += "\nand the other processes likewise, each with its own --process_id."
        _leave(message, EXIT_INTERRUPTED, process)
    except KeyboardInterrupt:
        _leave(
            f"\nStopped; nothing saved is lost. To go on:\n  {again}",
            processes.EXIT_CTRL_C,
            process,
        )


def _leave(message: str, code: int, process: int) -> NoReturn:
    if process == 0:  # the others have the same to say
        print(message, file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    run()
