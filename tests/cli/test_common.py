"""What all programs do alike: how they end, whatever happens, and what they hand on to runs."""

import argparse
import contextlib
import errno
import importlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from alexnet_jax import environment, main, train
from alexnet_jax.cli import command_line, common
from alexnet_jax.cli.main import COMMANDS
from alexnet_jax.distributed import initialize
from alexnet_jax.errors import Diverged, InputError, Interrupted, SaveFailed, shell_code
from alexnet_jax.run import writers

ROOT = Path(__file__).parents[2]
NAMES = [f"alexnet_jax.cli.{name.replace('-', '_')}" for name in COMMANDS if name != "train"]
SCRIPTS = [path for path in (ROOT / "scripts").glob("*.py") if "entry_point" in path.read_text()]
NAMES += sorted(f"scripts.{path.stem}" for path in SCRIPTS)

ENDINGS = [
    (InputError("--top=0 is too few."), 2, "error: --top=0 is too few.\n"),
    (SaveFailed("the disk is full."), 74, "error: the disk is full.\n"),
    (Diverged("the loss is nan."), 3, "error: the loss is nan.\n"),
    (KeyboardInterrupt(), 130, "Interrupted"),
]


@contextlib.contextmanager
def nobody_reading():
    """Has a program write to a pipe that nobody reads, as behind `| head`."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream, contextlib.redirect_stdout(stream):
        yield  # closing it writes out what is left, as the end of a process does


# --- how they end -------------------------------------------------------------------------------


@pytest.mark.parametrize(("error", "code", "says"), ENDINGS, ids=lambda value: str(value)[:16])
@pytest.mark.parametrize("name", NAMES)
def test_every_script_ends_alike(name, error, code, says, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", fail)
    assert importlib.import_module(name).main([]) == code
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(says)


@pytest.mark.parametrize("name", NAMES)
def test_every_script_ends_quietly_where_nobody_reads(name, capfd):
    with nobody_reading():
        assert importlib.import_module(name).main(["--help"]) == 0
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", NAMES)
def test_every_script_says_how_it_may_end(name, capsys):
    with pytest.raises(SystemExit) as leaving:
        importlib.import_module(name).main(["--help"])
    assert leaving.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    codes = " ".join(lines).partition("Exit codes: 0 ")[2]
    for code in ("2 bad input", "130 after Ctrl-C"):
        assert code in codes
    assert max(map(len, lines)) <= 100


def test_no_help_waits_for_jax():
    program = f"""
import contextlib, importlib, sys
for name in {NAMES}:
    with contextlib.suppress(SystemExit):
        importlib.import_module(name).main(["--help"])
    assert "jax" not in sys.modules, name
    assert "numpy" not in sys.modules or name.startswith("scripts."), name
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)


def test_a_code_is_returned_and_none_is_0():
    @common.entry_point
    def program(code):
        """Says so."""
        return code

    assert [program(code) for code in (None, 0, 1, 75)] == [0, 0, 1, 75]
    assert program.__doc__ == "Says so."


@pytest.mark.parametrize("length", [10, 10**6], ids=["in the buffer", "beyond it"])
def test_what_nobody_reads_goes_nowhere(length):
    @common.entry_point
    def program():
        print("x" * length)
        print("y")
        return 1

    with nobody_reading():
        # What fails to be written at once ends the program; what waits is noticed after its end.
        assert program() == (1 if length == 10 else 0)


def test_a_full_disk_is_a_sentence(capsys):
    @common.entry_point
    def program(error=None):
        print("x")
        if error:
            raise error

    with open("/dev/full", "w") as full, contextlib.redirect_stdout(full):
        assert program() == 74
    said = "error: {} could not be written (No space left on device).\n"
    assert capsys.readouterr().err == said.format("the output")
    assert program(OSError(errno.ENOSPC, "No space left on device", "/tmp/a")) == 74
    assert capsys.readouterr() == ("x\n", said.format("/tmp/a"))


def test_a_mistake_of_the_program_keeps_its_traceback():
    """Another pipe than that of its output may have broken, such as one to a process of its own."""

    @common.entry_point
    def program(error):
        raise error

    with nobody_reading(), pytest.raises(ZeroDivisionError):
        program(ZeroDivisionError())
    with contextlib.redirect_stdout(io.StringIO()), pytest.raises(BrokenPipeError):
        program(BrokenPipeError())


