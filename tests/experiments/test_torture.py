"""The torture program itself, with a few kills and damages; `docs/reliability.md` has the many."""

import contextlib
import json
import random
import shutil
import signal

import numpy as np
import orbax.checkpoint as ocp
import pytest

from alexnet_jax.checkpoint import checksums
from scripts import torture

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
        started.append(session.process)
        raise KeyboardInterrupt

    monkeypatch.setattr(torture.Session, "ended", interrupt)
    assert torture.main(["--kills=1"]) == 130
    assert [process.returncode for process in started] == [-signal.SIGKILL]
    assert capsys.readouterr() == ("", "Interrupted.\n")


@pytest.fixture(scope="module")
def ended_run(tmp_path_factory):
    """What `torture` compares of a run that has ended."""
    folder = tmp_path_factory.mktemp("ended") / "run"
    (folder / "figures").mkdir(parents=True)
    record = {"split": "train", "step": 1, "loss": 2.0, "images_per_second": 3.0}
    (folder / "metrics.jsonl").write_text(f"{json.dumps(record)}\n")
    (folder / "results.json").write_text('{"accuracy": 0.5, "train_seconds": 7.0}')
    for name in ("predictions.npz", "report.npz", "figures/curves.svg"):
        (folder / name).write_bytes(b"0123")
    save(folder, np.arange(3.0))
    return folder


def save(folder, kernel):
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    args = ocp.args.Composite(
        params=ocp.args.StandardSave({"kernel": kernel}),
        rest=ocp.args.StandardSave({"step": np.int32(1)}),
    )
    with ocp.CheckpointManager((folder / "checkpoints").absolute()) as manager:
        manager.save(1, args=args)


CHANGES = {
    "": lambda run: (run / "results.json").write_text('{"accuracy": 0.5, "train_seconds": 9.0}'),
    "metrics.jsonl differs": lambda run: (run / "metrics.jsonl").write_text('{"loss": 2.5}\n'),
    "results.json differs": lambda run: (run / "results.json").write_text('{"accuracy": 0.4}'),
    "predictions.npz differs": lambda run: (run / "predictions.npz").write_bytes(b"0124"),
    "report.npz differs": lambda run: (run / "report.npz").write_bytes(b"1123"),
    "['params']['kernel'] differs": lambda run: save(run, np.float64([0, 1, np.nextafter(2, 3)])),
    "files differ: ['figures/curves.svg']": lambda run: (run / "figures/curves.svg").unlink(),
}


@pytest.mark.parametrize("says", CHANGES)
def test_what_differs_after_kills_is_seen(ended_run, tmp_path, says):
    run = tmp_path / "run"
    shutil.copytree(ended_run, run)
    CHANGES[says](run)
    assert torture.differences(ended_run, run) == ([says] if says else [])


def test_a_run_that_never_leaves_its_report_has_failed(monkeypatch, tmp_path):
    class Session(contextlib.nullcontext):
        def __init__(self, *_):
            super().__init__(self)

        def kill_at(self, *_):
            return True

        def ended(self, *_):
            return ""

    monkeypatch.setattr(torture, "Session", Session)
    found = torture.torture_by_kills(1, random.Random(0), tmp_path)
    assert found["failures"] == ["run 1, after 1 kills: it ended well, and left no report"]


def test_a_few_damages(tmp_path, capsys):
    code = torture.main(["--damage", "--tries=1", f"--json={tmp_path / 'damage.json'}"])
    assert code == 0, capsys.readouterr().out
    found = json.loads((tmp_path / "damage.json").read_text())["damages"]
    assert len(found) == len(torture.DAMAGES) + len(torture.OF_BOTH)
    assert all(counts["tried"] == counts["held"] == 1 for counts in found.values())


def test_what_is_not_noticed_counts_as_failed(capsys, monkeypatch):
    """Without checksums a flipped bit is restored; the program must see it."""
    monkeypatch.setattr(checksums, "check", lambda *_: None)
    kind = "one bit flipped"
    monkeypatch.setattr(torture, "DAMAGES", {kind: torture.DAMAGES[kind]})
    monkeypatch.setattr(torture, "OF_BOTH", ())
    # One of eight flips does harm then, by chance, as the names of the files vary: none of 50 does
    # once in 800 calls, and four times in a row never.
    assert 1 in (torture.main(["--damage", "--tries=50"]) for _ in range(4))
    assert "failed: one bit flipped" in capsys.readouterr().out
