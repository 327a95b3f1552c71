"""Make the table of results from the folders of finished runs.

Runs that differ in nothing but their seeds make one row: mean, standard deviation, and the 95%
confidence interval of the mean by Student's t. A row is named after the first of its folders,
without the "-0" or "-seed0" of its seed.

Examples:
  python scripts/results.py runs/classic runs/best
  python scripts/results.py runs/best-*/ --into=docs/results.md --pictures=docs/results
  python scripts/results.py runs/best-*/ --records=records; python scripts/results.py records/*/
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from alexnet_jax.cli import common
from alexnet_jax.errors import InputError

if TYPE_CHECKING:
    from alexnet_jax.experiments.aggregate import Groups, RunResult

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


@common.entry_point
def main(arguments: Sequence[str]) -> None:
    """Runs the program."""
    parser = common.create_parser("python scripts/results.py", __doc__, success="the table is made")
    parser.add_argument("folders", metavar="RUN", nargs="+", type=common.path, help="a run folder")
    parser.add_argument(
        "--into",
        type=common.path,
        metavar="FILE",
        help="also put the table into this file, between its marks",
    )
    parser.add_argument(
        "--pictures",
        type=common.path,
        metavar="FOLDER",
        help="below the table, show curves, confusion matrix and classes of each row; their "
        "pictures go here",
    )
    parser.add_argument(
        "--records",
        type=common.path,
        metavar="FOLDER",
        help="keep what all this was made from here, some KB of each run, from which this program "
        "makes it again",
    )
    options = parser.parse_args(arguments)
    from alexnet_jax.experiments import aggregate  # imports JAX, as --help does not

    runs = [aggregate.read_run(folder) for folder in options.folders]
    groups = aggregate.group(runs)
    names = [_name_of(members[0]) for members in groups]
    text = aggregate.table(groups, names)
    if options.pictures:
        page = options.into or Path("page.md")
        text += f"\n\n{_details(groups, names, options.pictures, page)}"
    if options.into:
        _put_between_marks(options.into, text)
    if options.records:
        _keep_records(runs, options.records)
    print(text)


def _name_of(run: "RunResult") -> str:
    """Returns the name of a run's folder without the "-0" or "-seed0" of its seed."""
    name = run.folder.resolve().name
    return name.removesuffix(f"-{run.seeds[0]}").removesuffix(f"-seed{run.seeds[0]}") or name


def _details(groups: "Groups", names: Sequence[str], pictures: Path, page: Path) -> str:
    """Shows the curves, confusion matrix and classes of each group, over all its seeds.

    Args:
        groups: Groups of runs.
        names: The name of each group.
        pictures: Folder for the files "NAME-curves.png" and "NAME-confusion.png".
        page: The file that the text will be in; links are relative to it.

    Returns:
        Markdown, with a third-level heading for each group.

    Raises:
        InputError: Two groups have the same name.
        SaveFailed: A file cannot be written.
    """
    import numpy as np

    from alexnet_jax.experiments import report
    from alexnet_jax.experiments.report import statistics
    from alexnet_jax.plots import classes, curves, style
    from alexnet_jax.run import directory, files, writers

    for name in names:
        if names.count(name) > 1:
            raise InputError(
                f"two rows are called {name!r}, and the pictures of one would replace the other's: "
                "their runs differ in more than their seeds; rename a folder."
            )
    lines = []
    for members, name in zip(groups, names, strict=True):
        split = report.reported_split(members[0].results)
        confusion = np.sum([run.results[split]["confusion"] for run in members], axis=0)
        class_names = tuple(members[0].dataset["class_names"])
        metrics = (writers.read_metrics(run.folder / directory.METRICS) for run in members)
        records = [of_seed for of_run in metrics for of_seed in statistics.by_seed(of_run)]
        by_metric = {
            metric: [statistics.epoch_curves(of_seed, metric) for of_seed in records]
            for metric in ("loss", "accuracy")
        }
        lines.append(f"### {name}\n")
        for kind, figure in (
            ("curves", curves.metric_curves(by_metric, name)),
            ("confusion", classes.confusion_matrix(confusion, class_names)),
        ):
            path = pictures / f"{name}-{kind}.png"
            files.write_bytes(path, style.png(figure))
            lines.append(f"![{kind} of {name}]({os.path.relpath(path, page.parent)})")
        lines.append(f"\n```\n{report.class_table(confusion, class_names)}\n```\n")
    return "\n".join(lines)


def _put_between_marks(path: Path, text: str) -> None:
    """Replaces what is between `BEGIN` and `END` in a file.

    Raises:
        InputError: The file cannot be read, or has no such marks.
    """
    from alexnet_jax.run import files

    try:
        content = path.read_text()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from None
    before, begin, rest = content.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise InputError(f"{path} has no lines {BEGIN} and {END} to put the table between.")
    files.write_text(path, f"{before}{BEGIN}\n{text}\n{END}{after}")


def _keep_records(runs: Sequence["RunResult"], folder: Path) -> None:
    """Writes what tables and figures are made from, some KB per run, into a folder.

    The record of a run is a folder of the same name that this program reads again; of its training
    steps it has one line per epoch. A run that is in `folder` itself is left as it is.

    Raises:
        InputError: Two runs have the same name.
        SaveFailed: A file cannot be written.
    """
    from alexnet_jax.experiments.report import statistics
    from alexnet_jax.run import directory, files, writers

    by_name: dict[str, RunResult] = {}
    for run in runs:
        name = run.folder.resolve().name
        other = by_name.setdefault(name, run)
        if other is not run:
            raise InputError(
                f"{other.folder} and {run.folder} have the same name, {name!r}, and one "
                "record would replace the other; rename one of them."
            )
    for name, run in by_name.items():
        record = folder / name
        if record.resolve() == run.folder.resolve():
            continue
        files.write_json(record / directory.CONFIG, run.options)
        files.write_json(record / directory.DATASET, run.dataset)
        files.write_json(record / directory.RESULTS, run.results)
        metrics = statistics.by_epoch(writers.read_metrics(run.folder / directory.METRICS))
        lines = "".join(json.dumps(line) + "\n" for line in metrics)
        files.write_text(record / directory.METRICS, lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
