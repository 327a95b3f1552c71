"""A search for better options: trials, each a run of its own, judged on the validation images.

The study lies in a SQLite database, by Optuna. Each trial is trained by a process that is nothing
but `alexnet_jax.main` in a folder of its own, and followed by its ``metrics.jsonl``; so a trial is
saved, stopped and gone on with as any run is, and what happens to it happens to nobody else.
"""

import contextlib
import dataclasses
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tqdm import tqdm

from alexnet_jax import environment
from alexnet_jax.cli.command_line import load_config
from alexnet_jax.config import flatten
from alexnet_jax.distributed.preemption import stop_requests
from alexnet_jax.errors import EXIT_BAD_INPUT, EXIT_DIVERGED, InputError
from alexnet_jax.experiments.search_space import Space
from alexnet_jax.run import directory

if TYPE_CHECKING:  # it is an extra, and takes a second to import
    import optuna

log = logging.getLogger(__name__)

DATABASE = "study.db"
SEARCH = "sweep.json"

_RESTARTS = 2  # of a trial whose process was killed
_HOPELESS = 3  # trials refused one after the other, before any was trained
_LOOK_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is searched, where, and how.

    Attributes:
        folder: Holds the study and the run folder of each trial.
        config: Path of the config file that trials begin from.
        space: What changes from trial to trial.
        flags: Of `alexnet_jax.main`, for all trials alike.
        seed: Of the search; the trials' own is an option of the config.
        prune: Whether a trial is stopped once its best accuracy so far is below the median of what
            those before it had after as many epochs.
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
def opened(sweep: Sweep) -> Iterator["optuna.Study"]:
    """Opens the study of a sweep, or begins it; until the context ends no one else may.

    Raises:
        InputError: Optuna is missing, the folder cannot be used, holds another sweep, or a sweep
            is going on in it.
    """
    try:
        import optuna
    except ImportError:
        raise InputError(
            'a sweep needs Optuna; install it: pip install --editable ".[tune]".'
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder = sweep.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        there = [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise InputError(f"--workdir={folder} cannot be written ({error.strerror}).") from None
    if there and not (folder / SEARCH).exists():
        raise InputError(
            f"--workdir={folder} holds files but no {SEARCH}, so it is no sweep's; name an empty "
            "or a new folder."
        )
    with directory.lock(folder, "a sweep"):
        _check_search(sweep)
        storage = optuna.storages.RDBStorage(f"sqlite:///{(folder / DATABASE).absolute()}")
        try:
            study = optuna.create_study(
                storage=storage, study_name="sweep", direction="maximize", load_if_exists=True
            )
            # Going on, it would draw what it has drawn before.
            seed = (sweep.seed + len(study.get_trials(deepcopy=False))) % 2**32
            study.sampler = optuna.samplers.TPESampler(seed=seed)
            median, never = optuna.pruners.MedianPruner(), optuna.pruners.NopPruner()
            study.pruner = median if sweep.prune else never
            yield study
        finally:
            storage.remove_session()
            storage.engine.dispose()


def _check_search(sweep: Sweep) -> None:
    """Writes down what a new sweep searches; refuses to go on with another."""
    now = {
        "space": sorted(map(str, sweep.space)),
        "flags": list(sweep.flags),
        "seed": sweep.seed,
        "prune": sweep.prune,
        "options": json.loads(json.dumps(dict(flatten(load_config(sweep.config))))),
    }
    path = sweep.folder / SEARCH
    before = directory.read_json(path)
    if before is None:
        directory.write_json(path, now)
        return
    for name, value in now.items():
        if before.get(name) != value:
            was = f" ({before.get(name)}, and now {value})" if name != "options" else ""
            what = "the config file" if name == "options" else name
            raise InputError(
                f"{sweep.folder} holds a sweep with another {what}{was}; give the old command to "
                "go on with it, or another --workdir."
            )


@dataclasses.dataclass
class _Running:
    """A trial and the process that trains it."""

    trial: "optuna.Trial"
    slot: int
    folder: Path
    process: subprocess.Popen[bytes] | None = None  # None: yet to be started
    output: IO[bytes] | None = None
    starts: int = 0
    pruned: bool = False
    reported: set[int] = dataclasses.field(default_factory=set)
    place: tuple[int, int] = (0, 0)  # in metrics.jsonl: its inode, and how far it has been read


class Sweeper:
    """Trains the trials of a sweep, several at a time."""

    def __init__(
        self, sweep: Sweep, study: "optuna.Study", *, workers: int, keep_checkpoints: bool = False
    ) -> None:
        """Prepares the search; nothing is started.

        Args:
            sweep: What is searched.
            study: Of `opened`.
            workers: Trials that are trained at once. Where there are GPUs, each has its own.
            keep_checkpoints: Whether all finished trials keep theirs, and not the best alone.

        Raises:
            InputError: There are GPUs, but fewer than workers.
        """
        self._sweep, self._study = sweep, study
        self._keep = keep_checkpoints
        self._slots = _share_out(workers)
        self._running: list[_Running] = []
        self._refused = 0  # one after the other

    def run(self, trials: int) -> bool:
        """Trains until so many trials have ended, over all sessions, or until asked to stop.

        Returns:
            Whether they have; False if it was stopped, and the same again goes on.

        Raises:
            InputError: The first trials were all refused.
        """
        self._take_up()
        bar = tqdm(
            desc="trials", total=trials, initial=self._ended(), disable=not sys.stderr.isatty()
        )
        with bar, stop_requests() as stop_requested:
            try:
                while not stop_requested() and (
                    self._running or self._ended() + len(self._running) < trials
                ):
                    if (
                        len(self._running) < len(self._slots)
                        and self._ended() + len(self._running) < trials
                    ):
                        self._running.append(self._next())
                        continue
                    for running in list(self._running):
                        self._look(running)
                    bar.update(self._ended() - bar.n)
                    time.sleep(_LOOK_SECONDS)
            finally:  # also where something has gone wrong: nothing trains on unseen
                self._stop()
        return self._ended() >= trials

    def _states(self) -> Any:
        from optuna.trial import TrialState

        return TrialState

    def _ended(self) -> int:
        """How many trials have ended; one that goes on as another has not."""
        trials = self._study.get_trials(deepcopy=False)
        continued = {trial.user_attrs.get("continues") for trial in trials}
        return sum(trial.state.is_finished() and trial.number not in continued for trial in trials)

    def _take_up(self) -> None:
        """Puts the trials that another session has left into the queue, with their folders."""
        states = self._states()
        trials = self._study.get_trials(deepcopy=False)
        queued = {t.user_attrs.get("continues") for t in trials}
        for trial in trials:
            if trial.state != states.RUNNING:
                continue
            if trial.number not in queued:
                self._study.enqueue_trial(
                    trial.params,
                    user_attrs={"continues": trial.number, "folder": _folder_of(trial)},
                )
            self._study.tell(trial.number, state=states.FAIL)

    def _distributions(self) -> dict[str, "optuna.distributions.BaseDistribution"]:
        return {one.key: one.distribution for one in self._sweep.space}

    def _next(self) -> _Running:
        trial = self._study.ask(fixed_distributions=self._distributions())
        if "folder" not in trial.user_attrs:
            trial.set_user_attr("folder", _folder_of(trial))
        slots = {running.slot for running in self._running}
        slot = next(i for i in range(len(self._slots)) if i not in slots)
        running = _Running(trial, slot, self._sweep.folder / trial.user_attrs["folder"])
        values = ", ".join(f"{key} {_short(value)}" for key, value in trial.params.items())
        log.info("%s: %s", running.folder.name, values)
        self._start(running)
        return running

    def _start(self, running: _Running) -> None:
        if directory.in_use(running.folder):
            if running.starts == 0:
                log.info(
                    "%s: a process of an earlier session still trains it; waiting for its end.",
                    running.folder.name,
                )
            running.starts = max(running.starts, 1)
            return
        running.starts += 1
        running.output = running.folder.with_suffix(".log").open("ab")
        running.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "alexnet_jax.main"),
                *self._sweep.command(running.trial.params),
                *("--config.eval.test=false", f"--workdir={running.folder}"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=running.output,
            stderr=subprocess.STDOUT,
            env=os.environ | self._slots[running.slot],
            start_new_session=True,  # Ctrl-C is for this program, which passes it on once
        )

    def _look(self, running: _Running) -> None:
        """Reports what a trial has reached, prunes it, and ends it where its process has ended."""
        if running.process is None:
            self._start(running)
            return
        code = running.process.poll()
        self._report(running)
        if code is None:
            return
        assert running.output is not None
        running.output.close()
        running.process = None
        states = self._states()
        if code == 0:
            self._end(running, states.COMPLETE, _accuracy(running.folder))
        elif running.pruned:  # by a signal that may have met it anywhere
            self._end(running, states.PRUNED)
        elif code in (EXIT_BAD_INPUT, EXIT_DIVERGED):
            why = _last_error(running.folder.with_suffix(".log"))
            running.trial.set_user_attr("why", why)
            self._end(running, states.FAIL if code == EXIT_BAD_INPUT else states.PRUNED)
        elif running.starts <= _RESTARTS:
            log.warning(
                "%s ended with code %d, and is gone on with; %s says more.",
                running.folder.name,
                code,
                running.folder.with_suffix(".log"),
            )
            self._start(running)
        else:
            running.trial.set_user_attr("why", f"ended {running.starts} times with code {code}")
            self._end(running, states.FAIL)

    def _report(self, running: _Running) -> None:
        records = self._new_records(running)
        if not records:
            return
        options = directory.read_json(running.folder / directory.CONFIG)
        split = "validation_ema" if options["train.ema_decay"] else "validation"
        for record in records:
            epoch = round(record["epoch"])
            if record["split"] != split or epoch in running.reported:
                continue
            running.reported.add(epoch)
            running.trial.report(record["accuracy"], epoch)
            if (
                epoch < options["train.epochs"]
                and not running.pruned
                and running.process is not None
                and running.process.poll() is None
                and running.trial.should_prune()
            ):
                running.pruned = True
                running.process.send_signal(signal.SIGTERM)  # it saves, and ends

    @staticmethod
    def _new_records(running: _Running) -> list[dict[str, Any]]:
        """Returns what has been measured since the last look."""
        try:
            with (running.folder / directory.METRICS).open("rb") as file:
                inode, offset = running.place
                if os.fstat(file.fileno()).st_ino != inode:  # a run that goes on makes it anew
                    offset = 0
                file.seek(offset)
                new = file.read()
                whole = new.rfind(b"\n") + 1
                running.place = (os.fstat(file.fileno()).st_ino, offset + whole)
        except FileNotFoundError:
            return []
        # The records of single steps are many.
        lines = [line for line in new[:whole].splitlines() if b'"validation' in line]
        return [json.loads(line) for line in lines]

    def _end(self, running: _Running, state: Any, accuracy: float | None = None) -> None:
        states = self._states()
        self._running.remove(running)
        self._study.tell(running.trial, accuracy, state=state)
        why = running.trial.user_attrs.get("why", "")
        said = {
            states.COMPLETE: f"validation accuracy {accuracy or 0:.2%}",
            states.PRUNED: why or f"pruned after epoch {max(running.reported, default=0)}",
            states.FAIL: why,
        }[state]
        log.info("%s: %s", running.folder.name, said)
        if not self._keep:
            self._remove_checkpoints()
        self._refused = self._refused + 1 if state == states.FAIL else 0
        trained = self._study.get_trials(deepcopy=False, states=(states.COMPLETE, states.PRUNED))
        if self._refused >= _HOPELESS and not trained:
            raise InputError(
                f"the first {_HOPELESS} trials could not be trained; of the last, "
                f"{running.folder.with_suffix('.log')} says: {why}"
            )

    def _remove_checkpoints(self) -> None:
        """Of ended trials the best alone keeps its network; of many all would fill a disk."""
        best = best_trial(self._study)
        trials = self._study.get_trials(deepcopy=False)
        # A folder is another trial's, too, where one waits to go on with what an earlier began.
        spared = {_folder_of(trial) for trial in trials if not trial.state.is_finished()}
        spared |= {_folder_of(best)} if best else set()
        for trial in trials:
            name = _folder_of(trial)
            if trial.state.is_finished() and name not in spared:
                folder = self._sweep.folder / name / directory.CHECKPOINTS
                shutil.rmtree(folder, ignore_errors=True)

    def _stop(self) -> None:
        """Has every process save and end; their trials are taken up by the next session."""
        for running in self._running:
            if running.process is not None:
                running.process.send_signal(signal.SIGTERM)
        for running in self._running:
            if running.process is not None:
                running.process.wait()
            if running.output is not None:
                running.output.close()
        self._running.clear()


def best_trial(study: "optuna.Study") -> "optuna.trial.FrozenTrial | None":
    """Returns the trial with the highest validation accuracy at its end; None if none has ended."""
    from optuna.trial import TrialState

    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return max(complete, key=lambda trial: trial.value or 0.0, default=None)


@dataclasses.dataclass(frozen=True)
class Row:
    """A trial that has ended.

    Attributes:
        name: Of its run folder.
        state: "complete", "pruned" or "fail".
        accuracy: On the validation images, 0..1, of the last epoch there was; None before one.
        epochs: That were reported.
        params: "section.key" to value.
        why: It was not trained to the end, where there is more to say.
    """

    name: str
    state: str
    accuracy: float | None
    epochs: int
    params: dict[str, Any]
    why: str


def rows(study: "optuna.Study") -> list[Row]:
    """Lists the trials that have ended, in the order they began; not those that go on as others."""
    trials = study.get_trials(deepcopy=False)
    continued = {trial.user_attrs.get("continues") for trial in trials}
    found = []
    for trial in trials:
        if not trial.state.is_finished() or trial.number in continued:
            continue
        last = max(trial.intermediate_values, default=0)
        found.append(
            Row(
                name=_folder_of(trial),
                state=trial.state.name.lower(),
                accuracy=trial.intermediate_values.get(last) if last else None,
                epochs=last,
                params=dict(trial.params),
                why=trial.user_attrs.get("why", ""),
            )
        )
    return found


def importances(study: "optuna.Study") -> dict[str, float]:
    """Returns what share of the accuracy's variation each option explains, most first.

    By functional ANOVA (Hutter et al., 2014), of complete trials; scaled to add up to 1. Nothing
    where these are fewer than eight, or all alike.
    """
    import optuna

    complete = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    if len(complete) < 8 or len({trial.value for trial in complete}) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def table(found: Sequence[Row], most: int = 10) -> str:
    """Lays the trials out in Markdown, the best first, those that were not trained to the end last.

    Args:
        found: Of `rows`.
        most: Rows at most.
    """
    order = {"complete": 0, "pruned": 1, "fail": 2}
    ranked = sorted(found, key=lambda row: (order[row.state], -(row.accuracy or 0.0)))[:most]
    keys = list(dict.fromkeys(key for row in ranked for key in row.params))
    head = ["trial", "validation (%)", "epochs", *keys, "state"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in ranked:
        cells = [
            row.name,
            "-" if row.accuracy is None else f"{100 * row.accuracy:.2f}",
            str(row.epochs),
            *(_short(row.params[key]) if key in row.params else "-" for key in keys),
            f"{row.state}: {row.why}" if row.why else row.state,
        ]
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines)


def best_command(sweep: Sweep, best: "optuna.trial.FrozenTrial") -> str:
    """Returns the command that trains the best trial again, and measures it on the test set."""
    workdir = f"--workdir={sweep.folder}-best"
    return shlex.join(["python", "-m", "alexnet_jax.main", *sweep.command(best.params), workdir])


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _folder_of(trial: "optuna.Trial | optuna.trial.FrozenTrial") -> str:
    name: str = trial.user_attrs.get("folder", f"trial-{trial.number:04}")
    return name


def _accuracy(folder: Path) -> float:
    results = directory.read_json(folder / directory.RESULTS)
    measured = results.get("validation_ema", results["validation"])
    return float(measured["accuracy"])


def _last_error(path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines()
    found = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return found[-1] if found else (lines[-1] if lines else "it said nothing")


def _share_out(workers: int) -> list[dict[str, str]]:
    """Returns the variables of each worker's processes, which give it GPUs of its own."""
    found = environment.visible_gpus(os.environ)
    if not found or workers == 1:
        return [{}] * workers
    if len(found) < workers:
        raise InputError(
            f"--workers={workers} need a GPU each, and there are {len(found)}; give fewer."
        )
    return [{"CUDA_VISIBLE_DEVICES": ",".join(found[i::workers])} for i in range(workers)]
