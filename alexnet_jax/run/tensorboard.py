"""Writes TensorBoard events from the files of a run, in a process of its own, through CLU.

CLU's writer needs TensorFlow, which takes seconds to import, talks to the terminal from C++, and
reserves GPU memory. In another process none of that reaches the training.

Run by `run.writers.TensorBoard` as ``python -m alexnet_jax.run.tensorboard FOLDER OFFSET``;
it follows ``metrics.jsonl`` from the byte OFFSET on and ends when its standard input does. When it
begins, it writes config, network and command; at the end of a run, images and histograms.
"""

import json
import os
import select
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_jax.run.files import read_npz

SECONDS_BETWEEN_LOOKS = 1.0


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """Names the figures of a metrics record as TensorBoard shows them, "split/figure"."""
    return {
        f"{record['split']}/{name}": value
        for name, value in record.items()
        if isinstance(value, float) and name != "epoch"
    }


def hparams(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the options of a config as TensorBoard's table of runs takes them."""
    return {
        key: value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for key, value in config.items()
    }


def markdown(rows: list[tuple[str, Any]]) -> str:
    """Lays (name, value) out as a table for TensorBoard's texts, whatever stands in a value."""
    lines = ["| | |", "|---|---|"]
    for name, value in rows:
        text = json.dumps(value) if not isinstance(value, str) else value
        lines.append(f"| {name} | {_as_code(text)} |")
    return "\n".join(lines)


def _as_code(text: str) -> str:
    return "".join(c if c.isalnum() or c in " _-=./,:'()[]" else f"&#{ord(c)};" for c in text)


def texts(folder: Path) -> dict[str, str]:
    """Reads what TensorBoard shows as text: the config, the network, and where it is trained."""
    found = {}
    for name in ("config", "environment"):
        path = folder / f"{name}.json"
        if path.exists():
            values = json.loads(path.read_text())
            values |= {f"version of {k}": v for k, v in values.pop("versions", {}).items()}
            found[name] = markdown(list(values.items()))
    path = folder / "model.txt"
    if path.exists():  # four spaces make it stand as it is
        found["network"] = "\n".join(f"    {line}" for line in path.read_text().splitlines())
    return found


def images(folder: Path) -> dict[str, np.ndarray]:
    """Draws the images uint8[H, W, 3 or 4] of a run that has been evaluated."""
    from sklearn.metrics import confusion_matrix

    from alexnet_jax.plots import classes, images, style

    data = read_npz(folder / "report.npz")
    found = {}
    if "samples" in data:
        found["augmented"] = images.enlarge(images.tile(data["samples"]))
    if "filters" in data:
        found["filters"] = images.enlarge(images.filter_grid(data["filters"]))
    if "misclassified_images" in data:
        grid = images.tile(data["misclassified_images"][None, :12])
        found["misclassified"] = images.enlarge(grid)
    predictions = read_npz(folder / "predictions.npz")
    if predictions:
        names = json.loads((folder / "dataset.json").read_text())["class_names"]
        label, predicted = predictions["label"], predictions["classes"][:, 0]
        counts = confusion_matrix(label, predicted, labels=range(len(names)))
        found["confusion"] = style.pixels(classes.confusion_matrix(counts, names))
    return found


def histograms(folder: Path) -> dict[str, np.ndarray]:
    """Reads the histograms of the parameters, float64[bins, 3] of (left, right, count), by path."""
    arrays = read_npz(folder / "report.npz")
    prefix = "histograms/"
    return {n.removeprefix(prefix): v for n, v in arrays.items() if n.startswith(prefix)}


def follow(folder: Path, offset: int) -> None:
    """Writes each record after `offset` as events into `folder`, until standard input ends."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # TensorFlow draws no memory from the GPUs
    from clu.metric_writers import SummaryWriter

    writer = SummaryWriter(str(folder))
    step = 0
    with (folder / "metrics.jsonl").open() as file:
        file.seek(offset)
        config = folder / "config.json"
        if config.exists():
            writer.write_hparams(hparams(json.loads(config.read_text())))
        writer.write_texts(step, texts(folder))
        ended = False
        while not ended:
            ended = bool(select.select([sys.stdin], [], [], SECONDS_BETWEEN_LOOKS)[0])
            position = file.tell()
            while line := file.readline():
                if not line.endswith("\n"):  # half-written: look again
                    file.seek(position)
                    break
                record = json.loads(line)
                step = record["step"]
                writer.write_scalars(step, scalars(record))
                position = file.tell()
            writer.flush()
    if (folder / "report.npz").exists():  # as it does once the network has been measured
        _write_end(folder, writer, step)
    writer.close()


def _write_end(folder: Path, writer: Any, step: int) -> None:
    from tensorboard.plugins.histogram import metadata

    writer.write_images(step, images(folder))
    # They are counted already, so they go past CLU, which would count them.
    found = {f"parameters/{name}": values for name, values in histograms(folder).items()}
    how = {name: metadata.create_summary_metadata(name, description="") for name in found}
    writer.write_summaries(step, found, how)


if __name__ == "__main__":
    # Signals are meant for the run, which says when it ends, or is gone, by closing the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    follow(Path(sys.argv[1]), int(sys.argv[2]))
