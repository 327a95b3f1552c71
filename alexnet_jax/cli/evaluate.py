"""Measures the network of a run on a split: ``python scripts/evaluate.py runs/digits``.

Run `python scripts/evaluate.py --help` for what it takes.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alexnet_jax.cli import common
from alexnet_jax.cli.network_arguments import add_run, open_network

if TYPE_CHECKING:
    from alexnet_jax.evaluation import Evaluation
    from alexnet_jax.inference.predictor import Network

_EPILOG = f"""\
SPLIT is test, validation (what the run held out of train) or train, as the run has them; anything
else is a split in the language of TFDS, such as "test[:50%]".

examples:
  python scripts/evaluate.py runs/digits
  python scripts/evaluate.py runs/digits --checkpoint=best --split=validation --json=best.json
  python scripts/evaluate.py runs/cifar10 --data.name=cifar10_jpeg --json=- | jq .results

Exit codes: 0 measured, {common.EXIT_CODES}.
"""
_MOST_CLASSES = 20  # Of a confusion matrix that a terminal has room for.


@common.entry_point()
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program.

    Args:
        arguments: The command line after the program's name; None takes the process's own.

    Returns:
        The exit code, as --help lists them.
    """
    options = _parser().parse_args(arguments)
    from alexnet_jax.evaluation import evaluate_network  # imports JAX, as --help does not
    from alexnet_jax.run.directory import format_json, write_json

    network = open_network(options)
    data = network.config.data.copy_and_resolve_references()
    for key in ("name", "data_dir"):
        given = getattr(options, f"data.{key}")
        if given is not None:
            data[key] = given
    evaluation = evaluate_network(network, options.split, data, options.views)
    report = _report(network, evaluation)
    if options.json == Path("-"):
        print(format_json(report))
        return 0
    print(_describe(network, evaluation))
    if options.json:
        write_json(options.json, report)
        print(f"Written to {options.json}.")
    else:
        print(f"Next: python scripts/predict.py {options.run} IMAGE...")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Measures the network of a run: loss, accuracy, and class by class.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run(parser)
    parser.add_argument("--split", default="test", help="which images (default: test)")
    parser.add_argument(
        "--data.name", metavar="NAME", help="another prepared data set, of the same classes"
    )
    parser.add_argument(
        "--data.data_dir", metavar="DIR", help="where data sets lie (default: as the run had it)"
    )
    parser.add_argument(
        "--views",
        metavar="NAME",
        help="of each image, whose answers are averaged: flip, flip_translate, ten_crop, or none "
        "(default: as the run had it)",
    )
    parser.add_argument(
        "--json",
        type=common.path,
        metavar="FILE",
        help="write all figures there; - prints them",
    )
    return parser


def _report(network: "Network", evaluation: "Evaluation") -> dict[str, Any]:
    """Returns what JSON is to hold; each result as ``results.json`` has it."""
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
    """Writes the figures for a person; class by class as the report has them.

    That is, of plain images, and of the averaged weights, if these are kept.
    """
    from alexnet_jax.experiments.report import class_table

    lines = [
        f"{network.folder.name}, step {network.step:,}, on {evaluation.data} "
        f"{evaluation.split}: {evaluation.images:,} images",
        "",
    ]
    for name, result in evaluation.results.items():
        weights = "averaged weights" if name.endswith("_ema") else "weights"
        weights += ", views" if "_tta" in name else ""
        lines.append(
            f"{weights:<23}  loss {result['loss']:.4f}  accuracy {100 * result['accuracy']:.2f}%"
        )
    *_, (name, judged) = (each for each in evaluation.results.items() if "_tta" not in each[0])
    of = ", of the averaged weights" if name.endswith("_ema") else ""
    lines += ["", f"Class by class{of}:", class_table(judged["confusion"], network.class_names)]
    if len(network.class_names) <= _MOST_CLASSES:
        lines += ["", f"Confusion{of} (rows are true classes):"]
        lines += _confusion_lines(judged["confusion"].tolist(), network.class_names)
    return "\n".join([*lines, ""])


def _confusion_lines(counts: list[list[int]], names: tuple[str, ...]) -> list[str]:
    name_width = max(map(len, names))
    columns = [name[:6] for name in names]
    width = max(len(f"{n:,}") for n in [*map(max, counts)])
    width = max(width, *map(len, columns))
    lines = [" " * name_width + "".join(f"  {column:>{width}}" for column in columns)]
    for name, row in zip(names, counts, strict=True):
        cells = (f"{count:,}" if count else "." for count in row)
        lines.append(f"{name:<{name_width}}" + "".join(f"  {cell:>{width}}" for cell in cells))
    return lines


if __name__ == "__main__":
    sys.exit(main())
