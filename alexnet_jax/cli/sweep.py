r"""Search for better options, judged by the accuracy on the validation images.

Each trial is a run in a folder of its own in WORKDIR; the study is in WORKDIR/study.db. If
interrupted, the same command resumes the study and its unfinished trials; more --trials continue
it. A trial whose best accuracy so far is below the median of the earlier ones is stopped. The test
set is never evaluated. What follows -- is passed to every run. At the end WORKDIR has trials.csv
and sweep.png.

Examples:
  alexnet-jax sweep --config=digits --trials=30 --workers=2 \
      --range=optimizer.learning_rate=1e-4:1e-2:log --range=model.dropout=0:0.6 \
      --choice=optimizer.schedule=linear,cosine
  alexnet-jax sweep --config=cifar10 --workdir=runs/widths \
      --choice="model.hidden=(256,256),(1024,1024)" -- --config.train.epochs=5
"""

import argparse
import csv
import io
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from alexnet_jax.cli import common
from alexnet_jax.errors import EXIT_INTERRUPTED

if TYPE_CHECKING:
    from alexnet_jax.experiments.sweep import Row


@common.entry_point
def main(arguments: Sequence[str]) -> int:
    """Runs the command."""
    own, flags = common.split(arguments)
    options = _parse(own)
    from alexnet_jax.config import load_config
    from alexnet_jax.experiments import search_space, sweep
    from alexnet_jax.run import writers  # imports JAX, as --help does not

    config = load_config(options.config)
    workdir = options.workdir or Path("runs", f"{Path(options.config.split(':')[0]).stem}-sweep")
    space = search_space.parse_space(options.range, options.choice, config)
    searched = [f"config.{key}" for key in space]
    common.check_flags(flags, ("config", "workdir", "config.eval.test", *searched), "the sweep")
    search = sweep.Sweep(
        folder=workdir,
        config=options.config,
        space=space,
        flags=tuple(flags),
        seed=options.seed,
        prune=options.prune,
    )
    writers.log_to_terminal()
    with sweep.opened(search) as study:
        sweeper = sweep.Sweeper(
            search, study, workers=options.workers, keep_checkpoints=options.keep_checkpoints
        )
        finished = sweeper.run(options.trials)
        rows, importances = sweep.rows(study), sweep.importances(study)
        best = sweep.best_trial(study)
    logarithmic = [key for key, values in space.items() if getattr(values, "log", False)]
    _write(workdir, rows, importances, logarithmic)
    print(sweep.table(rows))
    states = [row.state for row in rows]
    print(
        f"\n{states.count('complete')} trials are complete, {states.count('pruned')} pruned, "
        f"{states.count('fail')} failed; see {workdir}/trials.csv and {workdir}/sweep.png."
    )
    for key, share in importances.items():
        print(f"  {share:4.0%} of the variation comes from {key}")
    if not finished:
        print("Interrupted and saved. Rerun the same command to resume.", file=sys.stderr)
        return EXIT_INTERRUPTED
    if best:
        command = sweep.best_command(search, best)
        print(f"\nNext: train the best and evaluate it on the test set, once:\n  {command}")
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = common.create_parser(
        "alexnet-jax sweep",
        __doc__,
        success="all trials have ended",
        other=", 75 interrupted and saved",
        usage="%(prog)s --config=CONFIG [options] [-- FLAG ...]",
    )
    add = parser.add_argument
    help = "the config to start from: a file, or the name of one that comes with alexnet_jax"
    add("--config", required=True, help=help)
    help = "numbers to search an option in; may be repeated"
    add("--range", action="append", default=[], metavar="KEY=LOW:HIGH[:log]", help=help)
    help = "values to choose an option from; may be repeated"
    add("--choice", action="append", default=[], metavar="KEY=A,B", help=help)
    add("--trials", type=common.positive, default=20, metavar="N", help="in all (default: 20)")
    help = "trials trained at the same time (default: 1)"
    add("--workers", type=common.positive, default=1, metavar="N", help=help)
    help = "default: runs/<name of the config>-sweep"
    add("--workdir", type=common.path, metavar="FOLDER", help=help)
    add("--seed", type=int, default=0, help="of the search (default: 0)")
    help = "stop trials that lag behind (default: yes)"
    add("--prune", action=argparse.BooleanOptionalAction, default=True, help=help)
    help = "of all trials, not only of the best"
    add("--keep_checkpoints", action="store_true", help=help)
    return parser.parse_args(arguments)


def _write(
    workdir: Path,
    rows: Sequence["Row"],
    importances: Mapping[str, float],
    logarithmic: Collection[str],
) -> None:
    """Writes the table of all trials, and the figure."""
    from alexnet_jax.plots import style, trials
    from alexnet_jax.run import files

    keys = list(dict.fromkeys(key for row in rows for key in row.params))
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["trial", "state", "validation_accuracy", "epochs", *keys, "why"])
    for row in rows:
        values = [row.params.get(key, "") for key in keys]
        writer.writerow([row.name, row.state, row.accuracy, row.epochs, *values, row.why])
    files.write_text(workdir / "trials.csv", text.getvalue())
    drawn = [(row.state, row.accuracy, row.params) for row in rows]
    figure = trials.search(drawn, importances, logarithmic)
    files.write_bytes(workdir / "sweep.png", style.png(figure))
