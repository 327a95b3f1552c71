"""What a person looks at when a run has ended: curves, and how each class fares."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_jax.run_folder import write_whole

_STYLES = {
    "train": ("train", "C0"),
    "validation": ("validation", "C1"),
    "validation_ema": ("validation, averaged weights", "C2"),
    "validation_tta": ("validation, several views", "C5"),
    "validation_tta_ema": ("validation, several views, averaged weights", "C6"),
    "test": ("test", "C3"),
    "test_ema": ("test, averaged weights", "C4"),
    "test_tta": ("test, several views", "C7"),
    "test_tta_ema": ("test, several views, averaged weights", "C8"),
}


def epoch_curves(records: list[dict[str, Any]], figure: str) -> dict[str, tuple[list, list]]:
    """Gathers one figure of the metrics by split.

    Args:
        records: Of ``metrics.jsonl``.
        figure: "loss" or "accuracy".

    Returns:
        Split to (epochs, values). Training values are means over each epoch, weighted by the
        number of images, and stand at its end.
    """
    curves: dict[str, tuple[list, list]] = {}
    sums: dict[int, list[float]] = {}
    for record in records:
        if record["split"] == "train":
            # The end of the epoch that the step lies in; a record never reaches into the next.
            total = sums.setdefault(int(np.ceil(record["epoch"] - 1e-9)), [0.0, 0.0])
            total[0] += record[figure] * record["images"]
            total[1] += record["images"]
        else:
            epochs, values = curves.setdefault(record["split"], ([], []))
            epochs.append(record["epoch"])
            values.append(record[figure])
    if sums:
        curves["train"] = (list(sums), [total / images for total, images in sums.values()])
    return curves


def plot_curves(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draws loss and accuracy over the epochs, side by side, into a PNG file."""
    from matplotlib.figure import Figure  # 0.5 s to import; no global state, no display
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    drawing = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    drawing.suptitle(title)
    for axes, name in zip(drawing.subplots(1, 2), ("loss", "accuracy"), strict=True):
        curves = epoch_curves(records, name)
        for split, (label, colour) in _STYLES.items():
            if split not in curves:
                continue
            epochs, values = curves[split]
            marker = "o" if len(epochs) == 1 else "."  # a line of one point would be invisible
            axes.plot(epochs, values, color=colour, label=label, marker=marker)
        axes.set_xlabel("epoch")
        axes.set_ylabel("cross-entropy (nats)" if name == "loss" else name)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if axes.lines:  # else Matplotlib warns of an empty legend
            axes.legend()
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    image = io.BytesIO()
    drawing.savefig(image, format="png")
    write_whole(path, image.getvalue())


def per_class_accuracy(confusion: np.ndarray) -> np.ndarray:
    """Returns the share of each class that was recognised; NaN for a class without images.

    Args:
        confusion: int[classes, classes]; rows are true classes.
    """
    counts = confusion.sum(axis=1)
    return np.divide(np.diag(confusion), counts, out=np.full(len(counts), np.nan), where=counts > 0)


def class_table(confusion: np.ndarray, class_names: tuple[str, ...]) -> str:
    """Lays out each class with its accuracy, its images, and what it is most often taken for.

    Args:
        confusion: int[classes, classes]; rows are true classes.
        class_names: Of the rows.
    """
    mistakes = confusion - np.diag(np.diag(confusion))
    width = max(len("class"), *(len(name) for name in class_names))
    lines = [f"{'class':<{width}}  accuracy  images  most often taken for"]
    for i, accuracy in enumerate(per_class_accuracy(confusion)):
        worst = int(mistakes[i].argmax())
        taken = f"{class_names[worst]} ({mistakes[i, worst]})" if mistakes[i, worst] else "-"
        share = "-" if np.isnan(accuracy) else f"{accuracy:.1%}"
        images = int(confusion[i].sum())
        lines.append(f"{class_names[i]:<{width}}  {share:>8}  {images:>6,}  {taken}")
    return "\n".join(lines)
