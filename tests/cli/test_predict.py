"""`alexnet-jax predict`: its formats, what it says of bad files, and what it draws."""

import contextlib
import csv
import io
import json
import os

import numpy as np
import pytest
from made_up_run import SIZE
from PIL import Image

from alexnet_jax.cli import predict
from alexnet_jax.data.source import load_source
from alexnet_jax.inference import contact_sheet

pytestmark = [
    # Orbax and TensorStore leave their event loops to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def test_set(network):
    return load_source(network.config.data, "test").read_all()


@pytest.fixture
def pictures_folder(tmp_path, test_set):
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    for i, place in enumerate(("a.png", "b.PNG", "below/a.png", ".hidden.png", "notes.txt")):
        Image.fromarray(test_set[0][i]).save(folder / place, format="PNG")
    return folder


def program(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = predict.main([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


def test_the_program_answers_in_three_formats(run, network, test_set, pictures_folder):
    code, out, err = program(run, pictures_folder, "--top=2", "--format=json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    files = [str(pictures_folder / place) for place in ("a.png", "b.PNG", "below/a.png")]
    assert [each["file"] for each in found["predictions"]] == files
    right = network.predict(test_set[0][:3]).top(2)
    for each, row in zip(found["predictions"], right, strict=True):
        assert [answer["class"] for answer in each["top"]] == [name for name, _ in row]
        np.testing.assert_allclose([a["probability"] for a in each["top"]], [p for _, p in row])

    code, out, _ = program(run, pictures_folder, "--top=2", "--format=csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert len(rows) == 6
    assert rows[0] == {
        "file": files[0],
        "rank": "1",
        "class": right[0][0][0],
        "probability": f"{right[0][0][1]:.6g}",
    }
    code, out, _ = program(run, files[1])
    assert out.startswith(f"{files[1]}\n  {right[1][0][0]} ")
    assert len(out.splitlines()) == 6


def test_what_cannot_be_read_is_said_and_the_others_are_answered(run, pictures_folder):
    os.rename(pictures_folder / "b.PNG", os.fsencode(pictures_folder) + b"/caf\xe9.png")
    (pictures_folder / "broken\x1b[2J.png").write_bytes(b"\x89PNG\r\n")
    code, out, err = program(run, pictures_folder, "--top=1", "--format=csv")
    assert code == 1
    assert len(out.splitlines()) == 4
    assert r"caf\xe9.png,1," in out
    assert len(err.splitlines()) == 1
    assert "broken" in err
    assert "\x1b" not in err
    code, out, err = program(run, pictures_folder / "gone.png")
    assert (code, out) == (2, "")
    code, out, err = program(run, pictures_folder, "gone.png", "--format=json")
    assert code == 1
    assert [error["file"] for error in json.loads(out)["errors"]][-1] == "gone.png"
    assert err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top=0"], "--top: must be at least 1, not 0"),
        (["--format=xml"], "invalid choice: 'xml' (choose from"),
        (["--checkpoint=old"], "'old' is not in"),
        (["--explain=below/.."], "has some of the images"),
        (["--sheet=a.png"], "is one of the images"),
        (["--sheet=/nowhere/sheet.png"], "/nowhere/sheet.png cannot be written"),
    ],
)
def test_bad_options_are_said_in_a_sentence(run, pictures_folder, arguments, message, monkeypatch):
    monkeypatch.chdir(pictures_folder)
    code, _, err = program(run, pictures_folder / "a.png", *arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1


def test_an_empty_folder_is_said(run, tmp_path):
    code, _, err = program(run, tmp_path)
    assert (code, err) == (2, f"error: the folder {tmp_path} has no image; name one that has.\n")


def test_the_sheet_and_the_explanations_show_the_images(run, pictures_folder, tmp_path):
    sheet, folder = tmp_path / "sheet.png", tmp_path / "explained"
    code, _, _ = program(run, pictures_folder, f"--sheet={sheet}", f"--explain={folder}")
    assert code == 0
    assert sorted(path.name for path in folder.iterdir()) == ["a-2.png", "a.png", "b.png"]
    with Image.open(sheet) as image, Image.open(pictures_folder / "a.png") as original:
        side = contact_sheet.SIDE
        shown = image.crop((8, 8, 8 + side, 8 + side)).resize(
            (SIZE, SIZE), Image.Resampling.NEAREST
        )
        np.testing.assert_array_equal(np.asarray(shown), np.asarray(original))
    with Image.open(folder / "a.png") as image:
        side = contact_sheet.LARGE_SIDE
        shown = image.crop((8, 8, 8 + side, 8 + side)).resize(
            (SIZE, SIZE), Image.Resampling.NEAREST
        )
    with Image.open(pictures_folder / "a.png") as original:
        np.testing.assert_array_equal(np.asarray(shown), np.asarray(original))
