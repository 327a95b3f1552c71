"""What is worked out from a run's figures: curves, class by class, calibration, differences."""

from typing import Any, NamedTuple

import numpy as np

CALIBRATION_BINS = 15  # as Guo et al. (2017) have them


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
            total = sums.setdefault(_epoch_of(record), [0.0, 0.0])
            total[0] += record[figure] * record["images"]
            total[1] += record["images"]
        else:
            epochs, values = curves.setdefault(record["split"], ([], []))
            epochs.append(record["epoch"])
            values.append(record[figure])
    if sums:
        curves["train"] = (list(sums), [total / images for total, images in sums.values()])
    return curves


def by_epoch(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Puts one training record in the place of those of each epoch; all others stay.

    Args:
        records: Of ``metrics.jsonl``.

    Returns:
        The same curves in fewer records. Those of training have "step", "epoch", "split" and
        "images" at the end of the epoch, and loss and accuracy, also of each seed, as means over
        its images.
    """
    merged: list[dict[str, Any]] = []
    epoch: list[dict[str, Any]] = []

    def close() -> None:
        if epoch:
            weights = [record["images"] for record in epoch]
            found = {
                name: np.average([record[name] for record in epoch], axis=0, weights=weights)
                for name in ("loss", "accuracy", "loss_each", "accuracy_each")
                if name in epoch[0]
            }
            last = {name: epoch[-1][name] for name in ("step", "epoch", "split")}
            figures = {name: value.tolist() for name, value in found.items()}
            merged.append(last | figures | {"images": sum(weights)})
            epoch.clear()

    for record in records:
        if record["split"] == "train":
            if epoch and _epoch_of(record) != _epoch_of(epoch[-1]):
                close()
            epoch.append(record)
        else:
            close()
            merged.append(record)
    close()
    return merged


def _epoch_of(record: dict[str, Any]) -> int:
    """Returns the end of the epoch that a step lies in; no record reaches into the next."""
    return int(np.ceil(record["epoch"] - 1e-9))


def by_seed(records: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Takes the records of a run of many seeds apart; of one seed they are left as they are.

    Args:
        records: Of ``metrics.jsonl``; what was measured of each seed is in "NAME_each".

    Returns:
        For each seed the records, with its own figures where they are known.
    """
    each = "_each"
    counts = [len(value) for r in records for name, value in r.items() if name.endswith(each)]
    return [
        [
            {
                name: record[name + each][index] if name + each in record else value
                for name, value in record.items()
                if not name.endswith(each)
            }
            for record in records
        ]
        for index in range(max(counts, default=1))
    ]


def step_curve(records: list[dict[str, Any]], figure: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns (epochs, values) of a figure of the training steps, in their order."""
    found = [r for r in records if r["split"] == "train" and figure in r]
    return np.array([r["epoch"] for r in found]), np.array([r[figure] for r in found])


def tested_split(results: dict[str, Any]) -> str:
    """Names the results to look at: those of the averaged weights, where they are kept.

    Of a run that has not seen the test set these are of the validation images.
    """
    order = ("test_ema", "test", "validation_ema", "validation")
    return next(split for split in order if split in results)


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


class ClassScores(NamedTuple):
    """How well each class is told from the others.

    Attributes:
        precision: float64[classes], share of what was taken for the class that is of it; NaN
            where nothing was.
        recall: float64[classes], share of the class that was recognised; NaN without images.
        f1: float64[classes], their harmonic mean; NaN where both are.
        images: int64[classes].
        macro: (precision, recall, F1), means over the classes that have images; a precision that
            is not defined counts as 0 in them.
    """

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    images: np.ndarray
    macro: tuple[float, ...]


def class_scores(confusion: np.ndarray) -> ClassScores:
    """Works out precision, recall and F1 of each class, by scikit-learn.

    Args:
        confusion: int[classes, classes]; rows are true classes.
    """
    from sklearn.metrics import precision_recall_fscore_support  # 1 s to import

    true, predicted = np.nonzero(confusion)
    counts = confusion[true, predicted]
    images = confusion.sum(axis=1)

    def scores(classes: np.ndarray, **options: Any) -> Any:
        return precision_recall_fscore_support(
            true, predicted, labels=classes, sample_weight=counts, **options
        )[:3]

    precision, recall, f1 = scores(np.arange(len(confusion)), zero_division=np.nan)
    macro = scores(np.flatnonzero(images), average="macro", zero_division=0)
    return ClassScores(precision, recall, f1, images, tuple(float(value) for value in macro))


class ConfusedPair(NamedTuple):
    """Images of one class that were taken for another: how many, and what share of the class."""

    true: int
    predicted: int
    images: int
    share: float


def confused_pairs(confusion: np.ndarray, most: int) -> list[ConfusedPair]:
    """Returns the most frequent mistakes, most frequent first, at most so many."""
    mistakes = confusion - np.diag(np.diag(confusion))
    order = np.argsort(-mistakes, axis=None, kind="stable")[:most]
    pairs = zip(*np.unravel_index(order, mistakes.shape), strict=True)
    images = confusion.sum(axis=1)
    return [
        ConfusedPair(int(i), int(j), int(mistakes[i, j]), mistakes[i, j] / images[i])
        for i, j in pairs
        if mistakes[i, j]
    ]


class Calibration(NamedTuple):
    """How far confidence can be believed, in bins of equal width over (0, 1].

    Attributes:
        counts: int64[bins], answers in each bin.
        confidence: float64[bins], their mean confidence; NaN in an empty bin.
        accuracy: float64[bins], the share of them that is right; NaN in an empty bin.
        ece: Expected calibration error, from 0 to 1: the mean over all answers of the distance
            between accuracy and confidence of their bin.
    """

    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    ece: float


def calibration(
    confidence: np.ndarray, correct: np.ndarray, bins: int = CALIBRATION_BINS
) -> Calibration:
    """Compares confidence with accuracy (Guo et al., 2017, "On Calibration of Modern Networks").

    Args:
        confidence: float[N], the probability of each answer's likeliest class.
        correct: bool[N], whether that class is right.
        bins: How many; bin m holds confidences in ((m - 1) / bins, m / bins].
    """
    confidence = confidence.astype(np.float64)
    edges = np.arange(1, bins) / bins
    place = np.searchsorted(edges, confidence, side="left")
    counts = np.bincount(place, minlength=bins)
    sums = np.bincount(place, weights=confidence, minlength=bins)
    right = np.bincount(place, weights=correct.astype(np.float64), minlength=bins)
    empty = np.full(bins, np.nan)
    return Calibration(
        counts,
        np.divide(sums, counts, out=empty.copy(), where=counts > 0),
        np.divide(right, counts, out=empty.copy(), where=counts > 0),
        float(np.abs(right - sums).sum() / max(len(confidence), 1)),
    )


def differences(configs: list[dict[str, Any]]) -> list[tuple[str, list[Any]]]:
    """Returns the options in which configs differ, with the value of each; None where absent."""
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = [(key, [config.get(key) for config in configs]) for key in keys]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def thinned(values: np.ndarray, most: int) -> np.ndarray:
    """Returns the indices of at most so many values, evenly spaced, the last among them."""
    return np.unique(np.linspace(0, len(values) - 1, min(len(values), most)).round().astype(int))
