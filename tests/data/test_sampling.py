import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax.data.feed import InMemoryFeed, dispatches
from alexnet_jax.data.sampling import epoch_order, padded_batches, stratified_split

KEY = jax.random.key(0)


def dataset(size):
    """Images that tell which example they are, as the labels do."""
    labels = np.arange(1, size + 1, dtype=np.int32)
    return np.broadcast_to(labels[:, None, None, None], (size, 4, 5, 3)).astype(np.uint8), labels


def test_order_is_a_permutation_of_key_and_epoch():
    orders = [
        np.asarray(epoch_order(key, epoch, 50))
        for key in (KEY, jax.random.key(1))
        for epoch in range(3)
    ]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(50))
    assert len({order.tobytes() for order in orders}) == 6
    np.testing.assert_array_equal(epoch_order(KEY, jnp.int32(2), 50), orders[2])


def test_batches_of_an_epoch_follow_its_order():
    images, labels = dataset(11)
    order = epoch_order(KEY, 0, 11)
    feed = InMemoryFeed(jnp.asarray(images), jnp.asarray(labels), order[:9].reshape(3, 3))
    assert feed.num_steps == 3
    for position in range(3):
        batch = feed.batch(jnp.int32(position))
        chosen = np.asarray(order)[3 * position : 3 * position + 3]
        np.testing.assert_array_equal(batch["image"], images[chosen])
        np.testing.assert_array_equal(batch["label"], labels[chosen])
        np.testing.assert_array_equal(batch["mask"], [True] * 3)
        assert {name: value.dtype for name, value in batch.items()} == {
            "image": np.uint8,
            "label": np.int32,
            "mask": bool,
        }


@pytest.mark.parametrize(("size", "batch_size", "count"), [(12, 4, 3), (13, 4, 4), (3, 4, 1)])
def test_padded_batches_hold_each_example_once(size, batch_size, count):
    images, labels = dataset(size)
    batches = list(padded_batches(images, labels, batch_size))
    assert len(batches) == count
    for batch in batches:
        assert batch["image"].shape == (batch_size, 4, 5, 3)
        assert batch["label"].shape == batch["mask"].shape == (batch_size,)
        assert batch["image"].dtype == np.uint8
        assert batch["label"].dtype == np.int32
    joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    np.testing.assert_array_equal(joined["image"][joined["mask"]], images)
    np.testing.assert_array_equal(joined["label"][joined["mask"]], labels)


def test_no_examples_make_no_batches():
    images, labels = dataset(0)
    assert list(padded_batches(images, labels, 4)) == []


LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 5], [100, 41, 10, 1]))


def test_split_holds_out_the_same_share_of_each_class():
    first, second = stratified_split(LABELS, 0.2)
    np.testing.assert_array_equal(np.sort(np.concatenate([first, second])), np.arange(152))
    np.testing.assert_array_equal(first, np.sort(first))
    np.testing.assert_array_equal(second, np.sort(second))
    np.testing.assert_array_equal(np.bincount(LABELS[second], minlength=6), [20, 8, 2, 0, 0, 0])
    for part, again in zip((first, second), stratified_split(LABELS, 0.2), strict=True):
        np.testing.assert_array_equal(part, again)


def test_split_draws_its_examples_from_everywhere():
    labels = np.zeros(1000, int)
    _, second = stratified_split(labels, 0.1)
    assert 400 < second.mean() < 600  # 500, give or take 27


def test_each_class_keeps_an_example_to_train_on():
    first, second = stratified_split(LABELS, 0.99)
    assert set(LABELS[first]) == {0, 1, 2, 5}
    assert 5 not in LABELS[second]


def test_fraction_0_holds_out_nothing():
    first, second = stratified_split(LABELS, 0.0)
    np.testing.assert_array_equal(first, np.arange(152))
    assert len(second) == 0
    assert second.dtype.kind == "i"


def test_calls_end_at_the_same_steps_wherever_the_run_resumes():
    ends = [step + count for step, count in dispatches(0, 20, 10, 4)]
    assert ends == [4, 8, 10, 14, 18, 20]
    for start in range(20):
        resumed = [step + count for step, count in dispatches(start, 20, 10, 4)]
        assert resumed == [end for end in ends if end > start]
