"""Make a run folder of the weights of torchvision's AlexNet.

FILE is what torchvision downloads for `alexnet`, a state dict that torch.save wrote (PyTorch must
be installed to read these; no code in them is run), or the same as .safetensors. Its layers may
have other widths, and there may be another number of classes.

Examples:
  alexnet-jax import-torchvision ~/Downloads/alexnet-owt-7be5be79.pth runs/imagenet_owt
  alexnet-jax import-torchvision flowers.safetensors runs/flowers --class_names=flowers.txt
"""

import shlex
from collections.abc import Sequence

from alexnet_jax.cli import common
from alexnet_jax.cli.quiet import silence_orbax
from alexnet_jax.errors import InputError


@common.entry_point
def main(arguments: Sequence[str]) -> None:
    """Runs the command."""
    parser = common.create_parser(
        "alexnet-jax import-torchvision", __doc__, success="the run folder is made"
    )
    parser.add_argument("file", metavar="FILE", type=common.path, help="the weights")
    parser.add_argument("workdir", metavar="OUT", type=common.path, help="the run folder to make")
    parser.add_argument(
        "--class_names",
        metavar="FILE",
        type=common.path,
        help="a text file with the name of a class in each line, in the order of the labels "
        "(default: the synsets of ImageNet for 1,000 classes, else class_0, class_1, ...)",
    )
    options = parser.parse_args(arguments)
    names: list[str] = []
    if options.class_names:
        try:
            names = options.class_names.read_text().splitlines()
        except (OSError, ValueError) as error:
            raise InputError(
                f"--class_names={options.class_names} cannot be read ({error}); name a text file."
            ) from None
    from alexnet_jax.inference import torchvision  # imports JAX, as --help does not

    class_names = tuple(name.strip() for name in names if name.strip())
    silence_orbax()
    found = torchvision.import_run(options.file, options.workdir, class_names)
    config = shlex.quote(f"--config=finetune:{options.workdir}")
    print(
        f"{options.workdir} is a run folder now, at step 0: AlexNet with {found['classes'][0]:,} "
        f"classes, convolutions of {found['features']} channels and layers of {found['hidden']} "
        f"units.\nNext, to train it on other classes: alexnet-jax train {config} "
        "--config.data.name=NAME"
    )
