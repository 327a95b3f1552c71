"""What finished runs amount to: mean, deviation and confidence over seeds, as a table."""

import dataclasses
import functools
import json
import math
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from alexnet_jax.cli import command_line
from alexnet_jax.config import FREE_KEYS, default_config, flatten
from alexnet_jax.errors import InputError
from alexnet_jax.experiments import report
from alexnet_jax.experiments.report import figures, statistics
from alexnet_jax.run import directory, writers

# What may differ between the runs of a row.
_SEED_KEYS = ("seed", "num_seeds")
_MOST_ROWS = 100  # of a config file that takes the number of one, as configs/ablation.py does


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run folder: what its files hold."""

    folder: Path
    options: dict[str, Any]  # "section.key" to value
    dataset: dict[str, Any]
    results: dict[str, Any]

    @property
    def seeds(self) -> list[int]:
        """Of its replicas."""
        return list(self.results.get("seeds", [self.options["seed"]]))

    def accuracies(self, views: str = "", split: str = "test") -> list[float]:
        """Returns the accuracy of each seed, 0..1; none if it was not measured so.

        Args:
            views: "" for plain images, "_tta" for the average of several views.
            split: "test" or "validation".
        """
        # Where weights are averaged, their average is what the run was for.
        for name in (f"{split}{views}_ema", f"{split}{views}"):
            if name in self.results:
                found = self.results[name]
                return list(found.get("accuracy_each", [found["accuracy"]]))
        return []

    @property
    def hardware(self) -> str:
        """What computed it, in words."""
        return str(self.results["devices"])

    @property
    def images_trained(self) -> int:
        """Images that passed through training, over all epochs and seeds."""
        steps_per_epoch = self.dataset["images"]["train"] // self.options["train.batch_size"]
        images = steps_per_epoch * self.options["train.batch_size"]
        return images * self.results["epochs"] * len(self.seeds)


def read_run(folder: Path) -> Run:
    """Reads a run folder.

    Raises:
        InputError: It is none, or the run is not finished.
    """
    names = (directory.CONFIG, directory.DATASET, directory.RESULTS)
    options, dataset, results = (directory.read_json(folder / name) for name in names)
    if options is None:
        raise InputError(f"{folder} is no run folder: it has no {directory.CONFIG}.")
    if dataset is None or results is None:
        raise InputError(
            f"the run in {folder} is not finished; give its command again, which goes on."
        )
    try:  # As `directory.read_config`: an option that is newer than the run has its default.
        defaults = dict(flatten(default_config(options.get("model.name"))))
    except InputError:  # a network of another version
        defaults = {}
    options = {key: _plain(value) for key, value in defaults.items()} | options
    return Run(folder, options, dataset, results)


def keep_records(runs: Sequence[Run], folder: Path) -> None:
    """Writes what is read here of runs into a folder, small enough to stand beside their table.

    Each has a folder of its name in it, which is a run folder to `read_run`; of its training steps
    there is one record an epoch. Runs that lie in that folder are left as they are.

    Raises:
        InputError: Two runs have one name.
        SaveFailed: A file cannot be written.
    """
    by_name: dict[str, Run] = {}
    for run in runs:
        name = run.folder.resolve().name
        if name in by_name:
            raise InputError(
                f"{by_name[name].folder} and {run.folder} have one name, {name!r}, and one record "
                "would replace the other; rename one of them."
            )
        by_name[name] = run
    for name, run in by_name.items():
        kept = folder / name
        if kept.resolve() == run.folder.resolve():  # a record already, or not to become one
            continue
        directory.make_folder(kept)
        directory.write_json(kept / directory.CONFIG, run.options)
        directory.write_json(kept / directory.DATASET, run.dataset)
        directory.write_json(kept / directory.RESULTS, run.results)
        records = statistics.by_epoch(writers.read_metrics(run.folder / directory.METRICS))
        lines = "".join(json.dumps(record) + "\n" for record in records)
        directory.write_whole(kept / directory.METRICS, lines.encode())


def group(runs: Sequence[Run]) -> list[list[Run]]:
    """Puts runs together that differ in nothing but their seeds, in the order they came.

    Raises:
        InputError: A seed comes twice, which would count it twice.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        same = {k: v for k, v in run.options.items() if k not in FREE_KEYS | set(_SEED_KEYS)}
        data = run.dataset.get("checksums")  # which runs of earlier versions did not note
        groups.setdefault(repr((sorted(same.items()), data)), []).append(run)
    for members in groups.values():
        where: dict[int, Path] = {}
        for run in members:
            for seed in run.seeds:
                if seed in where:
                    raise InputError(
                        f"{where[seed]} and {run.folder} are the same run with the same seed, "
                        f"{seed}; name one of them."
                    )
                where[seed] = run.folder
    return list(groups.values())


