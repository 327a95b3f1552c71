"""The run folder: what a run leaves behind, who may write to it, and how to read it.

``config.json``, ``dataset.json``, ``environment.json``, ``model.txt``, ``metrics.jsonl``,
``results.json``, ``predictions.npz``, ``report.npz``, ``report.html``, ``curves.png``,
``figures/``, ``log.txt``, ``checkpoints/``, ``saved.json`` and TensorBoard events.
"""

import dataclasses
import errno
import fcntl
import json
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import jax
from ml_collections import ConfigDict

from alexnet_jax.config import RESUMABLE, Config, default_config, flatten, validate_options
from alexnet_jax.distributed import collectives
from alexnet_jax.errors import InputError
from alexnet_jax.run.files import read_json, remove_unfinished, write_json
from alexnet_jax.run.migrate import migrate
from alexnet_jax.run.writers import METRICS as METRICS
from alexnet_jax.run.writers import log_to_file

log = logging.getLogger(__name__)

CONFIG = "config.json"
DATASET = "dataset.json"
RESULTS = "results.json"
CHECKPOINTS = "checkpoints"
SAVED = "saved.json"
ENVIRONMENT = "environment.json"
MODEL = "model.txt"
PREDICTIONS = "predictions.npz"
REPORT_DATA = "report.npz"
REPORT = "report.html"
FIGURES = "figures"
LOCK = ".lock"

# What metrics and results are measured on, and with. Where a run has several of a split, the last
# one here counts most.
SPLITS = {
    f"{split}{tta}{ema}": f"{split}{tta_label}{ema_label}"
    for split in ("validation", "test")
    for tta, tta_label in (("", ""), ("_tta", ", several views"))
    for ema, ema_label in (("", ""), ("_ema", ", averaged weights"))
}

SHARED_SECONDS = 20.0  # until a network file system shows what another host has written
_STALE_SECONDS = 60  # no file of a run takes longer to write
# The errors of flock on file systems without locks, such as some network file systems.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

P = ParamSpec("P")


@dataclasses.dataclass
class RunDirectory:
    """The folder of a run, shared by the processes that train it.

    All processes call the methods alike. Only the first one writes; the others wait for it, and
    raise its InputError or SaveFailed.

    Attributes:
        path: Absolute.
        results: Content of ``results.json``; None if the run is not finished.
    """

    path: Path
    results: dict[str, Any] | None = None

    @classmethod
    @contextmanager
    def open(cls, workdir: str | Path, config: Config) -> Iterator["RunDirectory"]:
        """Creates the folder of a new run, or resumes an old one, and appends to its log.txt.

        No other run can open the folder until the context or the process ends.

        Args:
            workdir: The folder.
            config: All options but `config.RESUMABLE` must equal those that the run began with.

        Raises:
            InputError: The folder cannot be written, holds something else or another run, or is
                in use; or the config differs between the processes.
        """
        path = Path(workdir)
        with ExitStack() as stack:
            with collectives.fail_together():
                if jax.process_index() == 0:
                    path = _make(path)
                    stack.enter_context(lock(path))
                    remove_unfinished(path, _STALE_SECONDS)
                    _check_config(path, config)
                else:
                    path = path.expanduser().absolute()
            collectives.check_equal(fixed_options(config), "the config")
            with collectives.fail_together():
                check_shared(path)
                run = cls(path, read_json(path / RESULTS))
            if jax.process_index() == 0:
                stack.enter_context(log_to_file(path / "log.txt"))
            yield run

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / CHECKPOINTS

    def write(
        self, function: Callable[Concatenate[Path, P], None], *args: P.args, **options: P.kwargs
    ) -> None:
        """Calls `function(path, *args, **options)` on the first process."""
        with collectives.fail_together():
            if jax.process_index() == 0:
                function(self.path, *args, **options)

    def check_dataset(self, info: dict[str, Any]) -> None:
        """Writes ``dataset.json``, and rejects data other than those the run began with.

        Args:
            info: See `alexnet_jax.data.load.RunData`; its `checksums` tell data files apart.

        Raises:
            InputError: The data files have changed, or differ between the processes.
        """
        self.write(_check_dataset, info)
        collectives.check_equal(info, "the data set")

    def write_results(self, results: dict[str, Any]) -> None:
        """Writes ``results.json``, after which the run is finished."""

        def write(folder: Path) -> None:
            (folder / REPORT).unlink(missing_ok=True)  # of other results, from an earlier end
            write_json(folder / RESULTS, results)

        self.write(write)
        self.results = results


def _make(workdir: Path) -> Path:
    try:
        folder = workdir.expanduser().absolute()
        if folder.exists() and not folder.is_dir():
            raise InputError(f"--workdir={workdir} is a file; name a folder.")
        folder.mkdir(parents=True, exist_ok=True)
        files = [path for path in folder.iterdir() if not path.name.startswith(".")]
    except (OSError, RuntimeError) as error:  # RuntimeError: the home of an unknown user
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"--workdir={workdir} cannot be written ({reason}); name a folder that can."
        ) from None
    if files and not (folder / CONFIG).exists():
        raise InputError(
            f"--workdir={workdir} holds files but no {CONFIG}, so it is not a run folder; name an "
            "empty or a new one."
        )
    return folder


