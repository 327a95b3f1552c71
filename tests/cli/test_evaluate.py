"""`alexnet-jax evaluate`: the numbers of `evaluate_network`, for people and for programs."""

import json
import re

import pytest

from alexnet_jax.cli import evaluate
from alexnet_jax.inference.evaluate import evaluate_network

pytestmark = [
    # Orbax and TensorStore leave their event loops to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def test_the_evaluation_program(run, network, tmp_path, capsys):
    right = evaluate_network(network).results
    file = tmp_path / "figures.json"
    assert evaluate.main([str(run), f"--json={file}"]) == 0
    table = capsys.readouterr().out
    assert f"accuracy {100 * right['test_ema']['accuracy']:.2f}%" in table
    assert "most often predicted as" in table
    assert evaluate.main([str(run), "--tta=flip"]) == 0
    with_tta = capsys.readouterr().out
    assert "weights, TTA" in with_tta
    by_class = re.compile(r"Class by class.*(?=\n\n)", re.DOTALL)
    assert by_class.search(with_tta)[0] == by_class.search(table)[0]
    assert evaluate.main([str(run), "--json=-"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures == json.loads(file.read_text())
    for name in ("test", "test_ema"):
        assert figures["results"][name]["loss"] == float(right[name]["loss"])
        assert figures["results"][name]["confusion"] == right[name]["confusion"].tolist()
    assert evaluate.main([str(run), "--split=tset"]) == 2
    assert capsys.readouterr().err.startswith("error: digits has no images for the split 'tset'")
