"""The arguments that name a trained network, and the network that they name."""

import argparse
from typing import TYPE_CHECKING

from alexnet_jax.cli.quiet import silence_orbax

if TYPE_CHECKING:
    from alexnet_jax.inference.predictor import Network


def add_run(parser: argparse.ArgumentParser) -> None:
    """Adds RUN, --checkpoint and --seed."""
    parser.add_argument("run", metavar="RUN", help="the run folder")
    help = "newest (default), best (on the validation images), or a step"
    parser.add_argument("--checkpoint", default="newest", metavar="WHICH", help=help)
    help = "of a run of several seeds, the one whose network it is (default: the first)"
    parser.add_argument("--seed", type=int, help=help)


def add_no_ema(parser: argparse.ArgumentParser) -> None:
    """Adds --no_ema."""
    help = "use the weights of the last step, even if the run keeps an average (EMA) of them"
    parser.add_argument("--no_ema", action="store_true", help=help)


def open_network(options: argparse.Namespace) -> "Network":
    """Opens the network that the arguments name, after preparing the process for JAX.

    Raises:
        InputError: As from `alexnet_jax.load`.
    """
    from alexnet_jax import environment  # import JAX, as --help does not
    from alexnet_jax.inference import predictor

    environment.prepare()
    silence_orbax()
    which = options.checkpoint
    return predictor.load(
        options.run,
        checkpoint=int(which) if which.isdecimal() else which,
        ema=not getattr(options, "no_ema", False),
        seed=options.seed,
    )
