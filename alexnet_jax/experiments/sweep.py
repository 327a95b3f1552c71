"""A search for better options: trials, each a run of its own, judged on the validation images.

Optuna keeps the study in a SQLite database. Each trial is trained by a child process, which runs
`alexnet_jax.main` in a folder of its own and is followed by its ``metrics.jsonl``; so a trial is
saved, stopped and resumed as any run is, and its failure affects no other.
"""

import contextlib
import dataclasses
import json
import logging
import os
import queue
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState
from tqdm import tqdm

from alexnet_jax import environment
from alexnet_jax.config import load_config
from alexnet_jax.distributed.preemption import stop_requests
from alexnet_jax.errors import EXIT_BAD_INPUT, EXIT_DIVERGED, InputError
from alexnet_jax.experiments import launch
from alexnet_jax.experiments.aggregate import markdown_table
from alexnet_jax.experiments.search_space import Space
from alexnet_jax.run import directory, files

log = logging.getLogger(__name__)

DATABASE = "study.db"
SEARCH = "sweep.json"
POLL_SECONDS = 0.5

_STARTS = 3  # of a trial whose process is killed
_HOPELESS = 3  # failures in a row, before any trial was trained, that end the sweep


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is searched, where, and how.

    Attributes:
        folder: Folder of the study, and of the run folder of each trial.
        config: Path of the config file that trials start from.
        space: The options that change from trial to trial.
        flags: Flags of `alexnet_jax.main` for all trials.
        seed: Seed of the search; that of the trials is an option of the config.
        prune: Whether to stop a trial whose best accuracy so far is below the median of the
            earlier trials after as many epochs.
    """

    folder: Path
    config: str
    space: Space
    flags: tuple[str, ...] = ()
    seed: int = 0
    prune: bool = True

    def command(self, params: dict[str, Any]) -> list[str]:
        """Returns the arguments of `alexnet_jax.main` that train with such options."""
        changed = [f"--config.{key}={value}" for key, value in params.items()]
        return [f"--config={self.config}", *self.flags, *changed]


@contextlib.contextmanager
def opened(sweep: Sweep) -> Iterator[optuna.Study]:
    """Creates or resumes the study of a sweep; no other process can until the context ends.

    Raises:
        InputError: The folder cannot be written, is in use, or holds anything else.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder = sweep.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        used = any(not path.name.startswith(".") for path in folder.iterdir())
    except OSError as error:
        raise InputError(f"--workdir={folder} cannot be written ({error.strerror}).") from None
    if used and not (folder / SEARCH).exists():
        raise InputError(
            f"--workdir={folder} holds files but no {SEARCH}, so it is not a sweep's; name an "
            "empty or a new folder."
        )
    with directory.lock(folder, "a sweep"):
        _check_search(sweep)
        storage = optuna.storages.RDBStorage(f"sqlite:///{(folder / DATABASE).absolute()}")
        try:
            study = optuna.create_study(
                storage=storage, study_name="sweep", direction="maximize", load_if_exists=True
            )
            # With the same seed a resumed sweep would draw the same numbers again.
            seed = (sweep.seed + len(study.get_trials(deepcopy=False))) % 2**32
            study.sampler = optuna.samplers.TPESampler(seed=seed)
            median, never = optuna.pruners.MedianPruner(), optuna.pruners.NopPruner()
            study.pruner = median if sweep.prune else never
            yield study
        finally:
            storage.remove_session()
            storage.engine.dispose()


def _check_search(sweep: Sweep) -> None:
    """Writes down what a new sweep searches; rejects another search in the folder of an old one."""
    now = {
        "space": {key: str(sweep.space[key]) for key in sorted(sweep.space)},
        "flags": list(sweep.flags),
        "seed": sweep.seed,
        "prune": sweep.prune,
        "config file": directory.fixed_options(load_config(sweep.config)),
    }
    path = sweep.folder / SEARCH
    before = files.read_json(path)
    if before is None:
        files.write_json(path, now)
        return
    for name, value in now.items():
        if before.get(name) != value:
            was = f" ({before.get(name)}, and now {value})" if name != "config file" else ""
            raise InputError(
                f"{sweep.folder} holds a sweep with another {name}{was}; give the old command to "
                "resume it, or another --workdir."
            )


