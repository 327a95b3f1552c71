"""The notebook: every cell runs, on the digits, and shows what its text says."""

import json
import re
import sys
import types
from pathlib import Path

import jax
import matplotlib
import numpy as np
import pytest
from PIL import Image

from alexnet_jax.distributed import sharding
from alexnet_jax.experiments.report import page

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "alexnet_cifar10.ipynb"
SETTINGS = 'DATA = "cifar10"  # or "digits"\nSOURCE = ".."\nRUNS = "runs"'

pytestmark = [
    # Orbax and TensorStore leave their event loops to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def cells():
    return json.loads(NOTEBOOK.read_text())["cells"]


def code_of(cells):
    return {cell["id"]: "".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"}


def test_it_is_committed_as_it_is_written(cells):
    ids = [cell["id"] for cell in cells]
    assert len(set(ids)) == len(ids)
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    for topic in ("**convolution**", "**Backpropagation**", "**Dropout**", "**overfitting**"):
        assert topic in text
    assert "rectified linear unit" in text


def test_every_cell_runs_on_the_digits(cells, tmp_path, monkeypatch, capsys):
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda: make_mesh(jax.devices()[:1]))
    monkeypatch.setattr(page, "write_report", lambda folder: None)  # has its own tests
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    # As Colab's dialogue does it: the file lies in the current folder, and is named.
    Image.fromarray(np.full((40, 30, 3), 200, np.uint8)).save(tmp_path / "mine.png")
    colab = types.ModuleType("google.colab")
    colab.files = types.SimpleNamespace(upload=lambda: {"mine.png": b""})
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    code = code_of(cells)
    assert code["settings"] == SETTINGS
    code["settings"] = f'DATA, SOURCE, RUNS = "digits", "nowhere", {str(tmp_path / "runs")!r}'
    # Large enough to learn, and no larger.
    code["options"] += (
        "\noptions.train.epochs, options.writers.tensorboard = 2, False"
        "\noptions.data.image_size, options.cpu_kernels = 8, 'off'"
        "\noptions.model.update(features=(16, 32), kernels=(3, 3), strides=(1, 1))"
        "\noptions.model.update(pools=(True, True), hidden=(32,))"
    )
    assert "epochs=100" in code["overfitting"]
    code["overfitting"] = code["overfitting"].replace("epochs=100", "epochs=40")
    names: dict[str, object] = {}
    drawn = {}
    for name, source in code.items():
        exec(compile(source, name, "exec"), names)
        for number in plt.get_fignums():
            plt.figure(number).savefig(tmp_path / f"{name}.png")
            drawn[name] = tmp_path / f"{name}.png"
        plt.close("all")
    assert list(drawn) == [
        *("show-data", "convolution", "relu", "descent", "overfitting"),
        *("curves", "evaluate", "mistakes", "filters", "upload"),
    ]
    assert names["difference"] < 1e-5
    assert names["losses"][-1] < names["losses"][0]
    assert names["known"][-1] > names["unknown"][-1] + 0.05  # the gap that the text speaks of
    assert names["results"]["test"]["accuracy"] > 0.2  # chance is 0.1
    said = capsys.readouterr().out
    (slopes,) = re.findall(r"slope by trying (\S+), by backpropagation (\S+)", said)
    assert float(slopes[0]) == pytest.approx(float(slopes[1]), abs=1e-3)
    assert abs(float(slopes[1])) > 0.01
    assert said.splitlines()[-1].endswith(("#", "%  "))
    assert "By hand and by JAX differ by" in said
