"""Statistics over seeds: mean, standard deviation and confidence interval of runs, as a table."""

import dataclasses
import functools
import itertools
import math
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from alexnet_jax.config import CONFIGS, RESUMABLE, default_config, load_config
from alexnet_jax.errors import InputError
from alexnet_jax.run import directory, files


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What the files of a finished run's folder hold."""

    folder: Path
    options: dict[str, Any]  # "section.key" to value
    dataset: dict[str, Any]
    results: dict[str, Any]

    @property
    def compared(self) -> dict[str, Any]:
        """The options in which the runs of a row may not differ: all but seeds and RESUMABLE."""
        free = RESUMABLE | {"seed", "num_seeds"}
        return {key: value for key, value in sorted(self.options.items()) if key not in free}

    @property
    def seeds(self) -> list[int]:
        """The seeds of its networks."""
        return list(self.results.get("seeds", [self.options["seed"]]))

    def accuracies(self, suffix: str = "", split: str = "test") -> list[float]:
        """Returns the accuracy of each seed, from 0 to 1; [] if it was not evaluated.

        Args:
            suffix: "" for plain images, "_tta" for test-time augmentation.
            split: "test" or "validation".
        """
        # A run that keeps an EMA of its weights is judged by it.
        for name in (f"{split}{suffix}_ema", f"{split}{suffix}"):
            if name in self.results:
                found = self.results[name]
                return list(found.get("accuracy_each", [found["accuracy"]]))
        return []

    @property
    def images_trained(self) -> int:
        """Images that passed through training, over all epochs and seeds."""
        batch_size = self.options["train.batch_size"]
        steps_per_epoch = self.dataset["images"]["train"] // batch_size
        return steps_per_epoch * batch_size * self.results["epochs"] * len(self.seeds)


Groups = Sequence[Sequence[RunResult]]


def read_run(folder: Path) -> RunResult:
    """Reads a run folder; an option that is newer than the run has its default.

    Raises:
        InputError: It is not a run folder, or the run is not finished.
    """
    options = directory.read_options(folder)
    dataset, results = (
        files.read_json(folder / name) for name in (directory.DATASET, directory.RESULTS)
    )
    if options is None:
        raise InputError(f"{folder} is not a run folder: it has no {directory.CONFIG}.")
    if dataset is None or results is None:
        raise InputError(f"the run in {folder} is not finished; rerun its command to resume it.")
    try:
        defaults = directory.fixed_options(default_config(options.get("model.name", "")))
    except InputError:  # a network that this version does not have
        defaults = {}
    return RunResult(folder, defaults | options, dataset, results)


def group(runs: Sequence[RunResult]) -> list[list[RunResult]]:
    """Groups runs that differ in nothing but their seeds, in the order in which they first come.

    Raises:
        InputError: Two runs of a group have a seed in common.
    """
    groups: dict[str, list[RunResult]] = {}
    seen: dict[tuple[str, int], Path] = {}
    for run in runs:
        key = repr((run.compared, run.dataset.get("checksums")))  # early versions wrote none
        groups.setdefault(key, []).append(run)
        for seed in run.seeds:
            if (key, seed) in seen:
                raise InputError(
                    f"{seen[key, seed]} and {run.folder} are the same run with the same seed, "
                    f"{seed}; name one of them."
                )
            seen[key, seed] = run.folder
    return list(groups.values())


def confidence(values: Sequence[float], level: float = 0.95) -> float:
    """Returns half the width of the mean's confidence interval (Student's t); NaN for one value."""
    if len(values) < 2:
        return math.nan
    return float(stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values))


def _percent(values: Sequence[float]) -> tuple[str, str, str]:
    """Formats mean, standard deviation, and 95% interval."""
    if not values:
        return "-", "-", "-"
    mean = 100 * float(np.mean(values))
    if len(values) == 1:
        return f"{mean:.2f}", "-", "-"
    half = 100 * confidence(values)
    std = 100 * float(np.std(values, ddof=1))
    return f"{mean:.2f}", f"{std:.2f}", f"{mean - half:.2f} - {mean + half:.2f}"


_COLUMNS = (
    *("recipe", "{} accuracy (%)", "deviation", "95% interval", "with views (%)", "deviation"),
    *("seeds", "epochs", "training (s)", "an epoch (s)", "images/s", "parameters (M)", "MFLOPs"),
)


