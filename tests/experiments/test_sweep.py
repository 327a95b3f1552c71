"""Sweeps: ranges, and trials whose training is a script that does as a run does, in no time."""

import csv
import json
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from alexnet_jax.cli import sweep as program
from alexnet_jax.config import default_config
from alexnet_jax.errors import InputError
from alexnet_jax.experiments import sweep
from alexnet_jax.experiments.search_space import parse_space
from alexnet_jax.plots import trials as plots
from alexnet_jax.run import directory

ROOT = Path(__file__).parents[2]
RATE = "optimizer.learning_rate"

# What alexnet_jax.main does to be followed: it appends to metrics.jsonl, saves on SIGTERM, goes on.
# The accuracy of epoch e is e * learning rate; what else happens follows from a file beside.
RUN = """
import json, os, signal, sys, time
from pathlib import Path
given = dict(a[2:].split("=", 1) for a in sys.argv[1:])
assert given["config.eval.test"] == "false"
folder, rate = Path(given["workdir"]), float(given["config.optimizer.learning_rate"])
(folder / "checkpoints").mkdir(parents=True, exist_ok=True)
(folder / "config.tmp").write_text('{"train.epochs": 4, "train.ema_decay": 0.0}')
(folder / "config.tmp").rename(folder / "config.json")
with (folder / "commands.txt").open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
starts = len((folder / "commands.txt").read_text().splitlines())
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
how = (folder.parent / ".how").read_text().split()
if "refuse" in how:
    print("error: it is wrong")
    sys.exit(2)
if "diverge" in how:
    print("error: the loss is nan")
    sys.exit(3)
if "die" in how and starts <= int(how[1]):
    os.kill(os.getpid(), signal.SIGKILL)
metrics = folder / "metrics.jsonl"
done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
if done and not (folder / "checkpoints" / "saved").exists():
    print("error: the checkpoints are gone")
    sys.exit(2)
for epoch in range(done + 1, 5):
    record = {"step": epoch, "epoch": float(epoch), "split": "validation", "accuracy": epoch * rate}
    with metrics.open("a") as file:
        file.write(json.dumps(record) + "\\n")
    if "wait" in how and epoch == 2:
        deadline = time.monotonic() + 30
        while not asked and time.monotonic() < deadline:
            time.sleep(0.01)
    elif epoch < 4:
        time.sleep(0.15)
    if asked:
        (folder / "checkpoints" / "saved").touch()
        sys.exit(75)
(folder / "results.json").write_text(json.dumps({"validation": {"accuracy": 4 * rate}}))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    script = tmp_path / "run.py"
    script.write_text(RUN)
    popen = subprocess.Popen

    def start(command, **options):
        if command[1:3] != ["-m", "alexnet_jax.main"]:  # as Matplotlib's, that looks for fonts
            return popen(command, **options)
        return popen([sys.executable, "-S", str(script), *command[3:]], **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.02)
    monkeypatch.chdir(ROOT)
    found = tmp_path / "sweep"
    found.mkdir()
    how(found, "")
    return found


def how(folder, text):
    (folder / ".how").write_text(text)


def searching(folder, **options):
    space = parse_space([f"{RATE}=1e-3:0.2:log"], [], default_config())
    return sweep.Sweep(folder, "configs/digits.py", space, **options)


def search(folder, trials, *, workers=1, keep_checkpoints=False, enqueue=(), **options):
    with sweep.opened(searching(folder, **options)) as study:
        for rate in enqueue:
            study.enqueue_trial({RATE: rate})
        sweeper = sweep.Sweeper(
            searching(folder, **options), study, workers=workers, keep_checkpoints=keep_checkpoints
        )
        finished = sweeper.run(trials)
        return finished, sweep.rows(study), study


def commands(folder):
    return [json.loads(line) for line in (folder / "commands.txt").read_text().splitlines()]


def test_trials_are_trained_side_by_side_and_only_the_best_keeps_its_checkpoints(folder):
    finished, rows, study = search(
        folder, 3, workers=2, prune=False, enqueue=[0.1, 0.2, 0.05], flags=("--config.x=1",)
    )
    assert finished
    assert [(row.name, row.state, row.epochs) for row in rows] == [
        (f"trial-000{i}", "complete", 4) for i in range(3)
    ]
    assert [row.accuracy for row in rows] == pytest.approx([0.4, 0.8, 0.2])
    assert sweep.best_trial(study).params == {RATE: 0.2}
    kept = [(folder / row.name / "checkpoints").exists() for row in rows]
    assert kept == [False, True, False]
    (command,) = commands(folder / "trial-0000")
    assert command == [
        "--config=configs/digits.py",
        "--config.x=1",
        f"--config.{RATE}=0.1",
        "--config.eval.test=false",
        f"--workdir={folder / 'trial-0000'}",
    ]
    again = sweep.best_command(searching(folder, flags=("--config.x=1",)), sweep.best_trial(study))
    assert again.startswith("alexnet-jax train --config=configs/digits.py --config.x=1")
    assert "measure" not in again


def test_all_checkpoints_are_kept_if_asked_for(folder):
    _, rows, _ = search(folder, 2, keep_checkpoints=True)
    assert all((folder / row.name / "checkpoints").exists() for row in rows)


def test_a_trial_below_the_median_is_stopped_and_saved(folder):
    # Optuna lets five go to the end before it compares.
    finished, rows, _ = search(folder, 6, enqueue=[0.1, 0.11, 0.12, 0.13, 0.14], workers=3)
    assert finished
    how(folder, "wait")
    finished, rows, _ = search(folder, 7, enqueue=[0.002])
    assert finished
    *_, row = rows
    assert (row.state, row.params) == ("pruned", {RATE: 0.002})
    assert row.epochs <= 2
    assert not (folder / row.name / "results.json").exists()
    assert not (folder / row.name / "checkpoints").exists()


def test_a_killed_run_is_started_again_and_goes_on(folder):
    how(folder, "die 2")
    finished, (row,), _ = search(folder, 1, enqueue=[0.1])
    assert finished
    assert row.state == "complete"
    assert len(commands(folder / "trial-0000")) == 3
    how(folder, "die 9")
    finished, (_, row), _ = search(folder, 2, enqueue=[0.1])
    assert row.state == "fail"
    assert row.why == "ended 3 times with code -9"


def test_a_stopped_sweep_goes_on_within_the_trial(folder, monkeypatch):
    how(folder, "wait")
    looks = []

    class Stopping:
        def __enter__(self):
            epochs = folder / "trial-0000" / "metrics.jsonl"
            return lambda: epochs.exists() and len(epochs.read_text().splitlines()) == 2

        def __exit__(self, *_):
            looks.append(1)

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "stop_requests", Stopping)
        finished, rows, _ = search(folder, 2, enqueue=[0.1])
    assert (finished, rows, looks) == (False, [], [1])
    how(folder, "")
    finished, rows, study = search(folder, 2)
    assert finished
    assert [row.name for row in rows] == ["trial-0000", "trial-0002"]
    assert (rows[0].params, rows[0].epochs, rows[0].state) == ({RATE: 0.1}, 4, "complete")
    assert len(commands(folder / "trial-0000")) == 2
    lines = (folder / "trial-0000" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3, 4]
    # All of its epochs count, also those of the session before.
    (trial,) = [t for t in study.trials if t.user_attrs.get("continues") == 0]
    assert list(trial.intermediate_values) == [1, 2, 3, 4]


def test_trials_that_wait_to_go_on_keep_their_checkpoints(folder, monkeypatch):
    how(folder, "wait")
    metrics = [folder / f"trial-000{i}" / "metrics.jsonl" for i in (0, 1)]

    class Stopping:
        def __enter__(self):
            return lambda: all(m.exists() and m.read_text().count("\n") == 2 for m in metrics)

        def __exit__(self, *_):
            pass

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "stop_requests", Stopping)
        finished, _, _ = search(folder, 2, workers=2, enqueue=[0.1, 0.05])
    assert not finished  # both had begun: they are trained side by side
    how(folder, "")
    finished, rows, _ = search(folder, 2, workers=1)
    assert finished
    assert [(row.name, row.state, row.epochs) for row in rows] == [
        ("trial-0000", "complete", 4),
        ("trial-0001", "complete", 4),
    ]


def test_a_killed_sweep_loses_no_trial_and_draws_no_number_twice(folder):
    _, rows, _ = search(folder, 2)
    with sweep.opened(searching(folder)) as study:
        lost = study.ask(fixed_distributions=dict(searching(folder).space))
    finished, rows, _ = search(folder, 4)
    assert finished
    assert rows[2].params == lost.params
    assert rows[2].name == "trial-0002"
    assert len({row.params[RATE] for row in rows}) == 4


def test_the_process_of_a_killed_sweep_is_waited_for(folder, monkeypatch, caplog):
    monkeypatch.setattr(directory, "in_use", lambda _: len(asked.append(1) or asked) < 4)
    asked = []
    with caplog.at_level("INFO", logger="alexnet_jax"):
        finished, (row,), _ = search(folder, 1)
    assert (finished, row.state, len(asked)) == (True, "complete", 4)
    assert caplog.text.count("an earlier session still trains it; waiting for its end") == 1


def test_what_diverges_is_told_and_what_is_refused_ends_the_sweep(folder):
    how(folder, "diverge")
    _, (row,), _ = search(folder, 1)
    assert (row.state, row.why, row.accuracy) == ("pruned", "the loss is nan", None)
    shutil.rmtree(folder)
    folder.mkdir()
    how(folder, "refuse")
    with pytest.raises(
        InputError, match=r"first 3 trials could not .*trial-0002.log says: it is w"
    ):
        search(folder, 9)


def test_another_sweep_in_its_folder_is_refused(folder, tmp_path):
    search(folder, 1)
    with pytest.raises(InputError, match=r"holds a sweep with another flags \(\[\], and now"):
        search(folder, 1, flags=("--config.train.epochs=2",))
    with (
        sweep.opened(searching(folder)),
        pytest.raises(InputError, match="a sweep is in progress in"),
        sweep.opened(searching(folder)),
    ):
        pass
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(InputError, match=r"holds files but no sweep.json"):
        search(tmp_path / "other", 1)


def test_each_worker_has_gpus_of_its_own(monkeypatch):
    monkeypatch.setattr(sweep.environment, "visible_gpus", lambda _: ["0", "1", "2"])
    assert sweep.share_gpus(2) == [
        {"CUDA_VISIBLE_DEVICES": "0,2"},
        {"CUDA_VISIBLE_DEVICES": "1"},
    ]
    assert sweep.share_gpus(1) == [{}]
    with pytest.raises(InputError, match="--workers=4 need a GPU each, and there are 3"):
        sweep.share_gpus(4)


def test_ranges_and_choices_are_read():
    space = parse_space(
        ["config.optimizer.learning_rate=1e-4:1e-2:log", "train.batch_size=32:512:log"],
        ["--config.model.hidden=(8,8),(16,)", "augment.flip=true,false"],
        default_config(),
    )
    assert space == {
        RATE: FloatDistribution(1e-4, 1e-2, log=True),
        "train.batch_size": IntDistribution(32, 512, log=True),
        "model.hidden": CategoricalDistribution(("(8,8)", "(16,)")),
        "augment.flip": CategoricalDistribution(("true", "false")),
    }


@pytest.mark.parametrize(
    ("ranges", "choices", "message"),
    [
        ([], [], "no option is searched; give at least one --range or --choice"),
        (["optimizer.learning_rate"], [], "has no values; write it as --range=optimizer"),
        (["optimizer.lr=1:2"], [], "unknown option config.optimizer.lr"),
        (["optimizer.learning_rate=1e-2:1e-3"], [], "is empty; the first number must be the"),
        (["optimizer.learning_rate=0.1:many"], [], "'many' is not a number"),
        (["optimizer.learning_rate=-1:1"], [], "learning_rate is -1.0; it must be greater than 0"),
        (["model.dropout=0:0.5:log"], [], "has no logarithms; start above 0"),
        (["train.epochs=1:2.5"], [], "config.train.epochs is 2.5, a float; it must be an int"),
        (
            ["optimizer.schedule=1:2"],
            [],
            "schedule is not a number; give --choice instead",
        ),
        ([], ["optimizer.schedule=linear"], "must name two values or more, each once"),
        ([], ["optimizer.schedule=linear,liner"], "schedule is 'liner'; it must be one of"),
        ([], ["augment.flip=true,perhaps"], "config.augment.flip is 'perhaps', a str"),
        (
            [],
            ["eval.test=true,false"],
            "a sweep never evaluates on the test set",
        ),
        (["model.dropout=0:0.5"], ["model.dropout=0,0.1"], "config.model.dropout is given twice"),
    ],
)
def test_what_cannot_be_searched_is_told(ranges, choices, message):
    with pytest.raises(InputError) as refusal:
        parse_space(ranges, choices, default_config())
    assert message in str(refusal.value)


def test_the_program_ends_with_a_table_a_figure_and_a_command(folder, capsys, monkeypatch):
    drawn = []
    draw = plots.search
    monkeypatch.setattr(plots, "search", lambda *given: drawn.append(given) or draw(*given))
    arguments = [
        *("--config=configs/digits.py", f"--workdir={folder / 'study'}", "--workers=4"),
        *(f"--range={RATE}=1e-3:0.2:log", "--choice=optimizer.schedule=linear,cosine"),
        *("--no-prune", "--trials=8", "--", "--config.train.epochs=4"),
    ]
    (folder / "study").mkdir()
    how(folder / "study", "")
    assert program.main(arguments) == 0
    said = capsys.readouterr().out
    assert said.startswith("| trial | validation (%) | epochs | optimizer.learning_rate |")
    assert "8 trials are complete, 0 pruned, 0 failed" in said
    with (folder / "study" / "trials.csv").open() as file:
        best = max(csv.DictReader(file), key=lambda row: float(row["validation_accuracy"]))
    assert f"--config.{RATE}={best[RATE]} " in said.splitlines()[-1]
    assert (folder / "study" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert len((folder / "study" / "trials.csv").read_text().splitlines()) == 9
    ((trials, importances, logarithmic),) = drawn
    assert len(trials) == 8
    assert next(iter(importances)) == RATE  # of which alone the accuracy is
    assert sum(importances.values()) == pytest.approx(1)
    assert logarithmic == [RATE]
    with sqlite3.connect(folder / "study" / "study.db") as database:
        assert database.execute("select count(*) from trials").fetchone() == (8,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trials=0"], "--trials: must be at least 1, not 0"),
        (["--workers=0"], "--workers: must be at least 1, not 0"),
        ([], "no option is searched"),
        (["--config=configs/nothing.py"], "configs/nothing.py is not a file"),
    ],
)
def test_the_program_answers_mistakes_in_a_sentence(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert program.main(["--config=configs/digits.py", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
