"""Writes TensorBoard events from the files of a run through CLU, in a process of its own.

CLU's writer needs TensorFlow, which takes seconds to import, writes to the terminal from C++, and
reserves GPU memory. From another process none of that reaches the training.

``python -m alexnet_jax.run.tensorboard FOLDER OFFSET`` follows ``metrics.jsonl`` from byte OFFSET
on until its standard input ends. It begins with config, model and environment; at the end of a run
it adds images and histograms.
"""

import json
import os
import select
import signal
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_jax.run.files import read_json, read_npz

POLL_SECONDS = 1.0


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """Returns the metrics of a record by the tags of TensorBoard, "split/metric"."""
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


def markdown(values: dict[str, Any]) -> str:
    """Formats values by name as a table, with all that Markdown and HTML would read escaped."""
    rows = ["| | |", "|---|---|"]
    for name, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value)
        safe = (c if c.isalnum() or c in " _-=./,:'()[]" else f"&#{ord(c)};" for c in text)
        rows.append(f"| {name} | {''.join(safe)} |")
    return "\n".join(rows)


def texts(folder: Path) -> dict[str, str]:
    """Reads what TensorBoard shows as text: the config, the environment, and the model."""
    found = {}
    for name in ("config", "environment"):
        if values := read_json(folder / f"{name}.json"):
            values |= {f"version of {k}": v for k, v in values.pop("versions", {}).items()}
            found[name] = markdown(values)
    path = folder / "model.txt"
    if path.exists():
        found["network"] = textwrap.indent(path.read_text(), "    ")  # verbatim
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


def follow(folder: Path, offset: int) -> None:
    """Writes each record after `offset` as events into `folder`, until standard input ends."""
    writer, step, ended = None, 0, False
    with (folder / "metrics.jsonl").open() as file:
        file.seek(offset)
        while not ended:
            ended = bool(select.select([sys.stdin], [], [], POLL_SECONDS)[0])
            position = file.tell()
            while (line := file.readline()).endswith("\n"):
                # Only now: importing TensorFlow would delay the first step.
                writer = writer or _open(folder)
                record = json.loads(line)
                step = record["step"]
                writer.write_scalars(step, scalars(record))
                position = file.tell()
            file.seek(position)  # of a line that is not whole yet
            if writer:
                writer.flush()
    if writer:
        if (folder / "report.npz").exists():  # the run has been evaluated
            _write_end(folder, writer, step)
        writer.close()


def _open(folder: Path) -> Any:
    """Returns CLU's writer, after it has written config, environment and model."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # TensorFlow reserves no memory of the GPUs
    from clu.metric_writers import SummaryWriter

    writer = SummaryWriter(str(folder))
    if config := read_json(folder / "config.json"):
        writer.write_hparams(hparams(config))
    writer.write_texts(0, texts(folder))
    return writer


def _write_end(folder: Path, writer: Any, step: int) -> None:
    from tensorboard.plugins.histogram import metadata

    writer.write_images(step, images(folder))
    # Histograms, float64[bins, 3] of (left, right, count), go past CLU, which would count them.
    found = {
        name.replace("histograms/", "parameters/", 1): bins
        for name, bins in read_npz(folder / "report.npz").items()
        if name.startswith("histograms/")
    }
    how = {name: metadata.create_summary_metadata(name, description="") for name in found}
    writer.write_summaries(step, found, how)


if __name__ == "__main__":
    # Signals are meant for the run, which says when it ends, or is gone, by closing the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    follow(Path(sys.argv[1]), int(sys.argv[2]))
