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
    monkeypatch.setattr(cache, "WORTH_KEEPING", 0)
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
    return list(Path(source.folder, "computed").iterdir())


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
    assert [path.name for path in kept_files(source)] == ["test__100_-8-images.npz"]


def test_small_sets_are_not_kept(source, monkeypatch):
    monkeypatch.setattr(cache, "WORTH_KEEPING", 100 * 8 * 8 * 3)
    assert_right(source)
    assert not Path(source.folder, "computed").exists()


@pytest.mark.parametrize("place", [0.01, 0.3, 0.6, 0.98])
def test_a_flipped_bit_is_noticed_or_harmless(source, place):
    assert_right(source)
    (path,) = kept_files(source)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    assert_right(source)


@pytest.mark.parametrize("size", [0, 100, 10_000])
def test_a_file_cut_short_is_made_anew(source, decodings, size, caplog):
    assert_right(source)
    (path,) = kept_files(source)
    os.truncate(path, size)
    with caplog.at_level("INFO", "alexnet_jax"):
        assert_right(source)
    assert "is damaged" in caplog.text
    assert_right(source)
    assert len(decodings) == 2


def test_other_files_make_it_stale(source, decodings, tmp_path):
    assert_right(source)
    for path in Path(source.folder).glob("*array_record*"):
        os.utime(path, ns=(0, 0))
    assert_right(open_source(tmp_path))
    assert len(decodings) == 2
    assert len(kept_files(source)) == 1


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
    folder = Path(source.folder, "computed")
    folder.mkdir()
    old, new = (folder / f".x.npz.{name}.unfinished" for name in ("old", "new"))
    for path in (old, new):
        path.touch()
    os.utime(old, (0, 0))
    assert_right(source)
    assert not old.exists()
    assert new.exists()


def test_labels_alone_agree(source):
    np.testing.assert_array_equal(source.read_labels(), source.read(range(100))[1])
