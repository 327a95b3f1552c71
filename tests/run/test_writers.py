"""Where a run tells what happens: the metrics file, TensorBoard, the terminal, the log."""

import errno
import importlib.util
import json
import logging
import os
import subprocess
import sys
import textwrap
import time
import urllib.parse
import urllib.request
from pathlib import Path

import jax
import numpy as np
import pytest

from alexnet_jax.errors import SaveFailed
from alexnet_jax.experiments.report import inputs
from alexnet_jax.run import files, tensorboard, writers
from alexnet_jax.run.writers import MetricsFile, MetricWriter, Progress, read_metrics

METRICS = {"loss": 2.0, "accuracy": 0.25}


def record(step, split="train", **metrics):
    return {"step": step, "epoch": step / 10, "split": split, **metrics}


def fill(path, *steps):
    metrics = MetricsFile(path, last_step=0)
    for step in steps:
        metrics.write(record(step, loss=1.0))
    metrics.close()


def metric_writer(path, step, total_steps, steps_per_epoch, seconds_before):
    return MetricWriter(
        path.parent,
        step=step,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        seconds_before=seconds_before,
        tensorboard=False,
    )


def steps(path):
    return [found["step"] for found in read_metrics(path)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_metrics_are_there_as_soon_as_they_are_written(path):
    assert read_metrics(path) == []
    metrics = MetricsFile(path, last_step=0)
    for step in (1, 2):
        metrics.write(record(step, loss=0.1 + 0.2))
        assert read_metrics(path)[-1] == record(step, loss=0.1 + 0.2)
    metrics.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_reopening_drops_what_comes_again(path):
    fill(path, 1, 2, 3, 4)
    metrics = MetricsFile(path, last_step=2)
    assert steps(path) == [1, 2]
    metrics.write(record(3, split="again"))
    metrics.close()
    assert steps(path) == [1, 2, 3]
    assert read_metrics(path)[-1]["split"] == "again"
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


def test_reopening_keeps_the_order_of_equal_steps(path):
    metrics = MetricsFile(path, last_step=0)
    for split in ("train", "validation", "validation_ema"):
        metrics.write(record(1, split))
    metrics.close()
    MetricsFile(path, last_step=1).close()
    kept = [found["split"] for found in read_metrics(path)]
    assert kept == ["train", "validation", "validation_ema"]


def test_reopening_drops_test_figures_of_a_run_killed_before_its_results(path):
    metrics = MetricsFile(path, last_step=0)
    for split in ("validation", "test", "test_ema"):
        metrics.write(record(9, split))
    metrics.close()
    MetricsFile(path, last_step=9).close()
    assert [found["split"] for found in read_metrics(path)] == ["validation"]


@pytest.mark.parametrize("cut", ['{"step": 3, "epo', "{", "\0\0\0", "\xff", "[3]", '{"stfp": 3}'])
def test_a_half_written_last_line_is_dropped(path, cut):
    fill(path, 1, 2)
    with path.open("a", encoding="latin-1") as file:
        file.write(cut)
    assert steps(path) == [1, 2]
    metrics = MetricsFile(path, last_step=9)
    metrics.write(record(3))
    metrics.close()
    assert steps(path) == [1, 2, 3]


class FullDisk:
    """Takes some bytes of the first write, and then no more until there is room."""

    def __init__(self, file):
        self.file, self.room = file, 5

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self.file.write(data[: self.room])
        self.room -= written
        return written

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.fixture
def full_disk(monkeypatch):
    """Files that are opened without a buffer are on a full disk; returns the function to see it."""
    opened, disks = Path.open, []

    def open_on_disk(path, *arguments, **options):
        file = opened(path, *arguments, **options)
        if options.get("buffering") == 0:
            disks.append(file := FullDisk(file))
        return file

    monkeypatch.setattr(Path, "open", open_on_disk)
    return lambda: disks[-1]


def test_on_a_full_disk_records_wait_for_room(path, caplog, full_disk):
    caplog.set_level(logging.INFO, "alexnet_jax")
    metrics = MetricsFile(path, last_step=0)
    for step in (1, 2):
        metrics.write(record(step))
    assert not metrics.complete
    assert caplog.messages == [
        "metrics.jsonl cannot be written (No space left on device); "
        "what is missing there follows when it can."
    ]
    full_disk().room = 10**6
    metrics.write(record(3))
    assert metrics.complete
    assert caplog.messages[1:] == ["metrics.jsonl is complete again."]
    metrics.close()
    assert read_metrics(path) == [record(step) for step in (1, 2, 3)]


def test_a_run_with_incomplete_metrics_fails_unless_it_has_failed(path, full_disk):
    def train(error=None):
        with metric_writer(path, 0, 9, 9, seconds_before=0.0) as writer:
            writer.write_train(1, 100, METRICS)
            if error:
                raise error

    with pytest.raises(SaveFailed, match=r"metrics\.jsonl could not be completed; fix this"):
        train()
    with pytest.raises(KeyError):
        train(KeyError())


def test_lost_metrics_are_missed_on_resume(path, caplog):
    fill(path, 1, 2)
    MetricsFile(path, last_step=2).close()
    assert caplog.text == ""
    MetricsFile(path, last_step=4).close()
    assert "metrics.jsonl lacks the metrics after step 2" in caplog.text


def ask(port, address, body=None):
    """What TensorBoard answers, as JSON."""
    url = f"http://127.0.0.1:{port}/data/plugin/{address}"
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, body and json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())


