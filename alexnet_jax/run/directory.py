"""The run folder: everything that a run leaves, and all that a program needs to use it.

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
from alexnet_jax.errors import InputError, SaveFailed
from alexnet_jax.run.files import format_json as format_json
from alexnet_jax.run.files import read_json as read_json
from alexnet_jax.run.files import remove_unfinished
from alexnet_jax.run.files import write_bytes as write_whole  # noqa: F401 - its name until now
from alexnet_jax.run.files import write_json as write_json
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

# What results and metrics are of, and what that is: the weights, their average, and both with the
# answers for several views of each image averaged. Of a split the last there is counts most.
SPLITS = {
    f"{split}{views}{version}": f"{split}{said_of_views}{said_of_version}"
    for split in ("validation", "test")
    for views, said_of_views in (("", ""), ("_tta", ", several views"))
    for version, said_of_version in (("", ""), ("_ema", ", averaged weights"))
}

_STALE_SECONDS = 60  # no file of a run takes longer to write
# What flock answers where a file system has no locks, as some that come over a network.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def make_folder(path: Path) -> None:
    """Makes a folder, and those it lies in, unless it is there.

    Raises:
        SaveFailed: It cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveFailed(f"the folder {path} could not be made ({error.strerror}).") from None


P = ParamSpec("P")


@dataclasses.dataclass
class RunDirectory:
    """The folder of a run, as the processes that train it share it.

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
                    path = stack.enter_context(open_run_folder(path, config))
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

    @property
    def writable(self) -> Path | None:
        """The folder on the first process, None on the others."""
        return self.path if jax.process_index() == 0 else None

    def write(
        self, function: Callable[Concatenate[Path, P], None], *args: P.args, **options: P.kwargs
    ) -> None:
        """Calls `function(path, *args, **options)` on the first process."""
        with collectives.fail_together():
            if folder := self.writable:
                function(folder, *args, **options)

    def check_dataset(self, info: dict[str, Any]) -> None:
        """Writes ``dataset.json``, and rejects data other than those the run began with.

        Args:
            info: See `alexnet_jax.data.load.RunData`; its `checksums` tell data files apart.

        Raises:
            InputError: The data files have changed, or differ between the processes.
        """
        self.write(check_dataset, info)
        collectives.check_equal(info, "the data set")

    def write_results(self, results: dict[str, Any]) -> None:
        """Writes ``results.json``, after which the run is finished."""

        def write(folder: Path) -> None:
            (folder / REPORT).unlink(missing_ok=True)  # of other results, from an earlier end
            write_json(folder / RESULTS, results)

        self.write(write)
        self.results = results


SHARED_SECONDS = 20.0  # until a network file system shows what another host has written


@contextmanager
def open_run_folder(workdir: Path, config: Config) -> Iterator[Path]:
    """Makes the folder of a new run, or makes sure that this config may go on in an old one.

    Until the context ends, or the process, no other run can open it.

    Args:
        workdir: The folder.
        config: Checked against the one that began the run; only `config.RESUMABLE` may differ.

    Yields:
        The absolute path of the folder, which holds ``config.json``.

    Raises:
        InputError: It is a file, cannot be written, holds something else, or another run, or a
            run is using it.
    """
    folder = _make(workdir)
    files = [path for path in folder.iterdir() if not path.name.startswith(".")]
    if files and not (folder / CONFIG).exists():
        raise InputError(
            f"--workdir={workdir} holds files but no {CONFIG}, so it is no run folder; "
            "name an empty or a new one."
        )
    with lock(folder):
        remove_unfinished(folder, _STALE_SECONDS)
        _check_config(folder, config)
        yield folder


def _make(workdir: Path) -> Path:
    try:
        folder = workdir.expanduser().absolute()
        if folder.exists() and not folder.is_dir():
            raise InputError(f"--workdir={workdir} is a file; name a folder.")
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()
    except (OSError, RuntimeError) as error:  # RuntimeError: ~name of nobody
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"--workdir={workdir} cannot be written ({reason}); name a folder that can."
        ) from None
    return folder


@contextmanager
def lock(folder: Path, what: str = "a run") -> Iterator[None]:
    """Keeps other processes out. The system lets the lock go with this one, however it ends.

    Args:
        folder: Holds the lock's file.
        what: Is going on in it, for the sentence.

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
                f"{what} is going on in {folder} ({holder}); wait for its end or stop it, or "
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
    """Whether a run is going on in a folder, of any process."""
    try:
        with (folder / LOCK).open() as file:  # it may be a copy that cannot be written
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def has_begun(folder: Path) -> bool:
    """Whether there is something to lose: records of training, or weights, as of an import."""
    metrics = folder / METRICS
    return (metrics.exists() and metrics.stat().st_size > 0) or (folder / SAVED).exists()


