"""Makes the table of results from run folders: ``python scripts/results.py runs/a runs/b``.

Run `python scripts/results.py --help` for what it takes.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from alexnet_jax.cli import common

_EPILOG = f"""\
Runs that differ in nothing but their seeds make one row: mean, standard deviation, and the 95%
interval of the mean by Student's t. A row is named after the first of its folders, without the
"-0" or "-seed0" of its seed.

examples:
  python scripts/results.py runs/classic runs/best
  python scripts/results.py runs/best-*/ --into=docs/results.md --pictures=docs/results
  python scripts/results.py runs/best-*/ --records=records; python scripts/results.py records/*/

Exit codes: 0 done, {common.EXIT_CODES}.
"""


@common.entry_point()
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program.

    Args:
        arguments: The command line after the program's name; None takes the process's own.

    Returns:
        The exit code, as --help lists them.
    """
    options = _parser().parse_args(arguments)
    from alexnet_jax.experiments import aggregate  # imports JAX, as --help does not

    runs = [aggregate.read_run(folder) for folder in options.folders]
    groups = aggregate.group(runs)
    names = [aggregate.name_of(members[0]) for members in groups]
    text = aggregate.table(groups, names)
    if options.pictures:
        page = options.into or Path("page.md")
        text += f"\n\n{aggregate.details(groups, names, options.pictures, page)}"
    if options.into:
        aggregate.put_between_marks(options.into, text)
    if options.records:
        aggregate.keep_records(runs, options.records)
    print(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Makes the table of results from the folders of finished runs.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
    return parser


if __name__ == "__main__":
    sys.exit(main())