def name_of(run: Run) -> str:
    """Names a row after the folder of a run, without the "-0" or "-seed0" of its seed."""
    name = run.folder.resolve().name
    return name.removesuffix(f"-{run.seeds[0]}").removesuffix(f"-seed{run.seeds[0]}") or name


def confidence(values: Sequence[float], level: float = 0.95) -> float:
    """Returns half the width of the interval that holds the mean with a confidence, by Student's t.

    Args:
        values: At least two; of one there is none, and NaN is returned.
        level: Between 0 and 1.
    """
    if len(values) < 2:
        return math.nan
    error = np.std(values, ddof=1) / len(values) ** 0.5
    return float(stats.t.ppf((1 + level) / 2, len(values) - 1) * error)


def _percent(values: Sequence[float]) -> tuple[str, str, str]:
    """Mean, deviation, and 95% interval, as texts."""
    if not values:
        return "-", "-", "-"
    mean = 100 * float(np.mean(values))
    if len(values) == 1:
        return f"{mean:.2f}", "-", "-"
    half = 100 * confidence(values)
    deviation = 100 * float(np.std(values, ddof=1))
    return f"{mean:.2f}", f"{deviation:.2f}", f"{mean - half:.2f} - {mean + half:.2f}"


_COLUMNS = (
    "recipe",
    "{} accuracy (%)",
    "deviation",
    "95% interval",
    "with views (%)",
    "deviation",
    "seeds",
    "epochs",
    "training (s)",
    "an epoch (s)",
    "images/s",
    "parameters (M)",
    "MFLOPs",
)


def table(groups: Sequence[Sequence[Run]], names: Sequence[str]) -> str:
    """Lays out a row for each group, in Markdown, and below on what and how each was made.

    The time is of one seed, from start to end, with the measurements on validation images; where
    the seeds of a row were trained on different hardware, of those on the hardware of the first.
    Where a run was not to see the test set, all accuracies are of the validation images.

    Args:
        groups: Of `group`.
        names: Of the rows.

    Raises:
        InputError: Some runs have no accuracy on test images, and some none on validation images.
    """
    runs = [run for members in groups for run in members]
    untested = [run for run in runs if "test" not in run.results]
    tested = not untested
    split = "test" if tested else "validation"
    for run in runs:
        if not run.accuracies("", split):
            raise InputError(
                f"{untested[0].folder} was not measured on the test set, and {run.folder} not on "
                "validation images; make a table of each kind."
            )
    head = " | ".join(_COLUMNS).format(split)
    lines = [f"| {head} |", "|" + "---|" * len(_COLUMNS)]
    for members, name in zip(groups, names, strict=True):
        plain = [accuracy for run in members for accuracy in run.accuracies("", split)]
        views = [accuracy for run in members for accuracy in run.accuracies("_tta", split)]
        timed = [run for run in members if run.hardware == members[0].hardware]
        seconds = sum(run.results["train_seconds"] for run in timed)
        pace = sum(run.images_trained for run in timed) / max(seconds, 1e-9)
        seconds /= sum(len(run.seeds) for run in timed)
        first = members[0].results
        flops = first.get("flops")
        cells = [
            name,
            *_percent(plain),
            *_percent(views)[:2],
            str(len(plain)),
            str(first["epochs"]),
            f"{seconds:,.0f}",
            f"{seconds / first['epochs']:,.0f}",
            f"{pace:,.0f}",
            f"{first['parameters'] / 1e6:.2f}",
            "-" if flops is None else f"{flops / 1e6:,.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for members, name in zip(groups, names, strict=True):
        example = members[0]
        by_hardware: dict[str, list[int]] = {}
        for run in members:
            by_hardware.setdefault(run.hardware, []).extend(run.seeds)
        where = "; ".join(
            f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, sorted(seeds)))} on {hardware}"
            for hardware, seeds in by_hardware.items()
        )
        data, images = example.dataset["name"], example.dataset["images"]
        use = "tested" if tested else "validated"
        lines.append(
            f"- **{name}**: {data}, trained on {images['train']:,} images, {use} "
            f"on {images[split]:,}; {where}.  \n"
            f"  `{command(example, name)}`"
        )
    return "\n".join(lines)


