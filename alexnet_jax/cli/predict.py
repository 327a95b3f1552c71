"""Predict the classes of images with the network of a run.

An IMAGE is a BMP, GIF, JPEG, PNG, PPM, TIFF or WebP file, or a folder, which stands for all such
files in it and in its subfolders.

Examples:
  alexnet-jax predict runs/digits three.png
  alexnet-jax predict runs/cifar10 photos/ --top=1 --sheet=sheet.png
  alexnet-jax predict runs/cifar10 cat.jpg --explain=explained
  alexnet-jax predict runs/cifar10 photos/ --format=csv > predictions.csv
"""

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from alexnet_jax.cli import common
from alexnet_jax.cli.network_arguments import add_no_ema, add_run, open_network
from alexnet_jax.errors import EXIT_BAD_INPUT, InputError, printable

if TYPE_CHECKING:
    import numpy as np

    from alexnet_jax.inference.predictor import Network

MAX_ON_SHEET = 600
_BATCH_SIZE = 64


class Predicted(NamedTuple):
    """An image with its most probable classes, first the top one.

    The pixels are None unless they are to be drawn: there may be any number of images.
    """

    file: str
    image: "np.ndarray | None"
    top: list[tuple[str, float]]


@common.entry_point
def main(arguments: Sequence[str]) -> int:
    """Runs the command."""
    options = _parse(arguments)
    files = list(find_images(options.images))
    if options.sheet and len(files) > MAX_ON_SHEET:
        raise InputError(
            f"--sheet has room for {MAX_ON_SHEET} images and there are {len(files):,}; name fewer."
        )
    images = {Path(file).resolve() for file in files}
    if options.sheet and options.sheet.resolve() in images:
        raise InputError(
            f"--sheet={options.sheet} is one of the images and would replace it; name another file."
        )
    if options.explain and options.explain.resolve() in {image.parent for image in images}:
        raise InputError(
            f"--explain={options.explain} has some of the images, which might be replaced; name "
            "another folder."
        )
    network = open_network(options)
    errors: dict[str, str] = {}
    draw = bool(options.sheet or options.explain)
    predicted = _predict(network, files, options.top, errors, keep_pixels=draw)
    if options.format == "json":
        shown = list(predicted)
        _print_json(shown, network, errors)
    else:
        print_each = _print_csv if options.format == "csv" else _print_table
        shown = list(print_each(predicted, network))
        for error in errors.values():
            print(f"error: {error}", file=sys.stderr)
    if draw and shown:
        _draw(options, network, shown)
    if not shown:
        return EXIT_BAD_INPUT
    return 1 if errors else 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = common.create_parser(
        "alexnet-jax predict",
        __doc__,
        success="all images are predicted, 1 some of them could not be read",
    )
    add_run(parser)
    add_no_ema(parser)
    help = "an image, or a folder of images"
    parser.add_argument("images", metavar="IMAGE", nargs="+", help=help)
    help = "print the K most probable classes (default: 5)"
    parser.add_argument("--top", type=common.positive, default=5, metavar="K", help=help)
    parser.add_argument("--format", default="table", choices=("table", "json", "csv"))
    help = "draw all images and their predictions into one PNG"
    parser.add_argument("--sheet", type=common.path, metavar="FILE", help=help)
    help = "draw a PNG of each image with the pixels that its prediction depends on"
    parser.add_argument("--explain", type=common.path, metavar="FOLDER", help=help)
    return parser.parse_args(arguments)


