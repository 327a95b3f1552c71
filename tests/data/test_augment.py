import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax.data.augment import (
    Keys,
    alternating_flip,
    center_crop,
    create_augment,
    create_normalize,
    cutout,
    pad,
    pca_jitter,
    random_crop,
    random_flip,
)
from alexnet_jax.data.decode import count_values
from alexnet_jax.data.options import AugmentConfig
from alexnet_jax.data.statistics import channel_statistics, principal_components

KEY = jax.random.key(0)
PADDING = 2


def noise(count, height=9, width=7, channels=3):
    shape = (count, height, width, channels)
    return np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)


def windows(image):
    """Each window that a crop may take of a padded image, by its corner."""
    height, width, _ = image.shape
    padded = np.pad(image, [(PADDING, PADDING), (PADDING, PADDING), (0, 0)], mode="reflect")
    steps = range(2 * PADDING + 1)
    return {(y, x): padded[y : y + height, x : x + width] for y in steps for x in steps}


def corner(image, output):
    """Of the one window that `output` equals."""
    found = [at for at, window in windows(image).items() if np.array_equal(window, output)]
    assert len(found) == 1
    return found[0]


def augmented(images, mean=(0.5,) * 3, key=KEY, crop_size=0, components=(), **options):
    """Images as `create_augment` changes them; the labels stay."""
    augment = create_augment(AugmentConfig(**options), mean, crop_size, components)
    labels = jnp.arange(len(images))
    images, after = jax.jit(augment)(Keys(key, KEY), jnp.int32(0), images, labels)
    np.testing.assert_array_equal(after, labels)
    return images


def shift(key, images, mode="reflect"):
    """Shifts each image by up to `PADDING` pixels."""
    return random_crop(key, pad(images, PADDING, mode), images.shape[1:3])


def test_each_crop_is_a_window_of_the_reflected_image():
    images = noise(500)
    cropped = jax.jit(shift)(KEY, images)
    assert (cropped.shape, cropped.dtype) == (images.shape, np.uint8)
    corners = [corner(*pair) for pair in zip(images, np.asarray(cropped), strict=True)]
    # Each image has its own, any of the 25 as often as another: 20 times, give or take 4.4.
    _, counts = np.unique(corners, axis=0, return_counts=True)
    assert len(counts) == 25
    assert 2 <= counts.min() < counts.max() <= 45


def test_flips_mirror_half_of_the_images():
    images = noise(10_000, height=3, width=2)
    flipped = np.asarray(random_flip(KEY, images))
    assert flipped.dtype == np.uint8
    mirrored = np.array([not np.array_equal(*pair) for pair in zip(images, flipped, strict=True)])
    np.testing.assert_array_equal(flipped[mirrored], images[mirrored][:, :, ::-1])
    assert 4800 < mirrored.sum() < 5200  # 5000, give or take 50


@pytest.mark.parametrize("kind", ["crop", "flip", "both"])
def test_draws_depend_on_the_key_alone(kind):
    draw = {
        "crop": shift,
        "flip": random_flip,
        "both": lambda key, images: augmented(images, key=key),
    }[kind]
    images = noise(50)
    np.testing.assert_array_equal(draw(KEY, images), draw(KEY, images))
    assert (draw(KEY, images) != draw(jax.random.key(1), images)).any()


def test_augment_crops_then_flips():
    images = noise(100)
    outputs = np.asarray(augmented(images, crop_padding=PADDING, flip=True))
    assert outputs.dtype == np.uint8
    kinds = set()
    for image, output in zip(images, outputs, strict=True):
        mirrored = any(np.array_equal(w[:, ::-1], output) for w in windows(image).values())
        kinds.add((mirrored, corner(image, output[:, ::-1] if mirrored else output)))
    assert len(kinds) > 30  # of 50: flip and corner are drawn apart


@pytest.mark.parametrize(("padding", "flip"), [(0, False), (0, True), (PADDING, False)])
def test_each_augmentation_can_be_off(padding, flip):
    images = noise(60)
    outputs = np.asarray(augmented(images, crop_padding=padding, flip=flip))
    same = [np.array_equal(*pair) for pair in zip(images, outputs, strict=True)]
    assert all(same) == (not padding and not flip)
    if not padding:
        flipped = images[:, :, ::-1]
        assert ((outputs == images) | (outputs == flipped)).all()
    if not flip:
        for image, output in zip(images, outputs, strict=True):
            corner(image, output)


