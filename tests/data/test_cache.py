"""What is kept beside a prepared set: found again, noticed when wrong, and never needed."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from alexnet_jax.config import default_config
from alexnet_jax.data import cache
from alexnet_jax.data.source import Source, load_source


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    open_source(folder)
    return folder


def open_source(folder):
    config = default_config()
    config.data.update({"name": "digits", "data_dir": str(folder), "image_size": 8})
    return load_source(config.data, "test[:100]")


@pytest.fixture
def source(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "MIN_BYTES", 0)
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    return open_source(tmp_path)


@pytest.fixture
def decodings(monkeypatch):
    """Is told of every reading of all images."""
    calls = []
    read_all = Source.read_all
    monkeypatch.setattr(Source, "read_all", lambda self: calls.append(0) or read_all(self))
    return calls


def kept_files(source):
    return sorted(path.name for path in computed(source).iterdir())


def computed(source):
    (folder,) = Path(source.folder, "computed").iterdir()
    return folder


def assert_right(source):
    images, labels = cache.decoded(source)
    expected = Source.read(source, range(100))
    np.testing.assert_array_equal(images, expected[0])
    np.testing.assert_array_equal(labels, expected[1])
    assert (images.dtype, labels.dtype) == (np.uint8, np.int32)


def test_images_are_decoded_once(source, decodings):
    for _ in range(3):
        assert_right(source)
    assert len(decodings) == 1
    assert computed(source).name == "test__100_-8-images"
    assert kept_files(source) == ["checksums.json", "images.npy", "labels.npy"]


def test_cached_images_are_mapped_and_not_copied(source):
    cache.decoded(source)
    images, labels = cache.decoded(source)
    for array in (images, labels):
        assert isinstance(array.base, np.memmap)
        assert not array.flags.writeable


def test_small_sets_are_not_kept(source, monkeypatch):
    monkeypatch.setattr(cache, "MIN_BYTES", 100 * 8 * 8 * 3)
    assert_right(source)
    assert not Path(source.folder, "computed").exists()


FILES = ("checksums.json", "images.npy", "labels.npy")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("place", [0.01, 0.15, 0.3, 0.6, 0.98])
def test_a_flipped_bit_is_noticed_or_harmless(source, file, place):
    assert_right(source)
    path = computed(source) / file
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    assert_right(source)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("images.npy", np.zeros((100, 8, 8, 3), np.uint8)),
        ("images.npy", np.zeros((100, 3, 8, 8), np.uint8)),
        ("labels.npy", np.zeros(100, np.int64)),
        ("labels.npy", np.zeros(100, np.float32)),
    ],
)
def test_other_arrays_are_noticed(source, decodings, file, content):
    assert_right(source)
    np.save(computed(source) / file, content)
    assert_right(source)
    assert len(decodings) == 2


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("size", [0, 100, 300])
def test_a_file_cut_short_is_computed_again(source, decodings, file, size, caplog):
    assert_right(source)
    os.truncate(computed(source) / file, size)
    with caplog.at_level("INFO", "alexnet_jax"):
        assert_right(source)
    assert "is damaged" in caplog.text
    assert_right(source)
    assert len(decodings) == 2


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_computed_again(source, decodings, file):
    assert_right(source)
    (computed(source) / file).unlink()
    assert_right(source)
    assert_right(source)
    assert len(decodings) == 2


def test_other_files_make_it_stale(source, decodings, tmp_path):
    assert_right(source)
    for path in Path(source.folder).glob("*array_record*"):
        os.utime(path, ns=(0, 0))
    assert_right(open_source(tmp_path))
    assert len(decodings) == 2
    assert kept_files(source) == sorted(FILES)


def test_where_it_cannot_be_written_the_run_goes_on_without(source, caplog):
    Path(source.folder, "computed").write_text("in the way")
    with caplog.at_level("INFO", "alexnet_jax"):
        assert_right(source)
    assert "cannot be written" in caplog.text


def test_a_full_disk_is_left_alone(source, monkeypatch):
    usage = cache.shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage)
    assert_right(source)
    assert kept_files(source) == []


def test_what_a_killed_process_left_goes_after_a_while(source):
    folder = Path(source.folder, "computed", "test__100_-8-images")
    folder.mkdir(parents=True)
    old, new = (folder / f".images.npy.{name}.tmp" for name in ("old", "new"))
    for path in (old, new):
        path.touch()
    os.utime(old, (0, 0))
    assert_right(source)
    assert not old.exists()
    assert new.exists()


def test_labels_alone_agree(source):
    np.testing.assert_array_equal(source.read_labels(), source.read(range(100))[1])