@dataclasses.dataclass
class Sweeper:
    """Trains the trials of a sweep, several at a time."""

    sweep: Sweep
    study: optuna.Study  # from `opened`
    workers: int  # trials trained at once; where there are GPUs, each has its own
    keep_checkpoints: bool = False  # of all trials, and not only of the best

    def __post_init__(self) -> None:
        self._environments: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        for variables in share_gpus(self.workers):
            self._environments.put(variables)
        self._lock = threading.Lock()  # of the study and of `_failures`
        self._stop = threading.Event()
        self._failures = 0  # in a row

    def run(self, trials: int) -> bool:
        """Trains until so many trials have ended, over all sessions, or until asked to stop.

        Returns whether they have ended.

        Raises:
            InputError: The first trials all failed.
        """
        self._requeue_interrupted()
        ended = len(_ended(self.study))
        bar = tqdm(desc="trials", total=trials, initial=ended, disable=not sys.stderr.isatty())
        with bar, stop_requests() as stop_requested, ThreadPoolExecutor(self.workers) as pool:
            jobs = [pool.submit(self._run_trial) for _ in range(trials - ended)]
            try:
                while wait(jobs, timeout=POLL_SECONDS).not_done:
                    if stop_requested():
                        self._stop.set()
                    bar.update(len(_ended(self.study)) - bar.n)
            finally:  # also after a second Ctrl-C: no child is left behind
                self._stop.set()
        for job in jobs:
            job.result()
        return len(_ended(self.study)) >= trials

    def _requeue_interrupted(self) -> None:
        """Queues the trials that an earlier session has left, to resume in their folders."""
        trials = self.study.get_trials(deepcopy=False)
        queued = {trial.user_attrs.get("continues") for trial in trials}
        for trial in trials:
            if trial.state == TrialState.RUNNING:
                if trial.number not in queued:
                    attributes = {"continues": trial.number, "folder": _folder_of(trial)}
                    self.study.enqueue_trial(trial.params, user_attrs=attributes)
                self.study.tell(trial.number, state=TrialState.FAIL)

    def _run_trial(self) -> None:
        if self._stop.is_set():
            return
        variables = self._environments.get()
        try:
            with self._lock:
                trial = self.study.ask(dict(self.sweep.space))
                trial.set_user_attr("folder", _folder_of(trial))
            state, why = self._train(trial, variables)
            if not self._stop.is_set():  # else the next session resumes the trial
                self._tell(trial, state, why)
        except BaseException:
            self._stop.set()
            raise
        finally:
            self._environments.put(variables)

    def _train(self, trial: Trial, variables: dict[str, str]) -> tuple[TrialState, str]:
        """Trains a trial until it ends or is to stop; returns its state, and why if it failed."""
        folder = self.sweep.folder / _folder_of(trial)
        output = folder.with_suffix(".log")
        arguments = [*self.sweep.command(trial.params), "--config.eval.test=false"]
        values = ", ".join(f"{key} {_short(value)}" for key, value in trial.params.items())
        log.info("%s: %s", folder.name, values)
        progress = _report(trial, folder)
        pruned = False

        def should_stop() -> bool:
            nonlocal pruned
            with self._lock:
                pruned = next(progress) or pruned
            return pruned or self._stop.is_set()

        for _ in range(_STARTS):
            self._wait_for_earlier(folder)
            if self._stop.is_set():
                return TrialState.RUNNING, ""
            with output.open("ab") as stream:
                code = launch.train(
                    [*arguments, f"--workdir={folder}"],
                    should_stop,
                    poll_seconds=POLL_SECONDS,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env=os.environ | variables,
                )
            with self._lock:
                next(progress)
            if code == 0:
                return TrialState.COMPLETE, ""
            if pruned or self._stop.is_set():  # by a signal that may have met it anywhere
                return TrialState.PRUNED, ""
            if code in (EXIT_BAD_INPUT, EXIT_DIVERGED):
                diverged = code == EXIT_DIVERGED
                return TrialState.PRUNED if diverged else TrialState.FAIL, _last_error(output)
            log.warning("%s ended with code %d; see %s.", folder.name, code, output)
        return TrialState.FAIL, f"ended {_STARTS} times with code {code}"

    def _wait_for_earlier(self, folder: Path) -> None:
        """Waits while a process of an earlier session, which was killed, trains in the folder."""
        if directory.in_use(folder):
            log.info(
                "%s: a process of an earlier session still trains it; waiting for its end.",
                folder.name,
            )
        while directory.in_use(folder) and not self._stop.is_set():
            self._stop.wait(POLL_SECONDS)

    def _tell(self, trial: Trial, state: TrialState, why: str) -> None:
        """Ends a trial.

        Raises:
            InputError: All trials so far failed, and these are enough.
        """
        name = _folder_of(trial)
        with self._lock:
            trial.set_user_attr("why", why)
            if state == TrialState.COMPLETE:
                accuracy = _final_accuracy(self.sweep.folder / name)
                self.study.tell(trial, accuracy)
                said = f"validation accuracy {accuracy:.2%}"
            else:
                ended = self.study.tell(trial, state=state)
                said = why or f"pruned after epoch {ended.last_step or 0}"
            log.info("%s: %s", name, said)
            if not self.keep_checkpoints:
                self._remove_checkpoints()
            self._failures = self._failures + 1 if state == TrialState.FAIL else 0
            states = (TrialState.COMPLETE, TrialState.PRUNED)
            trained = self.study.get_trials(deepcopy=False, states=states)
        if self._failures >= _HOPELESS and not trained:
            raise InputError(
                f"the first {_HOPELESS} trials could not be trained; of the last, "
                f"{self.sweep.folder / name}.log says: {why}"
            )

    def _remove_checkpoints(self) -> None:
        """Removes those of all ended trials but the best; they would fill the disk."""
        best = best_trial(self.study)
        trials = self.study.get_trials(deepcopy=False)
        # A trial that waits to resume an earlier one has the same folder.
        kept = {_folder_of(trial) for trial in trials if not trial.state.is_finished()}
        kept |= {_folder_of(best)} if best else set()
        for name in {_folder_of(trial) for trial in trials} - kept:
            shutil.rmtree(self.sweep.folder / name / directory.CHECKPOINTS, ignore_errors=True)


