"""Makes the report of a run again, or compares several.

Run `python scripts/report.py --help` for what it takes.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from alexnet_jax.cli import common
from alexnet_jax.errors import InputError

_EPILOG = f"""\
RUN is the folder of a run, as --workdir named it, finished or still going on.
One is given its report anew; of several, a page shows the curves over each other, the results, and
the options in which they differ.

examples:
  python scripts/report.py runs/digits
  python scripts/report.py runs/digits --output=digits.html
  python scripts/report.py runs/narrow runs/wide --output=widths.html

Exit codes: 0 the page lies ready, {common.EXIT_CODES}.
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
    from alexnet_jax.experiments import report  # imports JAX, as --help does not

    output = _checked(options.output)
    if len(options.runs) == 1:
        page = report.write_report(options.runs[0], output)
    else:
        page = report.write_comparison(options.runs, output or Path("comparison.html"))
    print(page)
    print("Next: open it in a browser; it needs no internet connection.", file=sys.stderr)
    return 0


def _checked(output: Path | None) -> Path | None:
    """Refuses places where no page can go, or where it would replace another thing."""
    if output is None:
        return None
    if output.suffix not in (".html", ".htm"):
        raise InputError(f"--output={output} names no page; let it end in .html.")
    if not output.parent.is_dir():
        raise InputError(f"--output={output} lies in no folder; make {output.parent} first.")
    return output


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Makes the report of a run again, or compares several.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", type=common.path, help="the folder of a run"
    )
    parser.add_argument(
        "--output",
        type=common.path,
        metavar="FILE",
        help="where the page goes (default: RUN/report.html; of several, comparison.html)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
