"""Answers command lines, for tests that have too many of them to start a program for each.

An import takes seconds, and absl's flags can be parsed only once in a process: each line is
answered by a fork of a process that has imported everything, so a crash or a hang of one is seen
as what it is. Only `train.run` is replaced.
"""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import types
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST_SECONDS = 100


@contextmanager
def answering(folder, config_files, check):
    """Opens what answers a command line, a list, with exit code, standard output and error.

    Args:
        folder: Empty; where they run. The configs are put there, and nothing else may be.
        config_files: Text by name, put there, too.
        check: "module.function", called with the config of each line that asks for a run; the
            options that it was given are printed then, as JSON.
    """
    shutil.copytree(ROOT / "configs", folder / "configs")
    for name, text in config_files.items():
        (folder / name).write_text(text)
    files = _files(folder)
    with subprocess.Popen(
        [sys.executable, "-c", f"import forking; forking.serve({check!r})"],
        cwd=folder,
        env={
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests/cli'}:{folder}",
            "JAX_PLATFORMS": "cpu",
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:

        def ask(arguments):
            server.stdin.write(json.dumps(arguments) + "\n")
            server.stdin.flush()
            return json.loads(server.stdout.readline())

        yield ask
        server.stdin.close()
    assert _files(folder) == files, "a command line left something on disk"


def _files(folder):
    return sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts)


def serve(check):
    """Answers each line of standard input with a line of standard output, both JSON."""
    # What `run` imports when it is called: once here, not in each fork.
    from alexnet_jax import config, environment, main  # noqa: F401
    from alexnet_jax.cli import command_line  # noqa: F401
    from alexnet_jax.distributed import initialize  # noqa: F401
    from alexnet_jax.run import writers  # noqa: F401

    module, function = check.rsplit(".", 1)
    check = getattr(importlib.import_module(module), function)

    def only_check(options, workdir, *, notes):
        check(options)
        print(json.dumps({"workdir": str(workdir), **dict(config.flatten(options))}))

    sys.modules["alexnet_jax.train"] = types.SimpleNamespace(run=only_check)
    for line in sys.stdin:
        print(json.dumps(_in_a_fork(main.run, json.loads(line))), flush=True)


def _in_a_fork(run, arguments):
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            signal.alarm(MOST_SECONDS)
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.argv = ["main.py", *arguments]
            code = 0
            try:
                code = run()
            except SystemExit as stop:
                code = stop.code or 0
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
        return code, *texts
