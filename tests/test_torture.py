"""The torture program itself, with a few kills and damages; `docs/reliability.md` has the many."""

import json
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import torture

from alexnet_jax import checkpoint, checksums

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def test_a_few_kills(tmp_path, capsys, monkeypatch):
    """At moments that every session comes to, so that no session is for naught."""
    moments = {name: torture.MOMENTS[name] for name in ("steps", "save")}
    monkeypatch.setattr(torture, "MOMENTS", moments)
    code = torture.main(["--kills=2", f"--json={tmp_path / 'kills.json'}"])
    said = capsys.readouterr().out
    assert code == 0, said
    found = json.loads((tmp_path / "kills.json").read_text())
    assert sum(found["kills"].values()) == 2
    assert found["failures"] == []
    assert "2 kills of " in said


def test_ctrl_c_leaves_no_run_behind(monkeypatch, capsys):
    started = []

    def interrupt(session):
        started.append(session._process)
        raise KeyboardInterrupt

    monkeypatch.setattr(torture.Session, "ended", interrupt)
    assert torture.main(["--kills=1"]) == 130
    assert [process.returncode for process in started] == [-signal.SIGKILL]
    assert capsys.readouterr() == ("", "Interrupted.\n")


def test_a_few_damages(tmp_path, capsys):
    code = torture.main(["--damage", "--tries=1", f"--json={tmp_path / 'damage.json'}"])
    assert code == 0, capsys.readouterr().out
    found = json.loads((tmp_path / "damage.json").read_text())["damages"]
    assert len(found) == len(torture.DAMAGES) + len(torture._OF_BOTH)
    assert all(counts["tried"] == counts["held"] == 1 for counts in found.values())


def test_what_is_not_noticed_counts_as_failed(capsys, monkeypatch):
    """Without checksums a flipped bit is restored; the program must see it."""
    monkeypatch.setattr(checksums, "fingerprints", lambda tree: {})
    monkeypatch.setattr(checkpoint.Checkpoints, "_check_structure", lambda *_: None)
    monkeypatch.setattr(torture, "DAMAGES", {"one bit flipped": torture._flip})
    monkeypatch.setattr(torture, "_OF_BOTH", ())
    # One of eight flips is not noticed then; the names of the files, and so the choice, vary.
    assert torture.main(["--damage", "--tries=50"]) == 1
    assert "failed: one bit flipped" in capsys.readouterr().out
