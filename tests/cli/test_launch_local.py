"""The local launcher, with small programs in place of trainings."""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from alexnet_jax.errors import InputError
from scripts import launch_local as launcher

SCRIPTS = Path(__file__).parents[2] / "scripts"


def launch(*programs, variables=None):
    commands = [[sys.executable, "-c", program] for program in programs]
    return launcher.launch(commands, variables or [{}] * len(programs))


def test_the_first_has_the_terminal_and_the_others_a_number(capfd):
    tell = "import os, sys; print('[Gloo] noise'); print(os.environ['WHO'], file=sys.stderr)"
    variables = [{"WHO": who} for who in ("zero", "one", "two")]
    assert launch(tell, tell, tell, variables=variables) == 0
    out, err = capfd.readouterr()
    assert out == "[Gloo] noise\n"
    assert sorted(err.splitlines()) == ["[1] one", "[2] two", "zero"]


@pytest.mark.parametrize(
    ("how", "code", "says"),
    [
        ("raise SystemExit(2)", 2, "process 1 ended with exit code 2."),
        ("import os; os.kill(os.getpid(), 9)", 137, "process 1 was killed by SIGKILL."),
        ("raise SystemExit(75)", 75, None),
    ],
)
def test_the_first_failure_is_the_exit_code_and_ends_all(capfd, monkeypatch, how, code, says):
    monkeypatch.setattr(launcher, "GRACE_SECONDS", 0.3)
    assert launch("import time; time.sleep(100)", how) == code
    err = capfd.readouterr().err
    assert (f"launch_local: {says}\n" in err) if says else ("exit code" not in err)
    assert "process 0 still runs 0 s later; killing it." in err


def test_signals_reach_every_process_once(tmp_path):
    program = """
import signal, sys, time
def saved(number, frame):
    with open(sys.argv[1], "a") as file:
        print(number, file=file)
    raise SystemExit(75)
signal.signal(signal.SIGTERM, saved)
open(sys.argv[1], "w").close()
time.sleep(100)
"""
    files = [tmp_path / "0", tmp_path / "1"]

    def send_when_ready():
        while not all(file.exists() for file in files):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send_when_ready).start()
    commands = [[sys.executable, "-c", program, str(file)] for file in files]
    assert launcher.launch(commands, [{}, {}]) == 75
    assert [file.read_text() for file in files] == ["15\n", "15\n"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_devices_are_fake_ones_or_a_gpu_each(monkeypatch):
    cpu = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "3"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert launcher.device_variables(1, 2, 3, {}) == cpu
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert launcher.device_variables(1, 2, 3, {"JAX_PLATFORMS": "cpu"}) == cpu
    visible = {"CUDA_VISIBLE_DEVICES": "2,3,5,7"}
    assert launcher.device_variables(1, 2, 2, visible) == {"CUDA_VISIBLE_DEVICES": "5,7"}
    assert launcher.device_variables(1, 4, 1, visible) == {"CUDA_VISIBLE_DEVICES": "3"}
    auto = {"JAX_PLATFORMS": "", "CUDA_VISIBLE_DEVICES": "2,3,-1,4"}  # as JAX and CUDA read them
    assert launcher.device_variables(0, 2, 1, auto) == {"CUDA_VISIBLE_DEVICES": "2"}
    with pytest.raises(InputError, match="need 3, and there are 2; give fewer"):
        launcher.device_variables(0, 3, 1, auto)
    with pytest.raises(InputError, match="need 5, and there are 4; give fewer"):
        launcher.device_variables(0, 5, 1, visible)


@pytest.mark.parametrize(
    "own", [["2", "--devices_per_process=2"], ["--devices_per_process", "2", "2"]], ids=" ".join
)
def test_the_training_program_is_what_it_starts(own):
    done = subprocess.run(
        [sys.executable, SCRIPTS / "launch_local.py", *own, "--", "--config=nowhere.py"],
        env=os.environ | {"PYTHONPATH": str(SCRIPTS.parent)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2
    assert "error: --config=nowhere.py is not a file" in done.stderr
    assert "Traceback" not in done.stderr