def _check_config(folder: Path, config: Config) -> None:
    """Writes down the config of a run; in the folder of an old one refuses any that is another."""
    before = read_options(folder)
    now = _options(config)
    if before is None or not has_begun(folder):
        # New, or begun and ended by a mistake before the first step: free to be another run.
        write_json(folder / CONFIG, now)
        return
    try:
        known = _options(default_config(before.get("model.name", "")))
    except InputError:  # a network that this version does not have, and so another one
        known = before
    if gone := sorted(before.keys() - known.keys()):
        raise InputError(
            f"{folder} holds a run of another version, whose config has {', '.join(gone)}; go on "
            "with the code that wrote it, or start anew with another --workdir."
        )
    # An option that is newer than the run has its default, which is what the run did without it.
    then = known | before
    differing = [
        f"{key} was {then.get(key, 'absent')!r} and is {now.get(key, 'absent')!r}"
        for key in sorted(then.keys() | now.keys())  # each network has its own
        if then.get(key) != now.get(key) and key not in RESUMABLE
    ]
    if differing:
        raise InputError(
            f"{folder} holds a run with another config: {'; '.join(differing)}. Give the old "
            "values to go on with it, or another --workdir to start anew."
        )
    if read_json(folder / CONFIG) != now:  # other names of options, or another place of the data
        write_json(folder / CONFIG, now)


def fixed_options(config: Config | ConfigDict) -> dict[str, Any]:
    """Returns, as JSON has them, the options that all sessions and processes of a run share."""
    return {key: value for key, value in _options(config).items() if key not in RESUMABLE}


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


def _options(config: Config | ConfigDict) -> dict[str, Any]:
    # Through JSON, so that what is read from a file can be compared: it has lists for tuples.
    return json.loads(json.dumps(dict(flatten(config))))


def _tuples(value: Any) -> Any:  # JSON has lists for them
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def read_options(folder: Path) -> dict[str, Any] | None:
    """Returns the options of a run by "section.name", as JSON has them; None without a run.

    Options of an earlier version have their present names.
    """
    options = read_json(folder / CONFIG)
    return None if options is None else migrate(options)


def read_config(folder: Path) -> Config:
    """Reads the config of a run. An option that is newer than the run has its default.

    Raises:
        InputError: The folder holds no run, or its config cannot be used here.
    """
    options = read_options(folder)
    if options is None:
        raise InputError(
            f"{folder} is no run folder, as it holds no {CONFIG}; name one that a training run "
            "has made, such as runs/digits."
        )
    try:
        defaults = dict(flatten(default_config(options.get("model.name", ""))))
        return validate_options(defaults | {key: _tuples(options[key]) for key in options})
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
    info = read_json(path)
    if info is None:
        raise InputError(f"{path} is missing; the run has not begun, or lost it: put back a copy.")
    try:
        names, shape = info["class_names"], info["image_shape"]
        numbers = [*info["mean"], *info["deviation"]]
        well = all(isinstance(name, str) for name in names) and len(set(names)) == len(names) >= 2
        well &= len(shape) == 3 and shape[0] == shape[1] > 0 and shape[2] == 3
        well &= len(info["mean"]) == len(info["deviation"]) == shape[2]
        well &= all(math.isfinite(number) for number in numbers) and min(info["deviation"]) > 0
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error!r}); put back a copy.") from None
    if not well:
        raise InputError(
            f"{path} is damaged: names of classes, shape or colours are not those of a data set; "
            "put back a copy."
        )
    return info


def check_dataset(folder: Path, info: dict[str, Any]) -> None:
    """Writes down what data a run is trained on; refuses others where a run has begun.

    Args:
        folder: The run folder.
        info: What ``dataset.json`` is to hold; its `checksums` stand for the files.

    Raises:
        InputError: The files are others than those that the run began with.
    """
    before = read_json(folder / DATASET)
    if before is not None and has_begun(folder):
        then, now = before.get("checksums", {}), info["checksums"]
        for split in then:  # none, where an earlier version wrote it
            if then[split] != now.get(split):
                raise InputError(
                    f"the {split} files of {info['name']} have changed since the run in {folder} "
                    f"began: they were {then[split]} and are {now.get(split)}; put the old ones "
                    "back, or start anew with another --workdir."
                )
    write_json(folder / DATASET, info)