# Without TensorFlow, which takes ten seconds to import; on a port that is free.
SERVE = """
import sys, types
sys.modules["tensorboard.compat.notf"] = types.ModuleType("notf")
from tensorboard import default, program
board = program.TensorBoard(plugins=default.get_plugins())
board.configure(logdir=sys.argv[1], port=0, load_fast="false", reload_interval=1)
print(board.launch(), flush=True)
sys.stdin.read()
"""


def test_tensorboard_itself_shows_a_run(tmp_path):
    """Read from the addresses that its page reads: scalars, images, histograms, texts, hparams."""
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"seed": 3, "model.features": [4, 8]}))
    (folder / "dataset.json").write_text(json.dumps({"class_names": ["a|b", "c"]}))
    inputs.write_environment(folder, "| Name |\n| conv |", "1 x cpu", 1)
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 3, 3, 4)).astype(np.float32)
    files.write_npz(
        folder / "report.npz",
        {"samples": np.zeros((4, 2, 8, 8, 3), np.uint8), "misclassified_index": np.zeros(0)}
        | inputs.first_filters({"conv": kernel}, 3)
        | inputs.histograms({"conv": {"kernel": kernel}}),
    )
    files.write_npz(
        folder / "predictions.npz", {"label": np.array([0, 1]), "classes": np.array([[0], [0]])}
    )
    fill(folder / "metrics.jsonl", 1, 2)  # by an earlier session, which has its own events
    metrics = MetricsFile(folder / "metrics.jsonl", last_step=2)
    with writers.tensorboard_events(folder):
        metrics.write(record(3, loss=0.5, images=128))
        metrics.write(record(4, loss=0.125, images=128))
        metrics.write(record(4, "validation", loss=0.5, accuracy=0.25))  # of a run without a test
        metrics.close()
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SERVE, str(folder.parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        try:
            port = urllib.parse.urlparse(server.stdout.readline().strip()).port
            deadline = time.monotonic() + 60
            tags = {"train/loss", "validation/loss", "validation/accuracy"}
            kinds = ("scalars", "images", "histograms", "text")

            def loaded():  # one event after another, each of one kind
                return [len(ask(port, f"{kind}/tags").get("one", ())) for kind in kinds]

            while loaded() != [3, 3, 1, 3] and time.monotonic() < deadline:
                time.sleep(0.1)
            assert set(ask(port, "scalars/tags")["one"]) == tags
            losses = ask(port, "scalars/scalars?run=one&tag=train/loss")
            assert [(step, value) for _, step, value in losses] == [(3, 0.5), (4, 0.125)]
            images = ask(port, "images/tags")["one"]
            assert set(images) == {"augmented", "filters", "confusion"}
            (shown,) = ask(port, "images/images?run=one&tag=confusion")
            address = f"http://127.0.0.1:{port}/data/plugin/images/individualImage?"
            with urllib.request.urlopen(address + shown["query"], timeout=30) as answer:
                assert answer.read().startswith(b"\x89PNG")
            assert set(ask(port, "histograms/tags")["one"]) == {"parameters/conv/kernel"}
            ((_, step, bins),) = ask(
                port, "histograms/histograms?run=one&tag=parameters/conv/kernel"
            )
            assert step == 4
            assert sum(count for *_, count in bins) == kernel.size
            assert set(ask(port, "text/tags")["one"]) == {"config", "environment", "network"}
            (shown,) = ask(port, "text/text?run=one&tag=config")
            assert "<td>seed</td>" in shown["text"]
            asked = {"experimentName": "", "startIndex": 0, "sliceSize": 9}
            asked |= {"allowedStatuses": ["STATUS_UNKNOWN"], "colParams": []}
            (group,) = ask(port, "hparams/session_groups", asked)["sessionGroups"]
            assert group["hparams"] == {"seed": 3, "model.features": "[4, 8]"}
            values = {m["name"]["tag"]: m["value"] for m in group["metricValues"]}
            measured = {"validation/loss": 0.5, "validation/accuracy": 0.25}
            assert values == measured | {"train/loss": 0.125}
        finally:
            server.kill()


def test_texts_of_tensorboard_are_text():
    shown = tensorboard.markdown({"a": "1|2 <b> `x`", "b": [1, 2]})
    assert shown.split("\n")[2:] == [
        "| a | 1&#124;2 &#60;b&#62; &#96;x&#96; |",
        "| b | [1, 2] |",
    ]


def test_scalars_are_the_metrics():
    found = tensorboard.scalars(record(3, "test", loss=0.5, images=128))
    assert found == {"test/loss": 0.5}


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        (("tensorflow",), "No TensorBoard events are written without tensorflow."),
        (("tensorboard", "tensorflow"), "without tensorflow and tensorboard."),
    ],
)
def test_without_tensorflow_it_says_so_once(path, monkeypatch, caplog, missing, says):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else real(name)
    )
    fill(path, 1)
    with writers.tensorboard_events(path.parent):
        pass
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert says in warning.getMessage()
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_child_that_dies_costs_a_warning(path, monkeypatch, caplog):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    fill(path, 1)
    with writers.tensorboard_events(path.parent):
        pass
    (warning,) = caplog.records
    assert "TensorBoard events are incomplete (exit code 1)" in warning.getMessage()


