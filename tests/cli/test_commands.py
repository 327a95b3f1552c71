"""The command `alexnet-jax`: what it lists, what it starts, and what it says of a wrong name."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from alexnet_jax import main as training
from alexnet_jax.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]], ids=str)
def test_help_lists_every_command_with_the_first_line_of_its_module(arguments, capsys):
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    for name in COMMANDS:
        module = importlib.import_module(f"alexnet_jax.cli.{name.replace('-', '_')}")
        assert [line for line in lines if line.split()[:1] == [name]] == [
            f"  {name:<20}{module.__doc__.splitlines()[0]}"
        ]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("trian", "did you mean train?"),
        ("eval", "did you mean evaluate?"),
        ("import_torchvision", "did you mean import-torchvision?"),
        ("--config=digits", "the commands are train, prepare, predict, evaluate, export, report"),
    ],
)
def test_a_mistyped_command_is_answered_with_the_nearest(name, hint, capsys):
    assert main([name]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: unknown command {name!r}; {hint}")
    assert err.count("\n") == 1


def test_train_is_the_training_program(monkeypatch):
    given = []
    monkeypatch.setattr(training, "run", lambda arguments: given.append(arguments) or 75)
    assert main(["train", "--config=digits", "--", "x"]) == 75
    assert given == [["--config=digits", "--", "x"]]


def test_arguments_of_the_process_are_the_default(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "alexnet_jax.cli", "report", "nowhere", "--output=page.txt"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --output=page.txt must end in .html.\n"


def test_no_message_names_a_program_that_only_a_checkout_has():
    for path in sorted((ROOT / "alexnet_jax").rglob("*.py")):
        assert "scripts/" not in path.read_text(), path
