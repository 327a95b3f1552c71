"""Trains several configs over several seeds, and sets them side by side.

Run `python scripts/compare.py --help` for what it takes.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from alexnet_jax.cli import common

_EPILOG = f"""\
Each CONFIG has a run folder below WORKDIR, named after it. The same command again skips what is
trained and goes on in what is not. What follows -- goes to every run. WORKDIR then holds table.md,
comparison.png (accuracy on the validation images against time, with the deviation over the seeds)
and comparison.html.

To choose between configs, keep the test set closed: -- --noconfig.eval.test

examples:
  python scripts/compare.py configs/cifar10.py configs/resnet18.py configs/vgg11.py
  python scripts/compare.py configs/cifar10.py configs/cifar10_classic.py --seeds=5 \\
      --workdir=runs/two -- --noconfig.eval.test --config.train.epochs=5

Exit codes: 0 done, {common.EXIT_CODES}, or that of the
run that ended otherwise, such as 75, interrupted and saved.
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
    from alexnet_jax.experiments import compare
    from alexnet_jax.run import writers  # imports JAX, as --help does not

    taken = ["config", "workdir", "config.num_seeds"]
    taken += ["config.seed"] * options.separate_runs
    common.check_flags(flags, taken, "the comparison")
    for config in options.configs:
        load_config(config)  # a mistake in the last is told before the first is trained
    entries = [compare.entry(config) for config in options.configs]
    writers.log_to_terminal()
    how = {"separately": options.separate_runs}
    code = compare.train(entries, options.workdir, options.seeds, flags, **how)
    if code:
        return code
    print(compare.compare(entries, options.workdir, options.seeds, **how))
    print(
        f"Next: look at {options.workdir}/comparison.png and comparison.html; the table is in "
        "table.md.",
        file=sys.stderr,
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Trains several configs over several seeds, and sets them side by side.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [options] CONFIG [CONFIG ...] [-- FLAG ...]",
    )
    parser.add_argument("configs", metavar="CONFIG", nargs="+", help="a config file")
    parser.add_argument("--seeds", type=int, default=3, metavar="R", help="of each (default: 3)")
    parser.add_argument(
        "--separate_runs",
        action="store_true",
        help="a run for each seed, as streamed images need it (default: one run for all)",
    )
    parser.add_argument(
        "--workdir",
        type=common.path,
        default=Path("runs/compare"),
        help="holds the run folders (default: runs/compare)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
