"""Exports the network of a run: ``python scripts/export.py runs/digits --format=onnx``.

Run `python scripts/export.py --help` for what it takes.
"""

import argparse
import functools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from alexnet_jax.cli import common
from alexnet_jax.cli.network_arguments import add_not_averaged, add_run, open_network
from alexnet_jax.errors import InputError

_EPILOG = f"""\
FORMAT is one of
  stablehlo   network.stablehlo, for jax.export.deserialize (CPU, CUDA, ROCm, TPU)
  onnx        network.onnx, for ONNX Runtime and others
  savedmodel  saved_model/, for TensorFlow
  tflite      network.tflite, for LiteRT

Each takes uint8[batch, S, S, 3] and gives float32[batch, classes], probabilities. It is run in its
own runtime and compared with the network before it stays. class_names.json and MODEL_CARD.md lie
beside it. onnx and tflite need:
  pip install --constraint constraints.txt --editable ".[export]"

Exit codes: 0 exported, {common.EXIT_CODES}; 2 also
for an artefact that does not agree.
"""


@common.entry_point(interrupted="Interrupted; nothing half-made is left behind.")
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program.

    Args:
        arguments: The command line after the program's name; None takes the process's own.

    Returns:
        The exit code, as --help lists them.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    from alexnet_jax.inference import export  # imports JAX, which --help does without
    from alexnet_jax.inference.model_card import model_card

    command = shlex.join(["python", "scripts/export.py", *given])
    kind = export.FORMATS.get(options.format)
    if kind is None:
        known = ", ".join(export.FORMATS)
        raise InputError(f"--format={options.format} is unknown; choose one of {known}.")
    network = open_network(options)
    card = functools.partial(
        model_card, network, artefact=kind.artefact, runtime=kind.runtime, command=command
    )
    exported = export.export(
        network,
        options.format,
        options.output or Path(network.folder, "export", options.format),
        card=lambda difference: card(difference=difference),
        overwrite=options.overwrite,
    )
    weights = "averaged weights" if network.averaged else "weights"
    print(
        f"{exported.artefact}\n"
        f"  the {weights} of step {network.step:,}; {kind.runtime} gives the network's "
        f"probabilities to within {exported.difference:.1g}\n"
        f"  beside it: class_names.json, MODEL_CARD.md\n"
        "Next: docs/inference.md says how to run it without this library."
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Exports the network of a run for other runtimes, and compares them with it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run(parser)
    parser.add_argument("--format", required=True, help="stablehlo, onnx, savedmodel or tflite")
    parser.add_argument(
        "--output",
        type=common.path,
        metavar="FOLDER",
        help="a new folder (default: RUN/export/FORMAT)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    add_not_averaged(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