def test_a_child_that_hangs_is_ended(path, monkeypatch, caplog):
    sleeper = path.parent / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(sleeper))
    monkeypatch.setattr(writers, "TENSORBOARD_PATIENCE", 0.1)
    fill(path, 1)
    start = time.monotonic()
    with writers.tensorboard_events(path.parent):
        pass
    assert time.monotonic() - start < 20
    assert "TensorBoard events are incomplete" in caplog.text


def test_without_a_terminal_there_is_a_line_now_and_then(monkeypatch, caplog, capsys):
    caplog.set_level(logging.INFO, "alexnet_jax")
    progress = Progress(total_steps=2000)
    progress.update(record(1000, **METRICS, images_per_second=12345.6))
    assert caplog.text == ""
    monkeypatch.setattr(Progress, "PLAIN_SECONDS", 0.0)
    progress.update(record(1500, **METRICS, images_per_second=12345.6))
    progress.close()
    (line,) = caplog.messages
    assert line == ("step 1,500 of 2,000: loss 2.000, accuracy 25.0%, 12,346 images/s, 00:00 left")
    assert capsys.readouterr() == ("", "")


def test_time_left_is_from_the_pace_since_the_first_update(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(writers.time, "monotonic", lambda: now[0])
    progress = Progress(total_steps=300)
    progress.update(record(100, **METRICS, images_per_second=1.0))
    assert progress.seconds_left(100) == 0.0  # nothing is known yet
    now[0] = 150.0
    assert progress.seconds_left(200) == pytest.approx(50.0)
    assert progress.seconds_left(300) == 0.0


@pytest.mark.parametrize(("seconds", "text"), [(0, "00:00"), (59.6, "00:59"), (3723, "1:02:03")])
def test_duration(seconds, text):
    assert writers.duration(seconds) == text


def test_metric_writer_keeps_the_books(path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(writers.time, "monotonic", lambda: now[0])
    with metric_writer(path, 10, 40, 20, seconds_before=7.0) as writer:
        now[0] = 102.0
        writer.write_train(20, 100, METRICS)
        now[0] = 110.0
        writer.write_eval(20, "validation", METRICS)
        now[0] = 111.0
        writer.write_train(30, 100, METRICS)
        assert writer.seconds == 18.0
    first, measured, second = read_metrics(path)
    assert first == {"step": 20, "epoch": 1.0, "split": "train", **METRICS} | {
        "images": 100,
        "images_per_second": 50.0,
    }
    assert measured == {"step": 20, "epoch": 1.0, "split": "validation", **METRICS}
    assert second["images_per_second"] == 100.0  # the evaluation before does not count


def test_the_pace_is_measured_over_several_dispatches(path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(writers.time, "monotonic", lambda: now[0])
    with metric_writer(path, 0, 9, 9, seconds_before=0.0) as writer:
        for step, seconds in ((1, 2.0), (2, 4.0), (3, 4.001)):
            now[0] = seconds
            writer.write_train(step, 100, METRICS)
    assert [round(r["images_per_second"]) for r in read_metrics(path)] == [50, 50, 75]


def test_log_to_file_appends_with_the_time(tmp_path, caplog):
    caplog.set_level(logging.INFO, "alexnet_jax")
    for text in ("first", "second"):
        with writers.log_to_file(tmp_path / "log.txt"):
            logging.getLogger("alexnet_jax.train").info("%s", text)
    first, second = (tmp_path / "log.txt").read_text().splitlines()
    assert first.endswith(" INFO first")
    assert second.endswith(" INFO second")
    assert first[:2] == "20"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("target", ["/dev/full", "/no/such/folder/log.txt"])
def test_a_log_that_cannot_be_written_is_said_once(tmp_path, target, caplog, capsys):
    (tmp_path / "log.txt").symlink_to(target)
    with writers.log_to_file(tmp_path / "log.txt"):
        for _ in range(2):
            logging.getLogger("alexnet_jax.train").warning("hello")
    assert caplog.text.count("hello") == 2
    assert caplog.text.count("log.txt cannot be written (") == 1
    assert capsys.readouterr() == ("", "")


def test_other_processes_than_the_first_write_nothing(path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with metric_writer(path, 0, 9, 9, seconds_before=0.0) as writer:
        writer.write_train(1, 100, METRICS)
        assert writer.progress.seconds_left(9) == 0.0
    assert list(path.parent.iterdir()) == []


def test_a_run_saves_though_nobody_reads_what_it_says(tmp_path):
    """Ctrl-C ends `tee`, too, in `... 2>&1 | tee log`."""
    code = """
        import logging, os, signal, sys
        from alexnet_jax.cli import common
        from alexnet_jax.distributed.preemption import stop_requests
        from alexnet_jax.run import writers

        @common.entry_point
        def main():
            writers.log_to_terminal()
            with stop_requests() as stop_requested:
                os.kill(os.getpid(), signal.SIGINT)
                logging.getLogger("alexnet_jax").info("on")
            common.say("Saved")
            open(sys.argv[1], "w").write(str(stop_requested()))
            return 75

        sys.exit(main())
    """
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "asked")]
    with open(writer, "wb") as nobody:
        assert subprocess.run(command, stderr=nobody).returncode == 75
    assert (tmp_path / "asked").read_text() == "True"


def test_log_to_terminal_speaks_once(capsys):
    log = logging.getLogger("alexnet_jax")
    before = log.handlers[:], log.level, log.propagate
    others = [logging.getLogger(name) for name in ("", "jax", "absl")]
    levels = [(other.level, other.handlers[:]) for other in others]
    try:
        writers.log_to_terminal()
        writers.log_to_terminal()
        log.info("hello")
        assert capsys.readouterr() == ("", "hello\n")
        assert [(other.level, other.handlers) for other in others] == levels
    finally:
        log.handlers[:], log.level, log.propagate = before