def _report(trial: Trial, folder: Path) -> Iterator[bool]:
    """Reports to Optuna what is new in a trial's metrics; yields whether to prune the trial."""
    reported: set[int] = set()
    for records in _follow(folder / directory.METRICS):
        lags = False
        for record in records:
            options = files.read_json(folder / directory.CONFIG)
            split = "validation_ema" if options["train.ema_decay"] else "validation"
            epoch = round(record["epoch"])
            if record["split"] == split and epoch not in reported:
                reported.add(epoch)
                trial.report(record["accuracy"], epoch)
                lags = lags or (epoch < options["train.epochs"] and trial.should_prune())
        yield lags


def _follow(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Yields the records of validation that were appended to a file since the last time."""
    inode, offset = 0, 0
    while True:
        new = b""
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            current = os.fstat(file.fileno()).st_ino
            # A resumed run replaces the file by one without the steps that were not saved.
            inode, offset = current, offset if current == inode else 0
            file.seek(offset)
            new = file.read()
            new = new[: new.rfind(b"\n") + 1]  # without a line that is still being written
            offset += len(new)
        # The many records of training steps are not parsed.
        yield [json.loads(line) for line in new.splitlines() if b'"validation' in line]


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """Returns the trial with the highest final validation accuracy; None if none is complete."""
    try:
        return study.best_trial
    except ValueError:
        return None


class Row(NamedTuple):
    """A trial that has ended."""

    name: str  # of its run folder
    state: str  # "complete", "pruned" or "fail"
    accuracy: float | None  # on the validation images after its last epoch, from 0 to 1
    epochs: int
    params: dict[str, Any]  # "section.key" to value
    why: str  # it was not trained to the end, where there is more to say


def rows(study: optuna.Study) -> list[Row]:
    """Returns the trials that have ended, in the order in which they began."""
    return [
        Row(
            name=_folder_of(trial),
            state=trial.state.name.lower(),
            accuracy=trial.intermediate_values.get(trial.last_step or 0),
            epochs=trial.last_step or 0,
            params=dict(trial.params),
            why=trial.user_attrs.get("why", ""),
        )
        for trial in _ended(study)
    ]


def _ended(study: optuna.Study) -> list[FrozenTrial]:
    """Returns the trials that have ended, without those that were resumed as another."""
    trials = study.get_trials(deepcopy=False)
    resumed = {trial.user_attrs.get("continues") for trial in trials}
    return [trial for trial in trials if trial.state.is_finished() and trial.number not in resumed]


def importances(study: optuna.Study) -> dict[str, float]:
    """Returns the share of the accuracy's variance that each option explains, largest first.

    By functional ANOVA (Hutter et al., 2014), of complete trials; the shares add up to 1. Empty if
    there are fewer than eight, or all have the same accuracy.
    """
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(complete) < 8 or len({trial.value for trial in complete}) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def table(found: Sequence[Row], most: int = 10) -> str:
    """Formats the first trials in Markdown: the best, then the pruned, then those that failed."""
    order = ["complete", "pruned", "fail"]
    ranked = sorted(found, key=lambda row: (order.index(row.state), -(row.accuracy or 0)))[:most]
    keys = list(dict.fromkeys(key for row in ranked for key in row.params))
    cells = [
        [
            row.name,
            "-" if row.accuracy is None else f"{100 * row.accuracy:.2f}",
            str(row.epochs),
            *(_short(row.params[key]) if key in row.params else "-" for key in keys),
            f"{row.state}: {row.why}" if row.why else row.state,
        ]
        for row in ranked
    ]
    return markdown_table(["trial", "validation (%)", "epochs", *keys, "state"], cells)


def best_command(sweep: Sweep, best: FrozenTrial) -> str:
    """Returns the command that trains the best trial again and evaluates it on the test set."""
    workdir = f"--workdir={sweep.folder}-best"
    return shlex.join(["alexnet-jax", "train", *sweep.command(best.params), workdir])


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _folder_of(trial: Trial | FrozenTrial) -> str:
    name: str = trial.user_attrs.get("folder", f"trial-{trial.number:04}")
    return name


def _final_accuracy(folder: Path) -> float:
    results = files.read_json(folder / directory.RESULTS)
    return float(results.get("validation_ema", results["validation"])["accuracy"])


def _last_error(path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines() or ["it printed nothing"]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines)[-1]


def share_gpus(workers: int) -> list[dict[str, str]]:
    """Returns the environment variables of each worker's processes, which give it its own GPUs.

    Raises:
        InputError: There are GPUs, but fewer than workers.
    """
    found = environment.visible_gpus(os.environ)
    if not found or workers == 1:
        return [{}] * workers
    if len(found) < workers:
        raise InputError(
            f"--workers={workers} need a GPU each, and there are {len(found)}; give fewer."
        )
    return [{"CUDA_VISIBLE_DEVICES": ",".join(found[i::workers])} for i in range(workers)]
