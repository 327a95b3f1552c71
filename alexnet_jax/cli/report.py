"""Make the report of a run again, or compare several runs on one page.

RUN is the folder of a run, finished or not. The page of several runs shows their curves over each
other, their results, and the options in which they differ.

Examples:
  alexnet-jax report runs/digits
  alexnet-jax report runs/digits --output=digits.html
  alexnet-jax report runs/narrow runs/wide --output=widths.html
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from alexnet_jax.cli import common
from alexnet_jax.errors import InputError


@common.entry_point
def main(arguments: Sequence[str]) -> None:
    """Runs the command."""
    parser = common.create_parser("alexnet-jax report", __doc__, success="the page is written")
    parser.add_argument("runs", metavar="RUN", nargs="+", type=common.path, help="a run folder")
    help = "the page (default: RUN/report.html; of several runs, comparison.html)"
    parser.add_argument("--output", type=common.path, metavar="FILE", help=help)
    options = parser.parse_args(arguments)
    output = options.output
    if output and output.suffix not in (".html", ".htm"):
        raise InputError(f"--output={output} must end in .html.")
    if output and not output.parent.is_dir():
        raise InputError(f"--output={output} is in no folder; create {output.parent} first.")
    from alexnet_jax.experiments.report import page  # imports JAX, as --help does not

    if len(options.runs) == 1:
        path = page.write_report(options.runs[0], output)
    else:
        path = page.write_comparison(options.runs, output or Path("comparison.html"))
    print(path)
    print("Next: open it in a browser; it needs no internet connection.", file=sys.stderr)
