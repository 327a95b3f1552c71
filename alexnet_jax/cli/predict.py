"""Says what images show: ``python scripts/predict.py runs/digits three.png photos/``.

Run `python scripts/predict.py --help` for what it takes.
"""

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from alexnet_jax.cli import common
from alexnet_jax.cli.network_arguments import add_not_averaged, add_run, open_network
from alexnet_jax.errors import EXIT_BAD_INPUT, InputError, printable

if TYPE_CHECKING:
    import numpy as np

    from alexnet_jax.inference.predictor import Network

_EPILOG = f"""\
An IMAGE is a BMP, GIF, JPEG, PNG, PPM, TIFF or WebP file, or a folder, of which all such files are
taken, also those in folders below.

examples:
  python scripts/predict.py runs/digits three.png
  python scripts/predict.py runs/cifar10 photos/ --top=1 --sheet=sheet.png
  python scripts/predict.py runs/cifar10 cat.jpg --explain=explained
  python scripts/predict.py runs/cifar10 photos/ --format=csv > answers.csv

Exit codes: 0 all images have an answer, 1 some could not be read and the others have one,
{common.EXIT_CODES}.
"""
FORMATS = ("table", "json", "csv")
MOST_ON_A_SHEET = 600
_AT_ONCE = 64


class Predicted(NamedTuple):
    """An image with its answer: the most probable classes first.

    The pixels are kept only for pictures: there may be any number of images.
    """

    file: str
    image: "np.ndarray | None"
    top: list[tuple[str, float]]


