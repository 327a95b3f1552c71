"""Several configs over several seeds, each in a run folder of its own, set side by side."""

import logging
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from alexnet_jax.cli import common
from alexnet_jax.distributed.preemption import stop_requests
from alexnet_jax.errors import EXIT_INTERRUPTED, InputError, shell_code
from alexnet_jax.experiments import aggregate, report
from alexnet_jax.experiments.report import figures, statistics
from alexnet_jax.run import directory, writers

log = logging.getLogger(__name__)

TABLE, FIGURE, PAGE = "table.md", "comparison.png", "comparison.html"


class Entry(NamedTuple):
    """What is compared.

    Attributes:
        name: Of the row, and of the run folder.
        config: Path of a config file, with what may follow it after a colon.
    """

    name: str
    config: str


def entry(config: str) -> Entry:
    """Returns the entry of a config file, named after it: "ablation.py:3" is "ablation-3"."""
    file, _, argument = config.partition(":")
    parts = [Path(file).stem, *(part for part in argument.split("/") if part)]
    return Entry("-".join(parts), config)


def train(
    entries: Sequence[Entry],
    workdir: Path,
    seeds: int,
    flags: Sequence[str] = (),
    *,
    separately: bool = False,
) -> int:
    """Trains what is not trained yet, one run after the other.

    Args:
        entries: Of different names.
        workdir: Holds the run folders.
        seeds: How many, from `config.seed` 0 on.
        flags: Of `alexnet_jax.main`, for all alike.
        separately: Whether each seed is a run of its own, as streamed images need it; else the
            seeds of a config share one.

    Returns:
        0, or the exit code of the run that ended otherwise, which has said why.

    Raises:
        InputError: Two entries have the same name, there are no seeds, or a flag is one that the
            runs are given here.
    """
    taken = ("config", "workdir", "config.num_seeds", *(("config.seed",) if separately else ()))
    common.check_flags(flags, taken, "the comparison")
    names = [one.name for one in entries]
    for name in names:
        if names.count(name) > 1:
            raise InputError(
                f"two configs are called {name}, and would share a run folder; name each once, or "
                "rename a file."
            )
    if seeds < 1:
        raise InputError(f"the number of seeds is {seeds}; it must be at least 1.")
    for one in entries:
        for folder, own in _runs(one, workdir, seeds, separately):
            log.info("%s: %s", one.name, folder)
            code = _train_one([f"--config={one.config}", f"--workdir={folder}", *own, *flags])
            if code == EXIT_INTERRUPTED:
                log.info("The same command goes on from here.")
            if code:
                return code
    return 0


def _runs(
    one: Entry, workdir: Path, seeds: int, separately: bool
) -> list[tuple[Path, tuple[str, ...]]]:
    """Returns the folder and the flags of each run of an entry."""
    if not separately:
        return [(workdir / one.name, (f"--config.num_seeds={seeds}",))]
    return [
        (workdir / f"{one.name}-seed{seed}", (f"--config.seed={seed}",)) for seed in range(seeds)
    ]


def _train_one(arguments: Sequence[str]) -> int:
    """Trains a run in a process of its own; a request to stop is passed on, for it to save."""
    with stop_requests() as stop_requested:
        process = subprocess.Popen(
            [sys.executable, "-m", "alexnet_jax.main", *arguments],
            start_new_session=True,  # else Ctrl-C would reach it twice, which ends it at once
        )
        asked = False
        try:
            while True:
                try:
                    code = shell_code(process.wait(timeout=0.2))
                    # Asked for too late for that run, which is finished, and in time for the next.
                    return code or (EXIT_INTERRUPTED if stop_requested() else 0)
                except subprocess.TimeoutExpired:
                    if stop_requested() and not asked:
                        asked = True
                        process.send_signal(signal.SIGTERM)
        finally:  # a second Ctrl-C leaves from anywhere, and nobody would know of the run
            if not asked and process.poll() is None:
                process.send_signal(signal.SIGTERM)


def compare(
    entries: Sequence[Entry], workdir: Path, seeds: int, *, separately: bool = False
) -> str:
    """Sets finished runs side by side: a table, a figure, and the page of `report.py`.

    Args:
        entries: As they were trained.
        workdir: Likewise; the three files go there.
        seeds: Likewise.
        separately: Likewise.

    Returns:
        The table, in Markdown.

    Raises:
        InputError: A run is missing or not finished.
        SaveFailed: A file cannot be written.
    """
    groups = [
        [aggregate.read_run(folder) for folder, _ in _runs(one, workdir, seeds, separately)]
        for one in entries
    ]
    names = [one.name for one in entries]
    table = aggregate.table(groups, names)
    directory.write_whole(workdir / TABLE, f"{table}\n".encode())
    runs = [run for group in groups for run in group]
    split = "validation" if all("validation" in run.results for run in runs) else "test"
    curves = [(name, *_curves(group, split)) for name, group in zip(names, groups, strict=True)]
    picture = figures.png(figures.accuracy_over_time(curves, split))
    directory.write_whole(workdir / FIGURE, picture)
    report.write_comparison([run.folder for run in runs], workdir / PAGE)
    return table


def _curves(group: Sequence[aggregate.Run], split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns seconds[epochs] of one seed, and accuracies[seeds, epochs].

    An epoch's time is its share of the whole training's. Without validation images there is the
    end alone.
    """
    seeds = sum(len(run.seeds) for run in group)
    seconds = sum(run.results["train_seconds"] for run in group) / seeds
    if split == "test":
        ends = [accuracy for run in group for accuracy in run.accuracies()]
        return np.array([seconds]), np.array(ends)[:, None]
    rows: list[np.ndarray] = []
    for run in group:
        records = writers.read_metrics(run.folder / directory.METRICS)
        for own in statistics.by_seed(records):
            found = statistics.epoch_curves([r for r in own if r["split"] != "train"], "accuracy")
            epochs, values = found.get("validation_ema", found.get("validation", ([], [])))
            rows.append(np.array(values))
    return seconds * np.array(epochs) / group[0].results["epochs"], np.stack(rows)
