"""The run folder: everything that a run leaves, and all that a program needs to use it.

``config.json``, ``dataset.json``, ``metrics.jsonl``, ``results.json``, ``log.txt``,
``checkpoints/``, TensorBoard events and figures.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from alexnet_jax.config import FREE_KEYS, flatten
from alexnet_jax.errors import InputError

CONFIG = "config.json"
DATASET = "dataset.json"
METRICS = "metrics.jsonl"
RESULTS = "results.json"

SHARED_SECONDS = 20.0  # until a network file system shows what another host has written


def write_json(path: Path, value: Any) -> None:
    """Writes a file whole or not at all, whenever the process is killed."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """Reads a file of the run folder; None if it is not there.

    Raises:
        InputError: It is there and is no JSON object.
    """
    try:
        value = json.loads(path.read_text())
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
        return value
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is damaged ({error}); put back a copy, or use another --workdir."
        ) from None


def open_run_folder(workdir: Path, config: ConfigDict) -> Path:
    """Makes the folder of a new run, or makes sure that this config may go on in an old one.

    Args:
        workdir: The folder.
        config: Checked against the one that began the run; only `config.FREE_KEYS` may differ.

    Returns:
        The absolute path of the folder, which holds ``config.json``.

    Raises:
        InputError: It is a file, cannot be written, holds something else, or another run.
    """
    try:
        folder = workdir.expanduser().absolute()
        if folder.exists() and not folder.is_dir():
            raise InputError(f"--workdir={workdir} is a file; name a folder.")
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except (OSError, RuntimeError) as error:  # RuntimeError: ~name of nobody
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"--workdir={workdir} cannot be written ({reason}); name a folder that can."
        ) from None
    before = read_json(folder / CONFIG)
    now = _options(config)
    if before is None and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise InputError(
            f"--workdir={workdir} holds files but no {CONFIG}, so it is no run folder; "
            "name an empty or a new one."
        )
    if before is None or not (folder / METRICS).exists():
        # New, or begun and ended by a mistake before the first step: free to be another run.
        write_json(folder / CONFIG, now)
        return folder
    differing = [
        f"{key} was {before.get(key, 'absent')!r} and is {now.get(key, 'absent')!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in FREE_KEYS
    ]
    if differing:
        raise InputError(
            f"{folder} holds a run with another config: {'; '.join(differing)}. Give the old "
            "values to go on with it, or another --workdir to start anew."
        )
    return folder


def fixed_options(config: ConfigDict) -> dict[str, Any]:
    """Returns, as JSON has them, the options that all sessions and processes of a run share."""
    return {key: value for key, value in _options(config).items() if key not in FREE_KEYS}


def check_shared(folder: Path) -> None:
    """Makes sure that a process sees the folder which another one has opened.

    Raises:
        InputError: It does not, even after a while.
    """
    deadline = time.monotonic() + SHARED_SECONDS
    while not (folder / CONFIG).exists():
        if time.monotonic() > deadline:
            raise InputError(
                f"{folder} is not what the first process has opened; with many processes, "
                "--workdir must name a folder on a file system that all of their hosts share."
            )
        time.sleep(0.1)


def _options(config: ConfigDict) -> dict[str, Any]:
    # Through JSON, so that what is read from a file can be compared: it has lists for tuples.
    return json.loads(json.dumps(dict(flatten(config))))