def details(
    groups: Sequence[Sequence[Run]], names: Sequence[str], pictures: Path, page: Path
) -> str:
    """Shows each group: its curves, its confusion matrix, and class by class, of all seeds.

    Args:
        groups: Of `group`.
        names: Of the groups; the files are named after them.
        pictures: A folder, made if need be, where "NAME-curves.png" and "NAME-confusion.png" go.
        page: What the links to them start from, or will.

    Returns:
        Markdown, with a heading of the third level for each group.

    Raises:
        InputError: Two groups have one name.
        SaveFailed: A file cannot be written.
    """
    lines = []
    for name in names:
        if names.count(name) > 1:
            raise InputError(
                f"two rows are called {name!r}, and the pictures of one would replace the other's: "
                "their runs differ in more than their seeds; rename a folder."
            )
    for members, name in zip(groups, names, strict=True):
        judged = report.tested_split(members[0].results)
        confusion = np.sum([run.results[judged]["confusion"] for run in members], axis=0)
        classes = tuple(members[0].dataset["class_names"])
        records = [
            of_seed
            for run in members
            for of_seed in statistics.by_seed(writers.read_metrics(run.folder / directory.METRICS))
        ]
        drawn = {"curves": figures.curves(records, name)}
        drawn["confusion"] = figures.confusion(confusion, classes)
        directory.make_folder(pictures)
        lines.append(f"### {name}\n")
        for kind, figure in drawn.items():
            path = pictures / f"{name}-{kind}.png"
            directory.write_whole(path, figures.png(figure))
            link = os.path.relpath(path, page.parent)
            lines.append(f"![{kind} of {name}]({link})")
        lines.append(f"\n```\n{report.class_table(confusion, classes)}\n```\n")
    return "\n".join(lines)


def command(run: Run, name: str, configs: Path | None = None) -> str:
    """Returns a command that makes such a run: the nearest config file, and what differs from it.

    Args:
        run: Its seed is left out.
        name: Of its folder below "runs", where anything differs: the config's own folder is rather
            for the config as it is.
        configs: Folder of the config files; None is the project's.
    """
    candidates = []
    for file, options in _config_files(configs or Path(__file__).parents[1] / "configs").items():
        if options.keys() == run.options.keys():
            changed = {
                key: value
                for key, value in run.options.items()
                if _plain(value) != _plain(options[key]) and key not in FREE_KEYS | set(_SEED_KEYS)
            }
            candidates.append((len(changed), file, changed))
    if not candidates:
        return "python -m alexnet_jax.main (with options that no config file here has)"
    _, file, changed = min(candidates, key=lambda candidate: candidate[:2])
    flags = [
        f"--{'' if value else 'no'}config.{key}"
        if isinstance(value, bool)
        else f"--config.{key}={_flag(value)}"
        for key, value in changed.items()
    ]
    if flags:
        flags.append(shlex.quote(f"--workdir=runs/{name}"))
    return " ".join(["python -m alexnet_jax.main", f"--config=configs/{file}", *flags])


@functools.cache  # every row of a table is compared with all of them
def _config_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the options of each config file, and of each row of one that takes its number."""
    found = {}
    for path in sorted(folder.glob("*.py")):
        for argument in ("", *map(":{}".format, range(_MOST_ROWS))):
            try:
                config = command_line.load_config(f"{path}{argument}")
            except InputError:  # a file that is no config, or takes no number, or not this one
                if argument:
                    break
            else:
                found[f"{path.name}{argument}"] = dict(flatten(config))
    return found


def _flag(value: Any) -> str:
    if isinstance(value, list):
        inner = ",".join(repr(item) for item in value)
        return f'"({inner}{"," * (len(value) == 1)})"'
    return shlex.quote(str(value)) if value != "" else ""


def _plain(value: Any) -> Any:
    """As JSON has it, which knows no tuples, and one kind of number."""
    return list(value) if isinstance(value, (list, tuple)) else value


BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def put_between_marks(path: Path, text: str) -> None:
    """Replaces what stands between `BEGIN` and `END` in a file.

    Raises:
        InputError: The file cannot be read, or has no such marks.
    """
    try:
        content = path.read_text()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from None
    before, begin, rest = content.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise InputError(f"{path} has no lines {BEGIN} and {END} to put the table between.")
    directory.write_whole(path, f"{before}{BEGIN}\n{text}\n{END}{after}".encode())
