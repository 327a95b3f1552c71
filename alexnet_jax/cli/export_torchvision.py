"""Writes the network of a run folder as a state dict of torchvision's AlexNet.

Run `python scripts/export_torchvision.py --help` for what it takes.
"""

import argparse
import sys
from collections.abc import Sequence

from alexnet_jax.cli import common
from alexnet_jax.cli.network_arguments import add_not_averaged, add_run, open_network

_EPILOG = f"""\
RUN must be of a network that torchvision has, which is config.model.name "alexnet_owt" with its own
kernels, strides and paddings; widths and classes may be others. What was imported comes out again
bit for bit. A .pth is written by PyTorch, which the extra "peers" installs; a .safetensors is not.

examples:
  python scripts/export_torchvision.py runs/imagenet alexnet.pth
  python scripts/export_torchvision.py runs/imagenet alexnet.safetensors --checkpoint=best

Exit codes: 0 written, {common.EXIT_CODES}.
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
    from alexnet_jax.inference import torchvision  # imports JAX, as --help does not

    network = open_network(options)
    state_dict = torchvision.to_torchvision(network.answering.params)
    torchvision.check_model(network.config.model)
    torchvision.write_state_dict(state_dict, options.out)
    classes = len(network.class_names)
    print(
        f"{options.out} holds the weights of {options.run} at step {network.step:,}: a state dict "
        f"for torchvision.models.alexnet(num_classes={classes}), whose input has the mean "
        f"{_listed(network.info['mean'])} and the deviation {_listed(network.info['deviation'])} "
        "taken off and divided by, on the scale 0 to 1."
    )
    return 0


def _listed(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Writes the network of a run folder as a state dict of torchvision's AlexNet.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run(parser)
    add_not_averaged(parser)
    parser.add_argument(
        "out",
        metavar="OUT",
        type=common.path,
        help="the file to write: .safetensors, else PyTorch's",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
