"""Single figures: what is drawn in them, and that drawing leaves Matplotlib as it was."""

import matplotlib
import numpy as np

from alexnet_jax.plots import classes, curves, images, style, trials


def test_curve_of_several_runs_is_their_mean_within_their_range():
    runs = [{"train": ([1, 2], [4.0, 2.0])}, {"train": ([1, 2], [2.0, 1.0])}]
    axes = curves.metric_curves({"loss": runs}, "two").axes[0]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [3.0, 1.5])
    corners = axes.collections[0].get_paths()[0].vertices
    assert (corners[:, 1].min(), corners[:, 1].max()) == (1.0, 4.0)


def test_evenly_spaced_keeps_the_ends():
    assert curves.evenly_spaced(1000, 3).tolist() == [0, 500, 999]
    assert curves.evenly_spaced(2, 3).tolist() == [0, 1]


def test_search_with_few_trials_and_with_none_is_drawn():
    for found in ([], [("fail", None, {})], [("complete", 0.5, {"model.dropout": 0.1})]):
        assert style.png(trials.search(found, {})).startswith(b"\x89PNG")


def test_grids_of_images_and_filters():
    pixels = np.arange(2 * 3 * 2 * 2 * 3, dtype=np.uint8).reshape(2, 3, 2, 2, 3)
    grid = images.tile(pixels)
    assert grid.shape == (5, 8, 4)
    np.testing.assert_array_equal(grid[3:, 6:, :3], pixels[1, 2])
    assert (grid[2] == 0).all()
    filters = np.random.default_rng(0).normal(size=(20, 3, 3, 3)).astype(np.float32)
    grid = images.filter_grid(filters)
    assert grid.shape == (7, 63, 4)
    assert grid[..., :3].min() == 0
    assert grid[..., :3].max() == 255
    assert (grid[4:, 16:, 3] == 0).all()
    assert (grid[4:7, 12:15, 3] == 255).all()


def test_confusion_matrix_of_many_classes_shows_the_largest_share_of_each_block():
    counts = np.zeros((401, 401), int)
    counts[399, 4] = 1  # the only image of its class
    shown = classes.confusion_matrix(counts, ["x"] * 401).axes[0].images[0].get_array()
    opacity = shown[..., 3]
    assert opacity.shape == (134, 134)
    assert (opacity[133, 1], opacity.sum()) == (1, 1)


def test_drawing_leaves_the_settings_of_the_user():
    before = dict(matplotlib.rcParams)
    figure = classes.class_scores({"recall": np.array([0.5, np.nan])}, ["$x^{", "漢"])
    style.png(figure)
    style.svg(figure, "recall", "recall of each class")
    assert dict(matplotlib.rcParams) == before