@common.entry_point()
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program.

    Args:
        arguments: The command line after the program's name; None takes the process's own.

    Returns:
        The exit code, as --help lists them.
    """
    options = _parser().parse_args(arguments)
    if options.top < 1:
        raise InputError(f"--top={options.top} is too few; it must be at least 1.")
    if options.format not in FORMATS:
        raise InputError(
            f"--format={options.format} is unknown; choose one of {', '.join(FORMATS)}."
        )
    files = list(find_images(options.images))
    if options.sheet and len(files) > MOST_ON_A_SHEET:
        raise InputError(
            f"--sheet has room for {MOST_ON_A_SHEET} images, and there are {len(files):,}; name "
            "fewer at a time."
        )
    _check_places(options, files)
    network = open_network(options)
    errors: dict[str, str] = {}
    keep = bool(options.sheet or options.explain)
    predicted = _predict_files(network, files, options.top, errors, keep)
    shown = _WRITERS[options.format](predicted, network, errors)
    if options.format != "json":
        for error in errors.values():
            print(f"error: {error}", file=sys.stderr)
    _draw(options, network, shown)
    if not shown:
        return EXIT_BAD_INPUT
    return 1 if errors else 0


def _check_places(options: argparse.Namespace, files: list[str]) -> None:
    """Refuses to draw over the images."""
    images = {Path(file).resolve() for file in files}
    if options.sheet and options.sheet.resolve() in images:
        raise InputError(
            f"--sheet={options.sheet} is one of the images, which it would replace; name another."
        )
    if options.explain and options.explain.resolve() in {image.parent for image in images}:
        raise InputError(
            f"--explain={options.explain} is where the images lie, which their explanations might "
            "replace; name another folder."
        )


def find_images(paths: Sequence[str]) -> Iterator[str]:
    """Yields the files that are named, and the images in the folders that are named, in order.

    Raises:
        InputError: A folder holds no image.
    """
    from alexnet_jax.data.prepare.trees import IMAGE_SUFFIXES

    for path in paths:
        if not os.path.isdir(path):
            yield path
            continue
        found = False
        for folder, folders, files in os.walk(path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(files):
                if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                    found = True
                    yield os.path.join(folder, name)
        if not found:
            raise InputError(f"the folder {path} holds no image; name one that does.")


def _predict_files(
    network: "Network", files: list[str], top: int, errors: dict[str, str], keep: bool
) -> Iterator[Predicted]:
    """Answers file by file, some at a time; what cannot be read is noted in `errors`."""
    import numpy as np
    from tqdm import tqdm

    # On standard error, so that answers can be piped; for a terminal that shows both it is hidden.
    hidden = True if sys.stdout.isatty() else None
    with tqdm(total=len(files), desc="Predicting", unit="img", disable=hidden, delay=2) as bar:
        for start in range(0, len(files), _AT_ONCE):
            names, images = [], []
            for file in files[start : start + _AT_ONCE]:
                try:
                    images.append(network.prepare(file))
                    names.append(file)
                except InputError as error:
                    errors[file] = str(error)
                bar.update()
            if images:
                ranked = network.predict(np.stack(images)).top(top)
                yield from map(Predicted, names, images if keep else [None] * len(images), ranked)


def _write_table(
    predicted: Iterator[Predicted], network: "Network", errors: dict[str, str]
) -> list[Predicted]:
    shown = []
    width = max(len("class"), *map(len, network.class_names))
    for each in predicted:
        shown.append(each)
        print(printable(each.file))
        for name, probability in each.top:
            bar = "#" * round(30 * probability)
            print(f"  {printable(name):<{width}}  {probability:>6.1%}  {bar}".rstrip())
    return shown


def _write_csv(
    predicted: Iterator[Predicted], network: "Network", errors: dict[str, str]
) -> list[Predicted]:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["file", "rank", "class", "probability"])
    shown = []
    for each in predicted:
        shown.append(each)
        # As `sys.stdout` may be strict, and a name on Linux any bytes.
        file = os.fsencode(each.file).decode(errors="backslashreplace")
        for rank, (name, probability) in enumerate(each.top, start=1):
            writer.writerow([file, rank, name, f"{probability:.6g}"])
    return shown


def _write_json(
    predicted: Iterator[Predicted], network: "Network", errors: dict[str, str]
) -> list[Predicted]:
    shown = list(predicted)
    answer: dict[str, Any] = {
        "run": str(network.folder),
        "checkpoint": network.step,
        "predictions": [
            {
                "file": each.file,
                "top": [{"class": name, "probability": share} for name, share in each.top],
            }
            for each in shown
        ],
        "errors": [{"file": file, "error": error} for file, error in errors.items()],
    }
    print(json.dumps(answer, indent=2))
    return shown


_WRITERS = {"table": _write_table, "csv": _write_csv, "json": _write_json}


def _draw(options: argparse.Namespace, network: "Network", shown: list[Predicted]) -> None:
    """Draws the sheet and the explanations that are asked for."""
    if not shown or not (options.sheet or options.explain):
        return
    import numpy as np
    from tqdm import tqdm

    from alexnet_jax.inference.contact_sheet import Answer, contact_sheet, explanation
    from alexnet_jax.inference.saliency import smooth_grad

    answers = [
        Answer(Path(each.file).name, each.image, *each.top[0])
        for each in shown
        if each.image is not None
    ]
    try:
        if options.sheet:
            contact_sheet(answers).save(options.sheet, format="PNG")
            print(f"Sheet: {options.sheet}", file=sys.stderr)
        if options.explain:
            folder = options.explain
            folder.mkdir(parents=True, exist_ok=True)
            for answer, name in zip(
                tqdm(answers, "Explaining", unit="img", disable=None, delay=2),
                _file_names([each.file for each in shown]),
                strict=True,
            ):
                label = network.class_names.index(answer.label)
                saliency = smooth_grad(network, answer.image[None], np.array([label]))[0]
                explanation(answer, saliency).save(folder / name, format="PNG")
            print(f"Explanations: {folder}", file=sys.stderr)
    except OSError as error:
        raise InputError(
            f"{error.filename or options.sheet or options.explain} cannot be written "
            f"({error.strerror or error}); name another place."
        ) from None


def _file_names(files: list[str]) -> Iterator[str]:
    """Yields a name for a picture of each file, no two alike."""
    seen: set[str] = set()
    for file in files:
        stem = Path(file).stem
        name, number = f"{stem}.png", 2
        while name in seen:
            name, number = f"{stem}-{number}.png", number + 1
        seen.add(name)
        yield name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Says what images show, by the network of a run.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run(parser)
    parser.add_argument(
        "images", metavar="IMAGE", nargs="+", help="an image, or a folder of images"
    )
    parser.add_argument(
        "--top", type=int, default=5, metavar="K", help="classes to tell of each (default: 5)"
    )
    parser.add_argument("--format", default="table", help="table (default), json or csv")
    parser.add_argument(
        "--sheet",
        type=common.path,
        metavar="FILE",
        help="draw all images with answers on one PNG",
    )
    parser.add_argument(
        "--explain",
        type=common.path,
        metavar="FOLDER",
        help="draw a PNG of each image with the pixels that its answer depends on",
    )
    add_not_averaged(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
