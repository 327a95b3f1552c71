"""Trains a network: ``python -m alexnet_jax.main --config=configs/cifar10.py``.

The same command goes on where an interrupted run stopped; --help lists options and exit codes.
"""

import logging
import shlex
import sys
from collections.abc import Sequence

from alexnet_jax.cli import common
from alexnet_jax.cli.quiet import silence_orbax
from alexnet_jax.errors import EXIT_CTRL_C, Diverged, InputError, Interrupted, SaveFailed


@common.entry_point
def run(arguments: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for, and returns the exit code."""
    program = "alexnet-jax train" if arguments is not None else "python -m alexnet_jax.main"
    given = list(sys.argv[1:] if arguments is None else arguments)
    again = shlex.join([*program.split(), *given])
    process = 0  # the first speaks for all
    try:
        # Imports take seconds: here Ctrl-C ends them as it ends the rest.
        from alexnet_jax.cli import command_line

        config, workdir, flags = command_line.parse([program, *given])

        from alexnet_jax import environment
        from alexnet_jax.distributed import initialize
        from alexnet_jax.run import writers

        writers.log_to_terminal()
        # absl lets every library talk at INFO, such as JAX of the backends that it did not find.
        logging.getLogger("jax").setLevel(logging.WARNING)
        notes = environment.prepare()
        silence_orbax()
        with initialize.initialized(flags) as process:
            if process:
                writers.log_to_terminal(level=logging.WARNING)
            from alexnet_jax import train  # only now: mistakes fail at once

            train.run(config, workdir, notes=notes)
    except (InputError, Diverged, SaveFailed) as error:
        if process:
            return error.exit_code
        raise
    except Interrupted as stop:
        if not process:
            others = "\nand the other processes likewise, each with its own --process_id."
            common.say(
                f"Saved at step {stop.step:,}. To go on:\n  {again}"
                f"{others if flags.num_processes is not None else ''}"
            )
        return stop.exit_code
    except KeyboardInterrupt:
        common.say(f"\nStopped; nothing saved is lost. To go on:\n  {again}")
        return EXIT_CTRL_C
    return 0


if __name__ == "__main__":
    sys.exit(run())