def find_images(paths: Sequence[str]) -> Iterator[str]:
    """Yields the files among paths, and the images in the folders among them, in order.

    Raises:
        InputError: There is no image in a folder.
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
            raise InputError(f"the folder {path} has no image; name one that has.")


def _predict(
    network: "Network", files: list[str], top: int, errors: dict[str, str], *, keep_pixels: bool
) -> Iterator[Predicted]:
    """Predicts in batches; the messages of files that cannot be read go into `errors`."""
    import numpy as np
    from tqdm import tqdm

    # The bar is on standard error, which a terminal would mix with the predictions.
    hidden = True if sys.stdout.isatty() else None
    with tqdm(total=len(files), desc="Predicting", unit="img", disable=hidden, delay=2) as bar:
        for start in range(0, len(files), _BATCH_SIZE):
            images: dict[int, np.ndarray] = {}
            for index in range(start, min(start + _BATCH_SIZE, len(files))):
                try:
                    images[index] = network.prepare(files[index])
                except InputError as error:
                    errors[files[index]] = str(error)
                bar.update()
            if images:
                ranked = network.predict(np.stack(list(images.values()))).top(top)
                for (index, image), classes in zip(images.items(), ranked, strict=True):
                    yield Predicted(files[index], image if keep_pixels else None, classes)


def _print_table(predicted: Iterable[Predicted], network: "Network") -> Iterator[Predicted]:
    width = max(len("class"), *map(len, network.class_names))
    for each in predicted:
        print(printable(each.file))
        for name, probability in each.top:
            bar = "#" * round(30 * probability)
            print(f"  {printable(name):<{width}}  {probability:>6.1%}  {bar}".rstrip())
        yield each


def _print_csv(predicted: Iterable[Predicted], network: "Network") -> Iterator[Predicted]:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["file", "rank", "class", "probability"])
    for each in predicted:
        # On Linux a file name is any bytes, and `sys.stdout` may be strict.
        file = os.fsencode(each.file).decode(errors="backslashreplace")
        for rank, (name, probability) in enumerate(each.top, start=1):
            writer.writerow([file, rank, name, f"{probability:.6g}"])
        yield each


def _print_json(shown: list[Predicted], network: "Network", errors: dict[str, str]) -> None:
    predictions = [
        {
            "file": each.file,
            "top": [{"class": name, "probability": share} for name, share in each.top],
        }
        for each in shown
    ]
    answer = {
        "run": str(network.folder),
        "checkpoint": network.step,
        "predictions": predictions,
        "errors": [{"file": file, "error": error} for file, error in errors.items()],
    }
    print(json.dumps(answer, indent=2))


def _draw(options: argparse.Namespace, network: "Network", shown: list[Predicted]) -> None:
    """Draws the contact sheet and the explanations that are asked for."""
    import numpy as np
    from tqdm import tqdm

    from alexnet_jax.inference.contact_sheet import PredictedImage, contact_sheet, saliency_image
    from alexnet_jax.inference.saliency import smooth_grad

    predicted = [
        PredictedImage(Path(each.file).name, each.image, *each.top[0])
        for each in shown
        if each.image is not None
    ]
    try:
        if options.sheet:
            contact_sheet(predicted).save(options.sheet, format="PNG")
            print(f"Sheet: {options.sheet}", file=sys.stderr)
        if options.explain:
            options.explain.mkdir(parents=True, exist_ok=True)
            names = _unique_names(each.file for each in shown)
            bar = tqdm(predicted, "Explaining", unit="img", disable=None, delay=2)
            for each, name in zip(bar, names, strict=True):
                label = network.class_names.index(each.label)
                saliency = smooth_grad(network, each.image[None], np.array([label]))[0]
                saliency_image(each, saliency).save(options.explain / name, format="PNG")
            print(f"Explanations: {options.explain}", file=sys.stderr)
    except OSError as error:
        raise InputError(
            f"{error.filename or options.sheet or options.explain} cannot be written "
            f"({error.strerror or error}); name another place."
        ) from None


def _unique_names(files: Iterable[str]) -> Iterator[str]:
    """Yields the name of a PNG for each file."""
    seen: set[str] = set()
    for file in files:
        stem = Path(file).stem
        name, number = f"{stem}.png", 2
        while name in seen:
            name, number = f"{stem}-{number}.png", number + 1
        seen.add(name)
        yield name
