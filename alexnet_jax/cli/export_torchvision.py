"""Write the network of a run as a state dict of torchvision's AlexNet.

RUN must be of a network that torchvision has: config.model.name "alexnet_owt" with its default
kernels, strides and paddings; widths and classes may differ. What was imported is exported bit for
bit. Only a .pth is written by PyTorch, which the extra "peers" installs.

Examples:
  alexnet-jax export-torchvision runs/imagenet alexnet.pth
  alexnet-jax export-torchvision runs/imagenet alexnet.safetensors --checkpoint=best
"""

from collections.abc import Sequence

from alexnet_jax.cli import common
from alexnet_jax.cli.network_arguments import add_no_ema, add_run, open_network


@common.entry_point
def main(arguments: Sequence[str]) -> None:
    """Runs the command."""
    parser = common.create_parser(
        "alexnet-jax export-torchvision", __doc__, success="the file is written"
    )
    add_run(parser)
    add_no_ema(parser)
    help = "the file to write: .safetensors, else PyTorch's"
    parser.add_argument("out", metavar="OUT", type=common.path, help=help)
    options = parser.parse_args(arguments)
    from alexnet_jax.inference import torchvision  # imports JAX, as --help does not

    network = open_network(options)
    state_dict = torchvision.to_torchvision(network.eval_state.params)
    torchvision.check_model(network.config.model)
    torchvision.write_state_dict(state_dict, options.out)
    mean, std = (
        ", ".join(f"{value:.4g}" for value in network.info[key]) for key in ("mean", "deviation")
    )
    print(
        f"{options.out} holds the weights of {options.run} at step {network.step:,}: a state dict "
        f"for torchvision.models.alexnet(num_classes={len(network.class_names)}). Normalize its "
        f"input, on the scale 0 to 1, with mean ({mean}) and standard deviation ({std})."
    )
