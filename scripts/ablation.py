"""Train every row of configs/ablation.py, from classic to best, and make their table.

Each row has a run folder of its own, WORKDIR/NN-name. If interrupted, the same command skips
finished rows and resumes the other one. What follows -- is passed to every run. At the end WORKDIR
has table.md, comparison.png and comparison.html, as from `alexnet-jax compare`.

The rows are for choosing, so they are compared on validation images, held out of the training
images, and the test set is not evaluated; --config.eval.test behind -- does, for a last report.

Examples:
  python scripts/ablation.py --num_seeds=3 -- --config.data.name=cifar10_jpeg
  python scripts/ablation.py --rows=0,5,12 --workdir=runs/three
"""

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from alexnet_jax.cli import common
from alexnet_jax.errors import InputError

_ROWS = Path(__file__).parents[1] / "configs" / "ablation.py"


@common.entry_point
def main(arguments: Sequence[str]) -> int:
    """Runs the program."""
    own, flags = common.split(arguments)
    parser = common.create_parser(
        "python scripts/ablation.py",
        __doc__,
        success="all rows are trained",
        other=", or that of a run which ended otherwise, such as 75, interrupted and saved",
        usage="%(prog)s [options] [-- FLAG ...]",
    )
    parser.add_argument("--rows", default="", metavar="N,N", help="only these (default: all)")
    help = "seeds of each row (default: 3)"
    parser.add_argument("--num_seeds", type=int, default=3, metavar="N", help=help)
    parser.add_argument(
        "--workdir",
        type=common.path,
        default=Path("runs/ablation"),
        help="folder of the run folders (default: runs/ablation)",
    )
    options = parser.parse_args(own)
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