def test_black_fills_the_border_with_zeros():
    images = noise(200) | 1  # no pixel is black by itself
    cropped = np.asarray(shift(KEY, images, "constant"))
    padded = np.pad(images, [(0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0)])
    reflected = np.asarray(shift(KEY, images))
    for image, output, other in zip(padded, cropped, reflected, strict=True):
        y, x = np.argwhere((windows_of(image) == output).all((2, 3, 4)))[0]
        same = output > 0  # the same window, apart from the border
        np.testing.assert_array_equal(output[same], other[same])
        assert (output == 0).any() == ((y, x) != (PADDING, PADDING))


def windows_of(padded):
    """[y, x, H, W, C], each window of a padded image."""
    return np.moveaxis(np.lib.stride_tricks.sliding_window_view(padded, (9, 7), (0, 1)), 2, -1)


def test_alternating_flip_mirrors_each_image_in_every_other_epoch():
    images = noise(400)
    epochs = [np.asarray(alternating_flip(KEY, jnp.int32(epoch), images)) for epoch in range(4)]
    mirrored = [(epoch == images[:, :, ::-1]).all((1, 2, 3)) for epoch in epochs]
    assert 150 <= mirrored[0].sum() <= 250  # 200, give or take 10
    for epoch, seen in enumerate(epochs):
        np.testing.assert_array_equal(mirrored[epoch], mirrored[0] ^ bool(epoch % 2))
        np.testing.assert_array_equal(seen[~mirrored[epoch]], images[~mirrored[epoch]])
    # It goes by the image, wherever that stands in a batch, and by the key.
    order = np.random.default_rng(0).permutation(400)
    shuffled = alternating_flip(KEY, jnp.int32(0), images[order])
    np.testing.assert_array_equal(shuffled, epochs[0][order])
    other = np.asarray(alternating_flip(jax.random.key(1), jnp.int32(0), images))
    differs = (other != epochs[0]).any((1, 2, 3))
    assert 150 <= differs.sum() <= 250


