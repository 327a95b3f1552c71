"""Export the network of a run for other runtimes, and compare it there.

FORMAT is one of
  stablehlo   network.stablehlo, for jax.export.deserialize (CPU, CUDA, ROCm, TPU)
  onnx        network.onnx, for ONNX Runtime and others
  savedmodel  saved_model/, for TensorFlow
  tflite      network.tflite, for LiteRT

Each maps uint8[batch, S, S, 3] to probabilities, float32[batch, classes]. It is run in its own
runtime, and kept only if it agrees with the network; class_names.json and MODEL_CARD.md are written
beside it. onnx and tflite need: pip install "alexnet_jax[export]"
"""

import functools
import shlex
from collections.abc import Sequence
from pathlib import Path

from alexnet_jax.cli import common
from alexnet_jax.cli.network_arguments import add_no_ema, add_run, open_network


@common.entry_point
def main(arguments: Sequence[str]) -> None:
    """Runs the command."""
    formats = ("stablehlo", "onnx", "savedmodel", "tflite")
    parser = common.create_parser("alexnet-jax export", __doc__, success="the network is exported")
    add_run(parser)
    add_no_ema(parser)
    parser.add_argument("--format", required=True, choices=formats, help="see below")
    help = "a new folder (default: RUN/export/FORMAT)"
    parser.add_argument("--output", type=common.path, metavar="FOLDER", help=help)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    options = parser.parse_args(arguments)
    from alexnet_jax.inference import export  # imports JAX, as --help does not
    from alexnet_jax.inference.model_card import model_card

    kind = export.FORMATS[options.format]
    network = open_network(options)
    card = functools.partial(
        model_card,
        network,
        artifact=kind.artifact,
        runtime=kind.runtime,
        command=shlex.join(["alexnet-jax", "export", *arguments]),
    )
    exported = export.export(
        network,
        options.format,
        options.output or Path(network.folder, "export", options.format),
        card=lambda difference: card(difference=difference),
        overwrite=options.overwrite,
    )
    weights = "averaged weights" if network.ema else "weights"
    print(
        f"{exported.artifact}\n"
        f"  the {weights} of step {network.step:,}; {kind.runtime} gives the network's "
        f"probabilities to within {exported.difference:.1g}\n"
        "  beside it: class_names.json, MODEL_CARD.md\n"
        "Next: MODEL_CARD.md says what it takes and what it returns."
    )
