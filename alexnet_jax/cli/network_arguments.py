"""What programs take alike to say which trained network they are about."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alexnet_jax.inference.predictor import Network


def add_run(parser: argparse.ArgumentParser) -> None:
    """Adds RUN, --checkpoint and --seed."""
    parser.add_argument("run", metavar="RUN", help="the run folder")
    parser.add_argument(
        "--checkpoint",
        default="newest",
        type=lambda text: int(text) if text.isdecimal() else text,
        metavar="WHICH",
        help="newest (default), best (on the validation images), or a step",
    )
    parser.add_argument(
        "--seed", type=int, metavar="SEED", help="whose network, of a run of many (default: first)"
    )


def add_not_averaged(parser: argparse.ArgumentParser) -> None:
    """Adds --not_averaged."""
    parser.add_argument(
        "--not_averaged",
        action="store_true",
        help="the weights of the last step, also where the run keeps averaged ones",
    )


def open_network(options: argparse.Namespace) -> "Network":
    """Opens the network that the options name; for programs, which it sets up first.

    Raises:
        InputError: As `alexnet_jax.load`.
    """
    from alexnet_jax import environment  # import JAX, which --help does without
    from alexnet_jax.checkpoint import manager
    from alexnet_jax.inference import predictor

    environment.prepare()
    manager.quieten_orbax()
    averaged = not getattr(options, "not_averaged", False)
    return predictor.load(
        options.run, checkpoint=options.checkpoint, averaged=averaged, seed=options.seed
    )