def table(groups: Groups, names: Sequence[str]) -> str:
    """Formats a row for each group in Markdown, and below it the data, hardware and command.

    The time is of one seed, from start to end and including validation; where the seeds of a row
    ran on different hardware, it is of those on the hardware of the first. Accuracies are of the
    validation images where the test set was not evaluated.

    Raises:
        InputError: Some runs have no accuracy on test images, and some none on validation images.
    """
    runs = list(itertools.chain.from_iterable(groups))
    untested = next((run for run in runs if "test" not in run.results), None)
    split = "validation" if untested else "test"
    for run in runs:
        if untested and not run.accuracies("", split):
            raise InputError(
                f"{untested.folder} was not evaluated on the test set, and {run.folder} not on "
                "validation images; make a table of each kind."
            )
    rows = list(zip(groups, names, strict=True))
    head = [column.format(split) for column in _COLUMNS]
    cells = [_cells(members, name, split) for members, name in rows]
    origins = [_origin(members, name, split) for members, name in rows]
    return "\n".join([markdown_table(head, cells), "", *origins])


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Formats a table in Markdown."""
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def _cells(members: Sequence[RunResult], name: str, split: str) -> list[str]:
    plain = [accuracy for run in members for accuracy in run.accuracies("", split)]
    tta = [accuracy for run in members for accuracy in run.accuracies("_tta", split)]
    first = members[0].results
    timed = [run for run in members if run.results["devices"] == first["devices"]]
    total = sum(run.results["train_seconds"] for run in timed)
    seconds = total / sum(len(run.seeds) for run in timed)
    flops = first.get("flops")
    return [
        name,
        *_percent(plain),
        *_percent(tta)[:2],
        str(len(plain)),
        str(first["epochs"]),
        f"{seconds:,.0f}",
        f"{seconds / first['epochs']:,.0f}",
        f"{sum(run.images_trained for run in timed) / max(total, 1e-9):,.0f}",
        f"{first['parameters'] / 1e6:.2f}",
        "-" if flops is None else f"{flops / 1e6:,.0f}",
    ]


def _origin(members: Sequence[RunResult], name: str, split: str) -> str:
    """Says on which data and hardware the runs of a row were trained, and by which command."""
    by_hardware: dict[str, list[int]] = {}
    for run in members:
        by_hardware.setdefault(run.results["devices"], []).extend(run.seeds)
    where = "; ".join(
        f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, sorted(seeds)))} on {hardware}"
        for hardware, seeds in by_hardware.items()
    )
    dataset = members[0].dataset
    images = dataset["images"]
    use = "tested" if split == "test" else "validated"
    return (
        f"- **{name}**: {dataset['name']}, trained on {images['train']:,} images, {use} on "
        f"{images[split]:,}; {where}.  \n  `{command(members[0], name)}`"
    )


def command(run: RunResult, name: str, configs: Path = CONFIGS) -> str:
    """Returns a command that trains such a run: the nearest config file, and what differs from it.

    Where anything differs, it names the folder "runs/NAME"; the one that is named after the config
    is for the config as it is.
    """
    changed = {
        file: [key for key, value in run.compared.items() if value != options[key]]
        for file, options in _config_files(configs).items()
        if options.keys() - {"seed", "num_seeds"} == run.compared.keys()
    }
    if not changed:
        return "alexnet-jax train (with options that no config file here has)"
    nearest = min(changed, key=lambda file: (len(changed[file]), file))
    flags = [_flag(key, run.options[key]) for key in changed[nearest]]
    if flags:
        flags.append(shlex.quote(f"--workdir=runs/{name}"))
    return " ".join([f"alexnet-jax train --config={nearest}", *flags])


def _flag(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"--{'' if value else 'no'}config.{key}"
    if isinstance(value, list):
        return f'--config.{key}="{str(_tuples(value)).replace(" ", "")}"'
    return f"--config.{key}={shlex.quote(str(value)) if value != '' else ''}"


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


@functools.cache  # every row of a table is compared with all of them
def _config_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the options of each config file, and of each row of one that takes its number."""
    found = {}
    for path in sorted(folder.glob("*.py")):
        for row in itertools.chain([""], map(":{}".format, range(100))):
            try:
                found[f"{path.stem}{row}"] = directory.fixed_options(load_config(f"{path}{row}"))
            except InputError:  # not a config file, or it takes an argument, or not this one
                if row:
                    break
    return found
