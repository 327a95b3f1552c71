"""Files are written whole or not at all; JSON is laid out for people."""

import errno
import json
import os
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alexnet_jax.errors import InputError, SaveFailed
from alexnet_jax.run.files import (
    format_json,
    read_json,
    read_npz,
    remove_unfinished,
    replacing,
    write_json,
    write_npz,
)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_json(path, {"accuracy": 0.5})

    def die(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"accuracy": 0.9})
    assert read_json(path) == {"accuracy": 0.5}
    monkeypatch.undo()
    write_json(path, {"accuracy": 0.9})  # what was left behind is in nobody's way
    assert read_json(path) == {"accuracy": 0.9}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_a_row_of_a_confusion_matrix_is_a_line(tmp_path):
    write_json(tmp_path / "results.json", {"test": {"confusion": [[5, 0], [1, 4]]}, "seeds": [3]})
    assert (tmp_path / "results.json").read_text().splitlines() == [
        "{",
        '  "test": {',
        '    "confusion": [',
        "      [5, 0],",
        "      [1, 4]",
        "    ]",
        "  },",
        '  "seeds": [3]',
        "}",
    ]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON)
def test_what_is_laid_out_is_the_same_json(value):
    text = format_json(value)
    assert json.loads(text) == value
    if "[" not in text:  # what has no list is laid out as ever
        assert text == json.dumps(value, indent=2)


def test_what_cannot_be_written_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "results.json"
    write_json(path, {"accuracy": 0.5})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SaveFailed, match=r"results.json could not be written \(No space left on"):
        write_json(path, {"accuracy": 0.9})
    assert read_json(path) == {"accuracy": 0.5}
    assert list(tmp_path.iterdir()) == [path]


def test_no_file_is_none(tmp_path):
    assert read_json(tmp_path / "results.json") is None


def test_missing_folders_are_made_and_a_file_in_their_place_is_an_error(tmp_path):
    write_json(tmp_path / "a" / "b" / "c.json", {})
    with pytest.raises(SaveFailed, match=r"d\.json could not be written \(File exists\)"):
        write_json(tmp_path / "a" / "b" / "c.json" / "d.json", {})


@pytest.mark.parametrize("compress", [True, False])
def test_the_same_arrays_make_the_same_bytes(tmp_path, compress):
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.zeros(0, np.int32)}
    contents = []
    for name in ("one.npz", "two.npz"):
        write_npz(tmp_path / name, arrays, compress=compress)
        contents.append((tmp_path / name).read_bytes())
        time.sleep(0.01)
    assert contents[0] == contents[1]
    found = read_npz(tmp_path / "one.npz")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def test_a_damaged_npz_is_an_error_and_a_missing_one_is_empty(tmp_path):
    assert read_npz(tmp_path / "a.npz") == {}
    (tmp_path / "a.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"a\.npz is damaged"):
        read_npz(tmp_path / "a.npz")


def test_only_old_unfinished_files_are_removed(tmp_path):
    with replacing(tmp_path / "a.txt") as file:
        file.write(b"1")
        remove_unfinished(tmp_path, older_than=60)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    (tmp_path / ".b.txt.0.tmp").touch()
    remove_unfinished(tmp_path, older_than=-1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