def test_alternating_flip_tells_similar_images_apart():
    images = np.zeros((1000, 8, 8, 3), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = np.arange(1000) % 250, np.arange(1000) // 250
    images[:, 0, 7, 0] = 255
    seen = np.asarray(alternating_flip(KEY, jnp.int32(0), images))
    assert 420 <= (seen[:, 0, 0, 0] == 255).sum() <= 580


@pytest.mark.parametrize("side", [3, 4])
def test_cutout_covers_one_square(side):
    images = noise(800, 9, 7) | 1
    covered = np.asarray(jax.jit(cutout, static_argnums=(2, 3))(KEY, images, side, (0, 2, 4)))
    centres = set()
    for image, output in zip(images, covered, strict=True):
        gone = (output == np.array([0, 2, 4])).all(-1)
        np.testing.assert_array_equal(output[~gone], image[~gone])
        rows, columns = gone.any(1), gone.any(0)
        np.testing.assert_array_equal(gone, np.outer(rows, columns))
        # As long as the square, or cut off by an edge.
        for line in (rows, columns):
            (at,) = np.nonzero(line)
            assert len(at) == at[-1] - at[0] + 1 <= side
            assert len(at) == side or at[0] == 0 or at[-1] == len(line) - 1
        centres.add((rows.tobytes(), columns.tobytes()))
    assert len(centres) == 63  # any pixel


def test_cutout_covers_with_the_mean_and_leaves_other_draws():
    images = noise(50)
    plain = augmented(images)
    with_it = augmented(images, (0.2, 0.4, 0.6), cutout=3)
    changed = (np.asarray(plain) != np.asarray(with_it)).any(-1)
    assert changed.any((1, 2)).all()
    assert (np.asarray(with_it)[changed] == [51, 102, 153]).all()


def test_channel_statistics_agree_with_numpy():
    images = (noise(300) * np.array([1.0, 0.5, 0.1])).astype(np.uint8)
    means, deviations = channel_statistics(count_values(images))
    scaled = images.astype(np.float64) / 255
    np.testing.assert_allclose(means, scaled.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(deviations, scaled.std((0, 1, 2)), rtol=1e-12)
    assert {type(value) for value in means + deviations} == {float}


def test_a_channel_that_never_changes_has_deviation_1():
    images = noise(3, 5, 1)
    for value in range(256):  # each, for the mean of some is rounded
        images[..., 1] = value
        means, deviations = channel_statistics(count_values(images))
        assert means[1] == pytest.approx(value / 255)
        assert deviations[1] == 1
        assert deviations[0] != 1


def test_normalize_agrees_with_numpy():
    images = noise(20)
    means, deviations = (0.5, 0.4, 0.1), (0.25, 0.2, 1.0)
    outputs = create_normalize(means, deviations)(jnp.asarray(images))
    assert outputs.dtype == jnp.float32
    np.testing.assert_allclose(
        outputs, (images.astype(np.float64) / 255 - means) / deviations, rtol=1e-5, atol=1e-6
    )


def test_normalized_images_have_mean_0_and_deviation_1():
    images = noise(100)
    outputs = np.asarray(
        create_normalize(*channel_statistics(count_values(images)))(jnp.asarray(images))
    )
    np.testing.assert_allclose(outputs.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(outputs.std((0, 1, 2)), 1, rtol=1e-5)


def test_windows_come_from_anywhere_in_an_image():
    images = noise(300, height=9, width=8)
    taken = np.asarray(jax.jit(random_crop, static_argnums=2)(KEY, images, (6, 6)))
    assert taken.shape == (300, 6, 6, 3)
    corners = []
    for image, window in zip(images, taken, strict=True):
        found = [
            (y, x)
            for y in range(4)
            for x in range(3)
            if np.array_equal(image[y : y + 6, x : x + 6], window)
        ]
        corners += found
    _, counts = np.unique(corners, axis=0, return_counts=True)
    assert counts.sum() == 300
    assert len(counts) == 12  # each 25 times, give or take 4.8
    assert 8 <= counts.min() < counts.max() <= 45


@pytest.mark.parametrize(("size", "top", "left"), [(9, 0, 0), (5, 2, 2), (4, 2, 2)])
def test_the_centre_is_in_the_middle(size, top, left):
    images = noise(2, height=9, width=9)
    expected = images[:, top : top + size, left : left + size]
    np.testing.assert_array_equal(center_crop(jnp.asarray(images), size), expected)


def test_evaluation_sees_the_middle_and_training_windows():
    images = jnp.asarray(noise(4, height=9, width=9))
    normalize = create_normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 5)
    full = create_normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    np.testing.assert_array_equal(normalize(images), full(images)[:, 2:7, 2:7])
    cropped = augmented(images, crop_size=5, crop_padding=0, flip=False)
    assert cropped.shape == (4, 5, 5, 3)
    np.testing.assert_array_equal(normalize(cropped), full(cropped))


def test_principal_components_are_those_of_sklearn():
    from sklearn.decomposition import PCA

    rng = np.random.default_rng(0)
    mix = np.array([[30, 25, 20], [10, -8, 0], [1, 2, -4]])
    pixels = np.clip(rng.normal(size=(70 * 5 * 6, 3)) @ mix + 128, 0, 255).astype(np.uint8)
    images = pixels.reshape(70, 5, 6, 3)  # more than the 64 that are summed at once
    ours = np.array(principal_components(images))
    pca = PCA().fit(pixels)
    theirs = pca.components_ * pca.singular_values_[:, None] / len(pixels) ** 0.5
    theirs *= np.sign(theirs.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_colours_shift_along_their_axes_by_the_deviation_asked_for():
    axes = ((60.0, 60.0, 60.0), (20.0, 0.0, -20.0), (3.0, -6.0, 3.0))
    images = np.broadcast_to(np.uint8([250, 128, 2]), (4000, 2, 2, 3))
    shifted = np.asarray(jax.jit(pca_jitter, static_argnums=(2, 3))(KEY, images, axes, 0.1))
    shift = shifted - images
    np.testing.assert_array_equal(shift, np.broadcast_to(shift[:, :1, :1], shift.shape))
    shares = np.linalg.solve(np.array(axes).T, shift[:, 0, 0].T)
    np.testing.assert_allclose(shares.std(axis=1), 0.1, rtol=0.05)
    np.testing.assert_allclose(shares.mean(axis=1), 0, atol=0.008)
    assert shifted.max() > 255  # and not cut off


def test_augment_shifts_colours_if_asked():
    images = jnp.asarray(noise(5))
    axes = ((60.0, 60.0, 60.0), (20.0, 0.0, -20.0), (3.0, -6.0, 3.0))
    options = {"crop_padding": 0, "flip": False}
    plain = augmented(images, components=axes, **options)
    assert plain.dtype == jnp.uint8
    shift = np.asarray(augmented(images, components=axes, pca_jitter=0.1, **options)) - images
    assert np.ptp(shift[:, 0, 0], axis=0).min() > 1  # another for each image
    np.testing.assert_array_equal(shift, np.broadcast_to(shift[:, :1, :1], shift.shape))
