"""Evaluate the network of a run on a split: loss, accuracy, and each class.

SPLIT is test, validation (which the run held out of train) or train, as in the run; anything else
is a split of TFDS, such as "test[:50%]".

Examples:
  alexnet-jax evaluate runs/digits
  alexnet-jax evaluate runs/digits --checkpoint=best --split=validation --json=best.json
  alexnet-jax evaluate runs/cifar10 --data.name=cifar10_jpeg --json=- | jq .results
"""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alexnet_jax.cli import common
from alexnet_jax.cli.network_arguments import add_run, open_network

if TYPE_CHECKING:
    from alexnet_jax.inference.evaluate import Evaluation
    from alexnet_jax.inference.predictor import Network

_MAX_CLASSES = 20  # of a confusion matrix that fits in a terminal


@common.entry_point
def main(arguments: Sequence[str]) -> None:
    """Runs the command."""
    parser = common.create_parser(
        "alexnet-jax evaluate", __doc__, success="the network is evaluated"
    )
    add_run(parser)
    parser.add_argument("--split", default="test", help="default: test")
    parser.add_argument("--data.name", metavar="NAME", help="another data set, of the same classes")
    help = "folder of all data sets (default: that of the run)"
    parser.add_argument("--data.data_dir", metavar="DIR", help=help)
    help = "test-time augmentation: none, flip, flip_translate or ten_crop (default: as the run)"
    parser.add_argument("--tta", metavar="NAME", help=help)
    help = "write all numbers to FILE; - prints them"
    parser.add_argument("--json", type=common.path, metavar="FILE", help=help)
    options = parser.parse_args(arguments)
    from alexnet_jax.inference.evaluate import evaluate_network  # imports JAX, as --help does not
    from alexnet_jax.run import files

    network = open_network(options)
    given = {key: getattr(options, f"data.{key}") for key in ("name", "data_dir")}
    given = {key: value for key, value in given.items() if value is not None}
    data = dataclasses.replace(network.config.data, **given)
    evaluation = evaluate_network(network, options.split, data, options.tta)
    numbers = _numbers(network, evaluation)
    if options.json == Path("-"):
        print(files.format_json(numbers))
        return
    print(_describe(network, evaluation))
    if options.json:
        files.write_json(options.json, numbers)
        print(f"Written to {options.json}.")
    else:
        print(f"Next: alexnet-jax predict {shlex.quote(options.run)} IMAGE...")


def _numbers(network: "Network", evaluation: "Evaluation") -> dict[str, Any]:
    """Returns what --json writes; each result as in ``results.json``."""
    results = {
        name: {key: float(result[key]) for key in ("loss", "accuracy")}
        | {"confusion": result["confusion"].tolist()}
        for name, result in evaluation.results.items()
    }
    return {
        "run": str(network.folder),
        "checkpoint": network.step,
        "data": evaluation.data,
        "split": evaluation.split,
        "images": evaluation.images,
        "class_names": list(network.class_names),
        "results": results,
    }


def _describe(network: "Network", evaluation: "Evaluation") -> str:
    """Formats all results, and the classes of the last one without test-time augmentation."""
    from alexnet_jax.experiments.report import class_table

    lines = [
        f"{network.folder.name}, step {network.step:,}, on {evaluation.data} "
        f"{evaluation.split}: {evaluation.images:,} images",
        "",
    ]
    for name, result in evaluation.results.items():
        what = "averaged weights" if name.endswith("_ema") else "weights"
        what += ", TTA" if "_tta" in name else ""
        accuracy = f"{100 * result['accuracy']:.2f}%"
        lines.append(f"{what:<23}  loss {result['loss']:.4f}  accuracy {accuracy}")
        if "_tta" not in name:
            of = ", averaged weights" if name.endswith("_ema") else ""
            confusion = result["confusion"]
    names = network.class_names
    lines += ["", f"Class by class{of}:", class_table(confusion, names)]
    if len(names) <= _MAX_CLASSES:
        lines += ["", f"Confusion matrix{of} (rows are true classes):"]
        lines += _matrix(confusion.tolist(), names)
    return "\n".join([*lines, ""])


def _matrix(counts: list[list[int]], names: tuple[str, ...]) -> list[str]:
    heads = [name[:6] for name in names]
    rows = [[f"{count:,}" if count else "." for count in row] for row in counts]
    width = max(len(cell) for row in [heads, *rows] for cell in row)
    first = max(map(len, names))
    return [
        f"{name:<{first}}" + "".join(f"  {cell:>{width}}" for cell in row)
        for name, row in zip(("", *names), [heads, *rows], strict=True)
    ]
