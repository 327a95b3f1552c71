"""Train in several processes on one machine, to try what a cluster would do.

What follows -- are the flags of `alexnet-jax train`. On a machine with GPUs each process gets its
own; elsewhere CPU devices, of which there may be more than cores. Ctrl-C and SIGTERM go to all
processes. If one fails, the others get some seconds to end by themselves.

Example:
  python scripts/launch_local.py 2 -- --config=digits --workdir=runs/digits_2
"""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from alexnet_jax.cli import common
from alexnet_jax.environment import visible_gpus
from alexnet_jax.errors import EXIT_INTERRUPTED, InputError, shell_code

# A process notices at once that another is gone, by its connections; this is beyond that.
GRACE_SECONDS = 15.0


@common.entry_point
def main(arguments: Sequence[str]) -> int:
    """Runs the program."""
    own, flags = common.split(arguments)
    parser = common.create_parser(
        "python scripts/launch_local.py",
        __doc__,
        success="all processes have finished",
        other=", or that of the first process to fail, such as 75, interrupted and saved",
        usage="%(prog)s [-h] [--devices_per_process K] N -- [FLAG ...]",
    )
    parser.add_argument("processes", type=int, metavar="N", help="how many processes")
    help = "devices of each process (default: 1)"
    parser.add_argument("--devices_per_process", type=int, default=1, metavar="K", help=help)
    options = parser.parse_args(own)
    count, devices = options.processes, options.devices_per_process
    if count < 1 or devices < 1:
        raise InputError(
            f"{count} processes with {devices} devices are impossible; give at least 1 of each."
        )
    common.check_flags(flags, ("coordinator", "num_processes", "process_id"), "launch_local")
    variables = [device_variables(p, count, devices, os.environ) for p in range(count)]
    address = f"127.0.0.1:{free_port()}"
    commands = [
        [
            *(sys.executable, "-m", "alexnet_jax.main", *flags),
            *(f"--coordinator={address}", f"--num_processes={count}", f"--process_id={process}"),
        ]
        for process in range(count)
    ]
    code = launch(commands, variables)
    if code == EXIT_INTERRUPTED:  # all do so together
        again = shlex.join(["python", "scripts/launch_local.py", *own, "--", *flags])
        print(f"To go on with all processes:\n  {again}", file=sys.stderr)
    return code


def free_port() -> int:
    """Returns a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def device_variables(
    process: int, count: int, devices: int, environment: Mapping[str, str]
) -> dict[str, str]:
    """Returns the variables that give one of `count` processes its own devices.

    Raises:
        InputError: There are GPUs, but too few.
    """
    found = visible_gpus(environment)
    if not found:
        return {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    if len(found) < count * devices:
        raise InputError(
            f"{count} processes with {devices} GPUs each need {count * devices}, and there are "
            f"{len(found)}; give fewer, or JAX_PLATFORMS=cpu to try it without GPUs."
        )
    own = found[process * devices : (process + 1) * devices]
    return {"CUDA_VISIBLE_DEVICES": ",".join(own)}


def launch(commands: Sequence[Sequence[str]], variables: Sequence[Mapping[str, str]]) -> int:
    """Runs all commands at once; the first has the terminal, and the others' lines a number.

    Args:
        commands: With their arguments, one for each process.
        variables: Of their environments, beside those of this process.

    Returns:
        The exit code of the process that was the first to fail, or 0; as a shell does, 128 + the
        number of the signal that killed it.
    """
    started: list[subprocess.Popen[Any]] = []
    readers = []
    with _passing_signals_to(started):
        try:
            for number, (command, own) in enumerate(zip(commands, variables, strict=True)):
                pipe = None if number == 0 else subprocess.PIPE
                process = subprocess.Popen(
                    command,
                    env={**os.environ, **own},
                    stdin=subprocess.DEVNULL,
                    stdout=pipe,
                    stderr=pipe and subprocess.STDOUT,
                    start_new_session=True,  # else a terminal's Ctrl-C would reach them twice
                )
                started.append(process)
                if process.stdout:
                    readers.append(_repeat(number, process.stdout))
            return _wait(started)
        finally:
            for process in started:
                process.kill()  # does nothing to those that have ended
            for reader in readers:
                reader.join()


def _wait(started: Sequence[subprocess.Popen[Any]]) -> int:
    """Waits for all; returns the first exit code that is not 0."""
    first = 0
    deadline = float("inf")
    while any(process.poll() is None for process in started):
        codes = [process.poll() or 0 for process in started]
        if not first and any(codes):
            number, code = next((n, c) for n, c in enumerate(codes) if c)
            first = shell_code(code)
            deadline = time.monotonic() + GRACE_SECONDS
            if code < 0:
                _say(f"process {number} was killed by {signal.Signals(-code).name}.")
            elif code != EXIT_INTERRUPTED:
                _say(f"process {number} ended with exit code {code}.")
        if time.monotonic() > deadline:
            for number, process in enumerate(started):
                if process.poll() is None:
                    _say(f"process {number} still runs {GRACE_SECONDS:.0f} s later; killing it.")
                    process.kill()
            deadline = float("inf")
        time.sleep(0.05)
    if first:
        return first
    return shell_code(next((p.returncode for p in started if p.returncode), 0))


def _say(message: str) -> None:
    print(f"launch_local: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _passing_signals_to(started: Sequence[subprocess.Popen[Any]]) -> Iterator[None]:
    def pass_on(number: int, frame: object) -> None:
        for process in started:
            process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    old = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _repeat(number: int, output: IO[bytes]) -> threading.Thread:
    """Copies the lines of a process to standard error, each with its number before it."""

    def copy() -> None:
        with output:
            for line in output:
                if not line.startswith(b"[Gloo]"):  # XLA counts its connections
                    print(f"[{number}] {line.decode(errors='replace').rstrip()}", file=sys.stderr)

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    return thread


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
