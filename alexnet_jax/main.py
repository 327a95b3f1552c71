"""Trains a network: ``python -m alexnet_jax.main --config=configs/cifar10.py``.

The same command goes on where an interrupted run stopped. Exit codes: 0 finished, 2 bad input,
3 the loss diverged, 75 interrupted and saved.
"""

import shlex
import sys
from typing import NoReturn

from alexnet_jax import command_line, writers
from alexnet_jax.errors import Diverged, InputError, Interrupted

EXIT_BAD_INPUT = 2
EXIT_DIVERGED = 3
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: try again
EXIT_CTRL_C = 130  # as a shell reports it


def run() -> None:
    """Runs what the command line asks for; leaves by SystemExit unless all is well."""
    again = shlex.join(["python", "-m", "alexnet_jax.main", *sys.argv[1:]])
    try:
        config, workdir = command_line.parse(sys.argv)
        writers.log_to_terminal()
        from alexnet_jax.train import train_and_evaluate  # only now: a wrong option fails at once

        train_and_evaluate(config, workdir)
    except InputError as error:
        _leave(f"error: {error}", EXIT_BAD_INPUT)
    except Diverged as error:
        _leave(f"error: {error}", EXIT_DIVERGED)
    except Interrupted as stop:
        _leave(f"Saved at step {stop.step:,}. To go on:\n  {again}", EXIT_INTERRUPTED)
    except KeyboardInterrupt:
        _leave(f"\nStopped; nothing saved is lost. To go on:\n  {again}", EXIT_CTRL_C)


def _leave(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    run()
