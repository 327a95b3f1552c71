"""Trains every row of configs/ablation.py, and makes their table; stopped, it goes on where it was.

Run `python scripts/ablation.py --help` for what it takes.
"""

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from alexnet_jax.cli import common
from alexnet_jax.errors import InputError

_ROWS = Path(__file__).parents[1] / "configs" / "ablation.py"
_EPILOG = f"""\
Each row has a run folder of its own, WORKDIR/NN-name. The same command again skips those that are
finished and goes on in the one that is not. What follows -- goes to every run. At the end WORKDIR
holds table.md, comparison.png and comparison.html, as of scripts/compare.py.

The rows are for choosing, so they are told apart on validation images, held out of the training
images, and the test set stays closed; --config.eval.test behind -- opens it, for a last report.

examples:
  python scripts/ablation.py --num_seeds=3 -- --config.data.name=cifar10_jpeg
  python scripts/ablation.py --rows=0,5,12 --workdir=runs/three

Exit codes: 0 all rows are trained, {common.EXIT_CODES},
or that of the run that ended otherwise, such as 75, interrupted and saved.
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
    common.check_flags(flags, ("config", "workdir", "config.num_seeds"), "the ablation")
    rows = _rows(options.rows)
    from alexnet_jax.experiments import compare
    from alexnet_jax.run import writers  # imports JAX, as --help does not

    entries = [compare.Entry(f"{number:02}-{name}", f"{_ROWS}:{number}") for number, name in rows]
    writers.log_to_terminal()
    code = compare.train(entries, options.workdir, options.num_seeds, flags)
    if code:
        return code
    print(compare.compare(entries, options.workdir, options.num_seeds))
    print(f"Next: python scripts/results.py {options.workdir}/*/ --into=FILE", file=sys.stderr)
    return 0


def _rows(chosen: str) -> list[tuple[int, str]]:
    names = [name for name, _ in runpy.run_path(str(_ROWS))["STEPS"]]
    try:
        numbers = [int(number) for number in chosen.split(",")] if chosen else range(len(names))
        by_number = dict(enumerate(names))
        return [(number, by_number[number]) for number in numbers]
    except (KeyError, ValueError):
        raise InputError(
            f"--rows={chosen} must be numbers between 0 and {len(names) - 1}, such as 0,3: "
            f"{', '.join(f'{i} {name}' for i, name in enumerate(names))}."
        ) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Trains every row of configs/ablation.py, from classic to best.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [options] [-- FLAG ...]",
    )
    parser.add_argument("--rows", default="", metavar="N,N", help="only these (default: all)")
    parser.add_argument(
        "--num_seeds", type=int, default=3, metavar="R", help="seeds of each (default: 3)"
    )
    parser.add_argument(
        "--workdir",
        type=common.path,
        default=Path("runs/ablation"),
        help="holds the run folders (default: runs/ablation)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