def test_a_killed_process_has_the_code_of_a_shell():
    assert [shell_code(code) for code in (0, 2, -signal.SIGKILL)] == [0, 2, 137]


@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        *ENDINGS[:3],
        (
            Interrupted(1234),
            75,
            "Saved at step 1,234. To go on:\n  python -m alexnet_jax.main --x\n",
        ),
    ],
    ids=lambda value: str(value)[:16],
)
def test_of_many_processes_the_first_says_how_training_ended(
    error, code, says, process, monkeypatch, capsys
):
    def fail(*_, **__):
        raise error

    flags = initialize.ProcessFlags("localhost:1234", 2, process)
    monkeypatch.setattr(sys, "argv", ["main.py", "--x"])
    monkeypatch.setattr(command_line, "parse", lambda _: (None, None, flags))
    monkeypatch.setattr(writers, "log_to_terminal", lambda **_: None)
    monkeypatch.setattr(environment, "prepare", lambda: ())
    monkeypatch.setattr(initialize, "initialized", lambda _: contextlib.nullcontext(process))
    monkeypatch.setattr(train, "run", fail)
    assert main.run() == code
    err = capsys.readouterr().err
    assert err.startswith(says) if process == 0 else err == ""
    assert ("each with its own --process_id" in err) == (code == 75 and process == 0)


def test_training_that_is_stopped_at_once_says_how_to_go_on(monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["main.py", "--config=a b.py"])
    monkeypatch.setattr(command_line, "parse", interrupt)
    assert main.run() == 130
    assert capsys.readouterr().err.endswith("\n  python -m alexnet_jax.main '--config=a b.py'\n")


# --- flags for every run ------------------------------------------------------------------------


def test_a_path_of_an_option_may_begin_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/her")
    assert common.path("~/runs") == Path("/home/her/runs")
    with pytest.raises(argparse.ArgumentTypeError, match="-name/x' is in the home of no user"):
        common.path("~nobody-of-that-name/x")


def test_a_command_line_is_split_at_its_first_dashes():
    assert common.split(["a", "--b=1"]) == (["a", "--b=1"], [])
    assert common.split(["a", "--", "--b", "--", "c"]) == (["a"], ["--b", "--", "c"])


@pytest.mark.parametrize("flag", ["--workdir", "--workdir=x", "-workdir=x", "--noconfig.seed"])
def test_a_flag_that_is_taken_is_refused_in_every_form(flag):
    taken = ("config", "workdir", "config.seed")
    given = flag.removesuffix("=x")
    with pytest.raises(
        InputError, match=rf"^{given} after -- is set by the sweep itself; leave it"
    ):
        common.check_flags(["--config.train.epochs=2", flag], taken, "the sweep")
    common.check_flags(["--config.seeds", "--workdirs=x", "workdir"], taken, "the sweep")


COMPARE, SWEEP = "alexnet_jax.cli.compare", "alexnet_jax.cli.sweep"
DIGITS = "configs/digits.py"
RATE = "--range=optimizer.learning_rate=1e-4:1e-2:log"


@pytest.mark.parametrize(
    ("name", "own", "flag", "who"),
    [
        ("scripts.ablation", [], "--config=x.py", "the ablation"),
        ("scripts.ablation", [], "--config.num_seeds=2", "the ablation"),
        (COMPARE, [DIGITS], "--workdir=x", "the comparison"),
        (
            "alexnet_jax.cli.compare",
            [DIGITS, "--separate_runs"],
            "--config.seed=3",
            "the comparison",
        ),
        (SWEEP, [f"--config={DIGITS}", RATE], "--workdir=x", "the sweep"),
        (
            "alexnet_jax.cli.sweep",
            [f"--config={DIGITS}", RATE],
            "--noconfig.eval.test",
            "the sweep",
        ),
        (
            "alexnet_jax.cli.sweep",
            [f"--config={DIGITS}", RATE],
            "--config.optimizer.learning_rate=1",
            "the sweep",
        ),
        ("scripts.launch_local", ["2"], "--process_id=0", "launch_local"),
    ],
)
def test_what_a_program_sets_in_its_runs_is_refused_after_dashes(
    name, own, flag, who, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(subprocess.Popen, "__init__", lambda *_, **__: pytest.fail("started"))
    assert importlib.import_module(name).main([*own, "--", "--config.train.epochs=2", flag]) == 2
    given = flag.split("=")[0]
    assert capsys.readouterr() == (
        "",
        f"error: {given} after -- is set by {who} itself; leave it out.\n",
    )
