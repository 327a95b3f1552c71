"""What a person looks at when a run has ended."""

import numpy as np
import pytest
from PIL import Image

from alexnet_jax.report import class_table, epoch_curves, per_class_accuracy, plot_curves


def record(split, epoch, loss, images=None):
    """A record as metrics.jsonl has it; the accuracy follows the loss."""
    found = {"step": 1, "epoch": epoch, "split": split, "loss": loss, "accuracy": 1 - loss / 10}
    return found if images is None else found | {"images": images}


TRAIN = [
    record("train", 0.5, 4.0, images=300),
    record("train", 1.0, 2.0, images=100),
    record("train", 1.25, 1.0, images=64),
    record("train", 2.0, 1.0, images=64),
]
# Binary fractions of an epoch add up to a hair more than a whole one.
HAIR = [record("train", 1.0 + 2**-50, 1.0, images=1), record("train", 2.0, 3.0, images=1)]
ALL = [
    *TRAIN,
    record("validation", 1.0, 3.0),
    record("validation_ema", 1.0, 2.5),
    record("validation", 2.0, 2.0),
    record("validation_ema", 2.0, 1.5),
    record("test", 2.0, 2.2),
    record("test_ema", 2.0, 1.7),
]
# Rows are true classes: a cat is seen in 3 of 4, an emu never occurs, an ox is always an emu.
CONFUSION = np.array([[3, 0, 1], [0, 0, 0], [0, 2, 0]])
NAMES = ("cat", "emu", "ox")


def test_training_curve_weighs_by_images_and_stands_at_the_end_of_the_epoch():
    assert epoch_curves(TRAIN, "loss") == {"train": ([1, 2], [3.5, 1.0])}
    assert epoch_curves(TRAIN, "accuracy")["train"][1] == pytest.approx([0.65, 0.9])


def test_rounding_moves_no_record_into_the_next_epoch():
    assert epoch_curves(HAIR, "loss")["train"] == ([1, 2], [1.0, 3.0])


def test_measured_curves_stand_where_they_were_measured():
    curves = epoch_curves(ALL, "loss")
    assert list(curves) == ["validation", "validation_ema", "test", "test_ema", "train"]
    assert curves["validation"] == ([1.0, 2.0], [3.0, 2.0])
    assert curves["test"] == ([2.0], [2.2])
    assert epoch_curves([], "loss") == {}


def test_per_class_accuracy():
    found = per_class_accuracy(CONFUSION)
    np.testing.assert_array_equal(found, [0.75, np.nan, 0.0])


def test_class_table_by_hand():
    assert class_table(CONFUSION, NAMES).split("\n") == [
        "class  accuracy  images  most often taken for",
        "cat       75.0%       4  ox (1)",
        "emu           -       0  -",
        "ox         0.0%       2  emu (2)",
    ]


def test_class_table_leaves_room_for_long_names_and_large_counts():
    table = class_table(np.diag([12345, 1]), ("a rather long name", "b"))
    assert table.split("\n") == [
        "class               accuracy  images  most often taken for",
        "a rather long name    100.0%  12,345  -",
        "b                     100.0%       1  -",
    ]


@pytest.mark.parametrize("records", [TRAIN[:2], TRAIN, ALL, []], ids=["one", "train", "all", "no"])
def test_plot_curves_writes_a_picture(tmp_path, records):
    path = tmp_path / "curves.png"
    plot_curves(records, path, "alexnet on cifar10")
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size == (1200, 480)
        colours = {colour for _, colour in image.convert("RGB").getcolors(image.width * 480)}
    blue, orange, red = (31, 119, 180), (255, 127, 14), (214, 39, 40)
    assert (blue in colours) == bool(records)
    assert (orange in colours) == (red in colours) == (records is ALL)
