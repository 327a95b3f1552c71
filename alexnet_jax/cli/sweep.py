"""Searches for better options, judged on the validation images; never sees the test set.

Run `python scripts/sweep.py --help` for what it takes.
"""

import argparse
import csv
import io
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from alexnet_jax.cli import common
from alexnet_jax.errors import EXIT_INTERRUPTED, InputError

if TYPE_CHECKING:
    from alexnet_jax.experiments.sweep import Row

_EPILOG = f"""\
Each trial is a run in a folder of its own below WORKDIR; the study lies in WORKDIR/study.db.
Stopped by Ctrl-C, or killed, the same command goes on, also within a trial; so do more --trials. A
trial whose best accuracy so far is below the median of those before it is stopped. What follows --
goes to every run. At the end there are WORKDIR/trials.csv, sweep.png, and a table.

examples:
  python scripts/sweep.py --config=configs/digits.py --trials=30 --workers=2 \\
      --range=optimizer.learning_rate=1e-4:1e-2:log --range=model.dropout=0:0.6 \\
      --choice=optimizer.schedule=linear,cosine
  python scripts/sweep.py --config=configs/cifar10.py --workdir=runs/widths \\
      --choice="model.hidden=(256,256),(1024,1024)" -- --config.train.epochs=5

Exit codes: 0 all trials have ended, {common.EXIT_CODES},
75 interrupted and saved.
"""


@common.entry_point()
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program.

    Args:
        arguments: The command line after the program's name; None takes the process's own.

    Returns:
        The exit code, as --help lists them.
    """
    own, flags = common.split(arguments)
    options = _parser().parse_args(own)
    from alexnet_jax.cli.command_line import load_config
    from alexnet_jax.experiments import search_space, sweep
    from alexnet_jax.run import writers  # imports JAX, as --help does not

    for name in ("trials", "workers"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name}={getattr(options, name)} must be at least 1.")
    config = load_config(options.config)
    workdir = options.workdir or Path("runs", f"{Path(options.config.split(':')[0]).stem}-sweep")
    space = search_space.parse_space(options.range, options.choice, config)
    searched = [f"config.{key}" for key in space]
    taken = ("config", "workdir", "config.eval.test", *searched)
    common.check_flags(flags, taken, "the sweep")
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
        found, matters = sweep.rows(study), sweep.importances(study)
        best = sweep.best_trial(study)
    logarithmic = [key for key, values in search.space.items() if getattr(values, "log", False)]
    _write(workdir, found, matters, logarithmic)
    print(sweep.table(found))
    states = [row.state for row in found]
    print(
        f"\n{states.count('complete')} trained to the end, {states.count('pruned')} pruned, "
        f"{states.count('fail')} failed; all in {workdir}/trials.csv, drawn in {workdir}/sweep.png."
    )
    for key, share in matters.items():
        print(f"  {share:4.0%} of the variation comes from {key}")
    if not finished:
        print("Stopped and saved. The same command goes on.", file=sys.stderr)
        return EXIT_INTERRUPTED
    if best:
        print(
            f"\nNext: train the best and measure it on the test set, once:\n"
            f"  {sweep.best_command(search, best)}"
        )
    return 0


def _write(
    workdir: Path,
    found: Sequence["Row"],
    matters: Mapping[str, float],
    logarithmic: Collection[str],
) -> None:
    """Writes the table of all trials, and the figure."""
    from alexnet_jax.plots import style, trials
    from alexnet_jax.run import directory

    keys = list(dict.fromkeys(key for row in found for key in row.params))
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["trial", "state", "validation_accuracy", "epochs", *keys, "why"])
    for row in found:
        values = [row.params.get(key, "") for key in keys]
        writer.writerow([row.name, row.state, row.accuracy, row.epochs, *values, row.why])
    directory.write_whole(workdir / "trials.csv", text.getvalue().encode())
    drawn = [(row.state, row.accuracy, row.params) for row in found]
    picture = style.png(trials.search(drawn, matters, logarithmic))
    directory.write_whole(workdir / "sweep.png", picture)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Searches for better options, judged on the validation images.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s --config=FILE [options] [-- FLAG ...]",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="where trials begin from")
    parser.add_argument(
        "--range",
        action="append",
        default=[],
        metavar="KEY=LOW:HIGH[:log]",
        help="numbers that an option may have; may be given several times",
    )
    parser.add_argument(
        "--choice",
        action="append",
        default=[],
        metavar="KEY=A,B",
        help="values that an option may have; may be given several times",
    )
    parser.add_argument("--trials", type=int, default=20, metavar="N", help="in all (default: 20)")
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="trained at once (default: 1)"
    )
    parser.add_argument(
        "--workdir",
        type=common.path,
        metavar="FOLDER",
        help="default: runs/<name of the config>-sweep",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the search (default: 0)")
    parser.add_argument(
        "--prune",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="stop trials that lag behind (default: yes)",
    )
    parser.add_argument(
        "--keep_checkpoints", action="store_true", help="of all trials, and not of the best alone"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
