"""Several configs over several seeds, each in a run folder of its own, compared."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from alexnet_jax.distributed.preemption import stop_requests
from alexnet_jax.errors import EXIT_INTERRUPTED, InputError, shell_code
from alexnet_jax.experiments import aggregate, launch
from alexnet_jax.experiments.report import statistics
from alexnet_jax.experiments.report.page import write_comparison
from alexnet_jax.plots import curves as plots
from alexnet_jax.plots import style
from alexnet_jax.run import directory, files, writers

log = logging.getLogger(__name__)

TABLE, FIGURE, PAGE = "table.md", "comparison.png", "comparison.html"


class Entry(NamedTuple):
    """One of the compared configs."""

    name: str  # of its row and its run folder
    config: str  # path or name of the config file, with an optional argument after a colon

    def runs(
        self, workdir: Path, seeds: int, separately: bool
    ) -> list[tuple[Path, tuple[str, ...]]]:
        """Returns the folder of each run with the flags that are its own."""
        if not separately:
            return [(workdir / self.name, (f"--config.num_seeds={seeds}",))]
        return [
            (workdir / f"{self.name}-seed{seed}", (f"--config.seed={seed}",))
            for seed in range(seeds)
        ]


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
    """Trains one run after the other; those that are finished end at once.

    Args:
        entries: Configs of different names.
        workdir: Parent of the run folders.
        seeds: Number of seeds.
        flags: Flags of `alexnet_jax.main` for all runs.
        separately: Whether each seed is a run of its own, which streamed images require, instead
            of one run per config.

    Returns:
        0, or the exit code of the first run that failed or was interrupted; it has printed why.

    Raises:
        InputError: Two entries have the same name, or `seeds` is less than 1.
    """
    names = [each.name for each in entries]
    for name in names:
        if names.count(name) > 1:
            raise InputError(
                f"two configs are called {name}, and would share a run folder; name each once, or "
                "rename a file."
            )
    if seeds < 1:
        raise InputError(f"the number of seeds is {seeds}; it must be at least 1.")
    with stop_requests() as stop_requested:
        for each in entries:
            for folder, own in each.runs(workdir, seeds, separately):
                log.info("%s: %s", each.name, folder)
                arguments = [f"--config={each.config}", f"--workdir={folder}", *own, *flags]
                code = shell_code(launch.train(arguments, stop_requested))
                if stop_requested():  # perhaps too late for that run, but in time for the next
                    code = code or EXIT_INTERRUPTED
                if code == EXIT_INTERRUPTED:
                    log.info("Rerun the same command to resume.")
                if code:
                    return code
    return 0


def compare(
    entries: Sequence[Entry], workdir: Path, seeds: int, *, separately: bool = False
) -> str:
    """Compares the runs of `train` in a table, a figure and a page, which are put into `workdir`.

    Returns:
        The table, in Markdown.

    Raises:
        InputError: A run is missing or not finished.
        SaveFailed: A file cannot be written.
    """
    groups = [
        [aggregate.read_run(folder) for folder, _ in each.runs(workdir, seeds, separately)]
        for each in entries
    ]
    names = [each.name for each in entries]
    table = aggregate.table(groups, names)
    files.write_text(workdir / TABLE, f"{table}\n")
    runs = [run for group in groups for run in group]
    split = "validation" if all("validation" in run.results for run in runs) else "test"
    rows = [(name, *curves(group, split)) for name, group in zip(names, groups, strict=True)]
    files.write_bytes(workdir / FIGURE, style.png(plots.accuracy_over_time(rows, split)))
    write_comparison([run.folder for run in runs], workdir / PAGE)
    return table


def curves(group: Sequence[aggregate.RunResult], split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns seconds[epochs] of one seed, and accuracies[seeds, epochs].

    The time of an epoch is its share of the total training time. The test set is evaluated once,
    so that its curves have one point.
    """
    seeds = sum(len(run.seeds) for run in group)
    seconds = sum(run.results["train_seconds"] for run in group) / seeds
    if split == "test":
        final = [accuracy for run in group for accuracy in run.accuracies()]
        return np.array([seconds]), np.array(final)[:, None]
    accuracies: list[list[float]] = []
    for run in group:
        for records in statistics.by_seed(writers.read_metrics(run.folder / directory.METRICS)):
            evaluated = [record for record in records if record["split"] != "train"]
            found = statistics.epoch_curves(evaluated, "accuracy")
            epochs, values = found.get("validation_ema", found.get("validation", ([], [])))
            accuracies.append(values)
    return seconds * np.array(epochs) / group[0].results["epochs"], np.array(accuracies)