@contextmanager
def lock(folder: Path, what: str = "a run") -> Iterator[None]:
    """Keeps other processes out. The lock ends with this process, however that ends.

    Args:
        folder: Holds the lock's file.
        what: Is in progress in it, for the error message.

    Raises:
        InputError: Another process holds the lock, or the folder cannot be written.
    """
    try:
        opened = (folder / LOCK).open("a+")
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error.strerror}); name a folder that can."
        ) from None
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise InputError(
                f"{what} is in progress in {folder} ({holder}); wait for its end or stop it, or "
                "name another --workdir."
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            log.warning(
                "The file system of %s has no locks (%s); make sure that no other run uses it.",
                folder,
                error.strerror,
            )
        with suppress(OSError):  # the disk is full: the lock holds without a name in it
            file.truncate(0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


def in_use(folder: Path) -> bool:
    """Whether a process holds the `lock` of a folder."""
    try:
        with (folder / LOCK).open() as file:  # readable also where it cannot be written
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def has_begun(folder: Path) -> bool:
    """Whether the folder has metrics of training steps, or a checkpoint."""
    metrics = folder / METRICS
    return (metrics.exists() and metrics.stat().st_size > 0) or (folder / SAVED).exists()


def _check_config(folder: Path, config: Config) -> None:
    """Writes the config of a run, and rejects one that differs from that of a begun run."""
    before, now = read_options(folder), _options(config)
    if before is None or not has_begun(folder):  # it may have ended by a mistake in its config
        write_json(folder / CONFIG, now)
        return
    try:
        known = _options(default_config(before.get("model.name", "")))
    except InputError:  # a network that this version does not have
        known = before
    if gone := sorted(before.keys() - known.keys()):
        raise InputError(
            f"{folder} holds a run of another version, whose config has {', '.join(gone)}; resume "
            "with the code that wrote it, or start over with another --workdir."
        )
    # The run did without an option that is newer, which is what its default does.
    then = known | before
    differing = [
        f"{key} was {then.get(key, 'absent')!r} and is {now.get(key, 'absent')!r}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key) and key not in RESUMABLE
    ]
    if differing:
        raise InputError(
            f"{folder} holds a run with another config: {'; '.join(differing)}. Give the old "
            "values to resume it, or another --workdir to start over."
        )
    if read_json(folder / CONFIG) != now:  # other names of options, or another place of the data
        write_json(folder / CONFIG, now)


def _check_dataset(folder: Path, info: dict[str, Any]) -> None:
    before = read_json(folder / DATASET)
    if before is not None and has_begun(folder):
        now = info["checksums"]
        for split, then in before.get("checksums", {}).items():
            if then != now.get(split):
                raise InputError(
                    f"the {split} files of {info['name']} have changed since the run in {folder} "
                    f"began: they were {then} and are {now.get(split)}; restore the old ones, or "
                    "start over with another --workdir."
                )
    write_json(folder / DATASET, info)


def check_shared(folder: Path) -> None:
    """Checks that this process sees the folder that the first one has opened.

    Raises:
        InputError: It does not, even after `SHARED_SECONDS`.
    """
    deadline = time.monotonic() + SHARED_SECONDS
    while not (folder / CONFIG).exists():
        if time.monotonic() > deadline:
            raise InputError(
                f"{folder} is not what the first process has opened; with many processes, "
                "--workdir must name a folder on a file system that all of their hosts share."
            )
        time.sleep(0.1)


def _options(config: Config | ConfigDict) -> dict[str, Any]:
    # Through JSON, which has lists for tuples, to compare it with what is read from a file.
    return json.loads(json.dumps(dict(flatten(config))))


def fixed_options(config: Config | ConfigDict) -> dict[str, Any]:
    """Returns, as JSON has them, the options that all sessions and processes of a run share."""
    return {key: value for key, value in _options(config).items() if key not in RESUMABLE}


def read_options(folder: Path) -> dict[str, Any] | None:
    """Returns the options of a run by "section.name", as JSON has them; None without a run.

    Options of an earlier version have their present names.
    """
    options = read_json(folder / CONFIG)
    return None if options is None else migrate(options)


def read_config(folder: Path) -> Config:
    """Reads the config of a run; options that are newer than the run have their defaults.

    Raises:
        InputError: The folder is not a run folder, or this version cannot use its config.
    """
    options = read_options(folder)
    if options is None:
        raise InputError(
            f"{folder} is not a run folder, as it holds no {CONFIG}; name the folder of a training "
            "run, such as runs/digits."
        )

    def to_tuples(value: Any) -> Any:  # JSON has lists for them
        return tuple(map(to_tuples, value)) if isinstance(value, list) else value

    try:
        defaults = dict(flatten(default_config(options.get("model.name", ""))))
        return validate_options(defaults | {key: to_tuples(options[key]) for key in options})
    except InputError as error:
        text = str(error).rstrip(".")
        raise InputError(
            f"{folder / CONFIG} cannot be used here ({text}); use the code that wrote it."
        ) from None


def read_dataset(folder: Path) -> dict[str, Any]:
    """Reads what a run was trained on, as `alexnet_jax.data.load.RunData` describes `info`.

    Raises:
        InputError: The run has not begun, or the file is damaged.
    """
    path = folder / DATASET
    info: dict[str, Any] | None = read_json(path)
    if info is None:
        raise InputError(f"{path} is missing: the run has not begun, or restore it from a copy.")
    try:
        names, (height, width, channels) = info["class_names"], info["image_shape"]
        mean, std = info["mean"], info["deviation"]
        valid = len({*names}) == len(names) >= 2 and all(isinstance(x, str) for x in names)
        valid &= height == width > 0 and channels == len(mean) == len(std) == 3
        valid &= all(math.isfinite(x) for x in (*mean, *std)) and min(std) > 0
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid:
        raise InputError(
            f"{path} is damaged: class names, image shape or channel statistics are not those of a "
            "data set; restore it from a copy."
        )
    return info
