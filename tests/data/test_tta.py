import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax.data.augment import create_normalize
from alexnet_jax.data.options import AugmentConfig
from alexnet_jax.data.tta import create_tta

NAMES = ("flip", "flip_translate", "ten_crop")


def create(name, padding=4, crop_size=0, **options):
    return create_tta(name, AugmentConfig(crop_padding=padding, **options), crop_size)


def images(size=8):
    shape = (3, size, size, 3)
    return np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)


def padded(pixels, padding):
    return np.pad(pixels, [(0, 0), (padding,) * 2, (padding,) * 2, (0, 0)], mode="reflect")


def expected_views(name, pixels):
    """(weight, view), written down one by one."""
    if name == "flip":
        return [(0.5, pixels), (0.5, pixels[:, :, ::-1])]
    if name == "flip_translate":
        border = padded(pixels, 1)
        up_left, down_right = border[:, :8, :8], border[:, 2:, 2:]
        views = [(0.25, pixels), (0.125, up_left), (0.125, down_right)]
    else:
        border = padded(pixels, 2)
        views = [
            (0.1, border[:, :8, :8]),
            (0.1, border[:, :8, 4:]),
            (0.1, border[:, 4:, :8]),
            (0.1, border[:, 4:, 4:]),
            (0.1, pixels),
        ]
    return [(weight, view[:, :, :: 1 - 2 * flip]) for weight, view in views for flip in (0, 1)]


@pytest.mark.parametrize("name", NAMES)
def test_views_and_their_average(name):
    pixels = images()
    tta = create(name, padding=2)
    seen = np.asarray(tta.views(jnp.asarray(pixels)))
    expected = expected_views(name, pixels)
    assert seen.dtype == np.uint8
    assert len(seen) == len(expected)
    for ours, (_, theirs) in zip(seen, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    logits = np.random.default_rng(1).normal(size=(len(seen), 3, 5)).astype(np.float32)
    weights = np.array([weight for weight, _ in expected]).reshape(-1, 1, 1)
    ours = np.asarray(tta.combine(jnp.asarray(logits)))
    if name == "ten_crop":  # the probabilities are averaged
        probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        np.testing.assert_allclose(np.exp(ours), (weights * probabilities).sum(0), rtol=1e-5)
    else:
        np.testing.assert_allclose(ours, (weights * logits).sum(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_views_of_a_part_of_the_image(name):
    """With an odd margin: the middle 6 of 9 pixels begin at the second, also of mirror images."""
    pixels = images(9)
    if name == "ten_crop":
        corners = [(0, 0), (0, 3), (3, 0), (3, 3), (1, 1)]
        seen = [pixels[:, y : y + 6, x : x + 6] for y, x in corners]
    else:
        border = padded(pixels, 1)
        moved = [(1, 1), (0, 0), (2, 2)][: 1 if name == "flip" else 3]
        seen = [border[:, y + 1 : y + 7, x + 1 : x + 7] for y, x in moved]
    expected = [view for each in seen for view in (each, each[:, :, ::-1])]
    tta = create(name, crop_size=6)
    normalize = create_normalize((0.0,) * 3, (1 / 255,) * 3, 6)
    for ours, theirs in zip(tta.views(jnp.asarray(pixels)), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_allclose(normalize(ours), theirs, rtol=1e-6)


def test_the_border_is_that_of_training():
    tta = create("ten_crop", padding=2, pad_mode="constant")
    seen = np.asarray(tta.views(jnp.full((1, 8, 8, 3), 255, jnp.uint8)))
    assert seen.reshape(10, -1).min(axis=1).tolist() == [0] * 8 + [255] * 2


def test_none_is_no_view():
    assert create("none") is None
