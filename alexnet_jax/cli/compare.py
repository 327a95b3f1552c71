r"""Train several configs over several seeds, and compare them.

Each CONFIG, a file or the name of one that comes with alexnet_jax, has a run folder in WORKDIR. If
interrupted, the same command skips finished runs and resumes the other one. What follows -- is
passed to every run. At the end WORKDIR has table.md, comparison.png (validation accuracy over time,
with the standard deviation over the seeds) and comparison.html.

To choose between configs, do not evaluate the test set: -- --noconfig.eval.test

Examples:
  alexnet-jax compare cifar10 resnet18 vgg11
  alexnet-jax compare cifar10 my_config.py --seeds=5 --workdir=runs/two \
      -- --noconfig.eval.test --config.train.epochs=5
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from alexnet_jax.cli import common


@common.entry_point
def main(arguments: Sequence[str]) -> int:
    """Runs the command."""
    parser = common.create_parser(
        "alexnet-jax compare",
        __doc__,
        success="all runs are finished",
        other=", or that of a run which ended otherwise, such as 75, interrupted and saved",
        usage="%(prog)s [options] CONFIG [CONFIG ...] [-- FLAG ...]",
    )
    parser.add_argument("configs", metavar="CONFIG", nargs="+", help="a config file, or its name")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each config (default: 3)")
    help = "a run for each seed, which streamed images need (default: one run for all seeds)"
    parser.add_argument("--separate_runs", action="store_true", help=help)
    help = "folder of the run folders (default: runs/compare)"
    parser.add_argument("--workdir", type=common.path, default=Path("runs/compare"), help=help)
    own, flags = common.split(arguments)
    options = parser.parse_args(own)
    taken = ["config", "workdir", "config.num_seeds"]
    taken += ["config.seed"] * options.separate_runs
    common.check_flags(flags, taken, "the comparison")
    from alexnet_jax.config import load_config

    for config in options.configs:
        load_config(config)  # a mistake in the last one is found before the first one trains
    from alexnet_jax.experiments import compare  # imports JAX, as --help does not
    from alexnet_jax.run import writers

    entries = [compare.entry(config) for config in options.configs]
    writers.log_to_terminal()
    separately = options.separate_runs
    code = compare.train(entries, options.workdir, options.seeds, flags, separately=separately)
    if code == 0:
        print(compare.compare(entries, options.workdir, options.seeds, separately=separately))
        print(
            f"Next: open {options.workdir}/comparison.png and comparison.html; the table is in "
            "table.md.",
            file=sys.stderr,
        )
    return code
