"""The run folder: who may go on in it, and files that are whole or not there."""

import errno
import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from socket import gethostname

import pytest

from alexnet_jax import train
from alexnet_jax.config import RESUMABLE, default_config, flatten
from alexnet_jax.errors import InputError
from alexnet_jax.run.directory import RunDirectory, in_use
from alexnet_jax.run.files import read_json, write_json


def config(**changes):
    config = default_config()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


def open_once(workdir, config):
    with RunDirectory.open(workdir, config) as run:
        return run.path


def check_dataset(folder, info):
    RunDirectory(folder).check_dataset(info)


def refusal(workdir, config):
    with pytest.raises(InputError) as caught:
        open_once(workdir, config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_makes_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = open_once(Path("runs/new"), config())
    assert folder == tmp_path / "runs/new"
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "config.json", "log.txt"]
    saved = json.loads((folder / "config.json").read_text())
    assert saved.keys() == dict(flatten(config())).keys()
    assert saved["optimizer.learning_rate"] == 1e-3


def test_knows_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_once(Path("~/run"), config()) == tmp_path / "run"


def test_an_empty_folder_will_do(tmp_path):
    (tmp_path / ".hidden").touch()
    open_once(tmp_path, config())


def test_the_same_config_goes_on(tmp_path):
    open_once(tmp_path, config(model__hidden=(8,)))
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    before = (tmp_path / "config.json").read_bytes()
    assert open_once(tmp_path, config(model__hidden=(8,))) == tmp_path
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_run_that_never_began_does_not_bind(tmp_path):
    """A mistyped data set is found after the folder is made; the corrected command must run."""
    open_once(tmp_path, config(data__name="cifar1O"))
    (tmp_path / "log.txt").touch()
    open_once(tmp_path, config())
    assert read_json(tmp_path / "config.json")["data.name"] == "cifar10"


def test_another_config_is_refused_with_each_difference(tmp_path):
    open_once(tmp_path, config())
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    other = config(train__epochs=3, model__hidden=(8,), optimizer__learning_rate=0.5)
    message = refusal(tmp_path, other)
    assert (
        "model.hidden was [4096, 4096] and is [8]; "
        "optimizer.learning_rate was 0.001 and is 0.5; train.epochs was 20 and is 3."
    ) in message
    assert "--workdir" in message
    assert "data.name" not in message
    open_once(tmp_path, config())  # and nothing has changed


def test_a_newer_option_had_its_default(tmp_path):
    open_once(tmp_path, config())
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    saved = read_json(tmp_path / "config.json")
    del saved["train.ema_decay"]
    write_json(tmp_path / "config.json", saved)
    assert "train.ema_decay was 0.0 and is 0.5" in refusal(tmp_path, config(train__ema_decay=0.5))
    open_once(tmp_path, config())
    assert read_json(tmp_path / "config.json")["train.ema_decay"] == 0.0


@pytest.mark.parametrize("name", ["resnet", "of another version"])
def test_another_network_is_another_config(tmp_path, name):
    options = dict(flatten(default_config("resnet"))) | {"model.name": name}
    write_json(tmp_path / "config.json", json.loads(json.dumps(options)))
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    message = refusal(tmp_path, config())
    assert f"model.name was '{name}' and is 'alexnet'" in message
    assert "model.width was 64 and is 'absent'" in message
    assert "Give the old values to resume" in message


def test_an_option_that_is_gone_is_refused(tmp_path):
    open_once(tmp_path, config())
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    saved = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", saved | {"train.old": 1})
    assert "of another version, whose config has train.old;" in refusal(tmp_path, config())


def test_what_is_not_computed_may_differ(tmp_path):
    open_once(tmp_path, config())
    others = {"data.data_dir": "/x", "checkpoint.every_seconds": 1.0, "writers.tensorboard": False}
    others |= {"data.in_memory": "off", "data.workers": 0, "data.prefetch": 3}
    assert others.keys() == RESUMABLE
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    for key, value in others.items():
        open_once(tmp_path, config(**{key: value}))
        assert read_json(tmp_path / "config.json")[key] == value  # who uses the network looks here


def test_what_failed_before_its_first_step_may_be_another_run(tmp_path):
    open_once(tmp_path, config())
    (tmp_path / "metrics.jsonl").touch()
    open_once(tmp_path, config(train__batch_size=64))


def test_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "is a file; name a folder" in refusal(tmp_path / "file", config())
    assert "cannot be written" in refusal(tmp_path / "file" / "below", config())
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    message = refusal(tmp_path / "run", config())
    assert message.endswith("cannot be written (Permission denied); name a folder that can.")


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_folder_that_cannot_be_made_is_refused():
    assert "cannot be written" in refusal(Path("/proc/run"), config())


