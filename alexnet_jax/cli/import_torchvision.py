"""Makes a run folder of the weights of torchvision's AlexNet.

Run `python scripts/import_torchvision.py --help` for what it takes.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from alexnet_jax.cli import common
from alexnet_jax.errors import InputError

_EPILOG = f"""\
FILE is what torchvision downloads for `alexnet`, a state dict that torch.save wrote (PyTorch must
be installed to read these; nothing in them is run), or the same as .safetensors. The network may
have other widths and another number of classes.

examples:
  python scripts/import_torchvision.py ~/Downloads/alexnet-owt-7be5be79.pth runs/imagenet_owt
  python scripts/import_torchvision.py flowers.safetensors runs/flowers --class_names=flowers.txt

Exit codes: 0 the run folder is made, {common.EXIT_CODES}.
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

    names = _read_names(options.class_names) if options.class_names else ()
    found = torchvision.import_run(options.file, options.workdir, names)
    (classes,) = found["classes"]
    print(
        f"{options.workdir} is a run folder now, at step 0: AlexNet with {classes:,} classes, "
        f"convolutions of {found['features']} channels and layers of {found['hidden']} units.\n"
        "Next, to train it on other classes: python -m alexnet_jax.main "
        + shlex.quote(f"--config=configs/finetune.py:{options.workdir}")
        + " --config.data.name=NAME"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Makes a run folder of the weights of torchvision's AlexNet.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", type=common.path, help="the weights")
    parser.add_argument("workdir", metavar="OUT", type=common.path, help="the run folder to make")
    parser.add_argument(
        "--class_names",
        metavar="TEXT",
        type=common.path,
        help="a file with the name of a class in each line, in the order of the labels (default: "
        "the synsets of ImageNet for 1,000 classes, else class_0, class_1, ...)",
    )
    return parser


def _read_names(path: Path) -> tuple[str, ...]:
    try:
        return tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); name a text file.") from None


if __name__ == "__main__":
    sys.exit(main())
