"""What the report computes from a run's files: curves, scores by class, calibration."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

CALIBRATION_BINS = 15  # as Guo et al. (2017) use

Record = dict[str, Any]  # a line of metrics.jsonl


def by_epoch(records: list[Record]) -> list[Record]:
    """Merges the training records of each epoch: loss and accuracy become means over its images.

    All other records stay as they are.
    """
    merged: list[Record] = []
    for epoch, group in itertools.groupby(records, _training_epoch):
        found = list(group)
        if epoch is None:
            merged += found
            continue
        weights = [record["images"] for record in found]
        means = {
            name: np.average([record[name] for record in found], axis=0, weights=weights).tolist()
            for name in ("loss", "accuracy", "loss_each", "accuracy_each")
            if name in found[0]
        }
        last = {name: found[-1][name] for name in ("step", "epoch", "split")}
        merged.append(last | means | {"images": sum(weights)})
    return merged


def _training_epoch(record: Record) -> int | None:
    """Returns the epoch whose training a record is of; no record reaches into the next epoch."""
    # Binary fractions of an epoch may add up to a hair more than a whole one.
    return int(np.ceil(record["epoch"] - 1e-9)) if record["split"] == "train" else None


def epoch_curves(records: list[Record], metric: str) -> dict[str, tuple[list, list]]:
    """Returns the epochs and values of "loss" or "accuracy" by split.

    Values for training are means over the images of an epoch, at its end.
    """
    curves: dict[str, tuple[list, list]] = {}
    for record in by_epoch(records):
        epochs, values = curves.setdefault(record["split"], ([], []))
        epochs.append(_training_epoch(record) or record["epoch"])
        values.append(record[metric])
    return curves


def by_seed(records: list[Record]) -> list[list[Record]]:
    """Separates the records of a run of many seeds, whose metrics are lists in "NAME_each"."""
    each = "_each"
    seeds = [len(value) for r in records for name, value in r.items() if name.endswith(each)]

    def of_seed(record: Record, seed: int) -> Record:
        plain = {name: value for name, value in record.items() if not name.endswith(each)}
        return plain | {name: record[name + each][seed] for name in plain if name + each in record}

    return [[of_seed(r, seed) for r in records] for seed in range(max(seeds, default=1))]


def step_curve(records: list[Record], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the epochs and values of a metric of the training steps."""
    found = [r for r in records if r["split"] == "train" and metric in r]
    return np.array([r["epoch"] for r in found]), np.array([r[metric] for r in found])


def reported_split(results: dict[str, Any]) -> str:
    """Returns the split whose results count: test before validation, averaged weights first."""
    order = ("test_ema", "test", "validation_ema", "validation")
    return next(split for split in order if split in results)


def most_confused(confusion: np.ndarray) -> list[tuple[int, int]]:
    """Returns, for each true class, the wrong class predicted most often, and how often."""
    errors = confusion - np.diag(np.diag(confusion))
    return [(int(row.argmax()), int(row.max())) for row in errors]


def class_table(confusion: np.ndarray, class_names: Sequence[str]) -> str:
    """Lists the accuracy of each class, its images, and its most frequent error."""
    width = max(len("class"), *(len(name) for name in class_names))
    lines = [f"{'class':<{width}}  accuracy  images  most often predicted as"]
    for i, (wrong, count) in enumerate(most_confused(confusion)):
        images = confusion[i].sum()
        accuracy = f"{confusion[i, i] / images:.1%}" if images else "-"
        error = f"{class_names[wrong]} ({count})" if count else "-"
        lines.append(f"{class_names[i]:<{width}}  {accuracy:>8}  {images:>6,}  {error}")
    return "\n".join(lines)


class ClassScores(NamedTuple):
    """Scores of each class, float64[classes], NaN where undefined; and images, int[classes]."""

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    images: np.ndarray

    @property
    def macro(self) -> list[float]:
        """Means over the classes that have images; an undefined score counts as 0."""
        means: list[float] = np.nan_to_num(self[:3])[:, self.images > 0].mean(axis=1).tolist()
        return means


def class_scores(confusion: np.ndarray) -> ClassScores:
    """Computes precision, recall and F1 from int[true classes, predicted classes]."""
    from sklearn.metrics import precision_recall_fscore_support  # 1 s to import

    true, predicted = np.nonzero(confusion)
    options = {"labels": np.arange(len(confusion)), "zero_division": np.nan}
    options["sample_weight"] = confusion[true, predicted]
    precision, recall, f1, _ = precision_recall_fscore_support(true, predicted, **options)
    return ClassScores(precision, recall, f1, confusion.sum(axis=1))


def confused_pairs(confusion: np.ndarray, most: int) -> list[tuple[int, int, int, float]]:
    """Returns the most frequent errors: true class, prediction, images, share of the true class."""
    errors = confusion - np.diag(np.diag(confusion))
    order = np.argsort(-errors, axis=None, kind="stable")[:most]
    return [
        (int(i), int(j), int(errors[i, j]), float(errors[i, j] / confusion[i].sum()))
        for i, j in zip(*np.unravel_index(order, errors.shape), strict=True)
        if errors[i, j]
    ]


class Calibration(NamedTuple):
    """Predictions in bins of equal width over (0, 1], their mean confidence and accuracy [bins].

    Both are NaN in an empty bin. `ece` is the expected calibration error, 0..1: the mean distance
    between the two over all predictions.
    """

    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    ece: float


def calibration(
    confidence: np.ndarray, correct: np.ndarray, bins: int = CALIBRATION_BINS
) -> Calibration:
    """Compares confidence with accuracy (Guo et al., 2017, "On Calibration of Modern Networks").

    scikit-learn's `calibration_curve` leaves out empty bins, and the counts that the ECE needs.

    Args:
        confidence: float[N], the probability of each predicted class.
        correct: bool[N].
        bins: Their number; bin m holds confidences in ((m - 1) / bins, m / bins].
    """
    confidence = confidence.astype(np.float64)
    index = np.digitize(confidence, np.arange(1, bins) / bins, right=True)
    counts = np.bincount(index, minlength=bins)
    sums = np.bincount(index, confidence, bins)
    right = np.bincount(index, correct, bins)
    with np.errstate(invalid="ignore"):  # 0 / 0 in an empty bin
        means = sums / counts, right / counts
    return Calibration(counts, *means, float(np.abs(right - sums).sum() / max(len(index), 1)))


def differences(configs: list[dict[str, Any]]) -> list[tuple[str, list[Any]]]:
    """Returns the options in which configs differ, with the value of each; None where absent."""
    keys = dict.fromkeys(itertools.chain(*configs))
    rows = [(key, [config.get(key) for config in configs]) for key in keys]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]