@pytest.mark.parametrize("name", ["~no-such-user/run", "x" * 300])
def test_a_name_that_cannot_be_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert f"--workdir={name} cannot be written (" in refusal(Path(name), config())


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    assert "holds files but no config.json" in refusal(tmp_path, config())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("text", ["", '{"seed": 0', "[]", "3", "null", "\xff\xfe"])
def test_a_damaged_config_is_refused(tmp_path, text):
    open_once(tmp_path, config())
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    message = refusal(tmp_path, config())
    assert str(tmp_path / "config.json") in message
    assert "damaged" in message
    assert (tmp_path / "config.json").read_text(encoding="latin-1") == text


def test_weights_without_a_record_of_training_are_something_to_lose(tmp_path):
    open_once(tmp_path, config())  # as an import leaves a folder
    write_json(tmp_path / "saved.json", {"step": 0})
    write_json(tmp_path / "dataset.json", {"checksums": {"train": "a"}})
    assert "holds a run with another config" in refusal(tmp_path, config(seed=1))
    with pytest.raises(InputError, match="have changed since the run"):
        check_dataset(tmp_path, {"name": "x", "checksums": {"train": "b"}})
    assert read_json(tmp_path / "config.json")["seed"] == 0
    assert read_json(tmp_path / "dataset.json") == {"checksums": {"train": "a"}}


def test_what_a_kill_left_goes_away(tmp_path):
    open_once(tmp_path, config())
    left_over = [tmp_path / ".results.json.7.tmp", tmp_path / ".writable.1.tmp"]
    for path in left_over:
        path.write_text("{")
        os.utime(path, (0, 0))
    (tmp_path / ".report.html.8.tmp").touch()  # which another program is writing now
    open_once(tmp_path, config())
    left = [".lock", ".report.html.8.tmp", "config.json", "log.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_two_runs_in_one_folder_are_refused(tmp_path):
    assert not in_use(tmp_path)
    with RunDirectory.open(tmp_path, config()):
        assert in_use(tmp_path)
        message = refusal(tmp_path, config(seed=1))
    assert not in_use(tmp_path)
    holder = f"process {os.getpid()} on {gethostname()}"
    assert f"a run is in progress in {tmp_path} ({holder})" in message
    assert read_json(tmp_path / "config.json")["seed"] == 0
    open_once(tmp_path, config(seed=1))


def test_the_lock_ends_with_a_killed_holder_though_its_children_live(tmp_path):
    code = """
        import subprocess, sys, time
        from pathlib import Path
        from alexnet_jax.config import default_config
        from alexnet_jax.run.directory import RunDirectory
        with RunDirectory.open(Path(sys.argv[1]), default_config()):
            child = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL)
            print(child.pid, flush=True)
            time.sleep(60)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        child = int(holder.stdout.readline())
        try:
            assert f"process {holder.pid} on {gethostname()}" in refusal(tmp_path, config())
            holder.kill()
            holder.wait()
            open_once(tmp_path, config())
        finally:
            os.kill(child, signal.SIGKILL)


def test_without_locks_it_warns_and_goes_on(tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    open_once(tmp_path, config())
    assert "has no locks (No locks available); make sure that no other run uses it" in caplog.text


DATA = {"name": "digits", "checksums": {"train": "9 bytes", "test": "8 bytes"}}


def test_other_data_are_refused_once_a_run_has_begun(tmp_path):
    changed = DATA | {"checksums": {"train": "9 bytes", "test": "7 bytes"}}
    check_dataset(tmp_path, DATA)
    check_dataset(tmp_path, changed)  # nothing was trained yet
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"the test files of digits .*were 7 bytes and are 8 byt"):
        check_dataset(tmp_path, DATA)
    assert read_json(tmp_path / "dataset.json") == changed
    check_dataset(tmp_path, changed)


def test_a_run_of_an_earlier_version_gets_its_checksums_now(tmp_path):
    write_json(tmp_path / "dataset.json", {"name": "digits"})
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    check_dataset(tmp_path, DATA)
    assert read_json(tmp_path / "dataset.json") == DATA


def test_an_open_run_logs_and_writes(tmp_path):
    with RunDirectory.open(tmp_path / "run", config()) as run:
        assert (run.path, run.results) == (tmp_path / "run", None)
        logging.getLogger("alexnet_jax.somewhere").warning("a message")
        run.write(lambda folder, text: (folder / "model.txt").write_text(text), "a model")
        run.check_dataset(DATA)
        (run.path / "report.html").write_text("of another result")
        run.write_results({"test": {"accuracy": 0.5}})
        assert run.results == {"test": {"accuracy": 0.5}}
        assert in_use(run.path)
    logging.getLogger("alexnet_jax.somewhere").warning("another message")
    text = (run.path / "log.txt").read_text()
    assert ("WARNING a message" in text, "another" in text) == (True, False)
    assert (run.path / "model.txt").read_text() == "a model"
    assert read_json(run.path / "dataset.json") == DATA
    assert not (run.path / "report.html").exists()
    with RunDirectory.open(tmp_path / "run", config()) as run:
        assert run.results == {"test": {"accuracy": 0.5}}


def test_an_invalid_config_makes_no_folder(tmp_path):
    with pytest.raises(InputError, match=r"train\.epochs"):
        train.run(config(train__epochs=0), tmp_path / "run")
    assert not (tmp_path / "run").exists()
