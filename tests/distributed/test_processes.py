"""Two processes with two devices each: the same run as in one, and nothing lost when one goes."""

import os
import re
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from alexnet_jax import train
from alexnet_jax.distributed import collectives, sharding
from alexnet_jax.distributed.initialize import ProcessFlags, initialize_arguments
from alexnet_jax.errors import EXIT_LOST, InputError
from alexnet_jax.experiments.report import page
from alexnet_jax.run import directory, writers

pytestmark = [
    # Orbax and TensorStore leave their event loops to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

ROOT = Path(__file__).parents[2]
MAKE_MESH = sharding.make_mesh

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (ProcessFlags(coordinator="a:1"), "go together, and there is only --coordinator; give all"),
        (ProcessFlags(num_processes=2), "go together, and there is only --num_processes; give all"),
        (ProcessFlags("a:1", 2), "there is only --coordinator and --num_processes; give all three"),
        (ProcessFlags(num_processes=2, process_id=1), "only --num_processes and --process_id;"),
        (ProcessFlags("a:1", 0, 0), "--num_processes=0 is out of range"),
        (ProcessFlags("a:1", 2, 2), "--process_id=2 with --num_processes=2 is out of range"),
        (ProcessFlags("a:1", 2, -1), "--process_id=-1 with --num_processes=2 is out of range"),
        (ProcessFlags(None, 1, 1), "there is only --num_processes and --process_id"),
        (ProcessFlags("a", 2, 0), "--coordinator=a is not an address; it must be host:port"),
        (ProcessFlags("a:b", 2, 0), "--coordinator=a:b is not an address"),
        (ProcessFlags(":1", 2, 0), "--coordinator=:1 is not an address"),
        (ProcessFlags("a:65536", 2, 0), "--coordinator=a:65536 is not an address"),
        (ProcessFlags("", 2, 0), "--coordinator= is not an address"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, says):
    with pytest.raises(InputError, match=says):
        initialize_arguments(flags, {})


@pytest.mark.parametrize(
    ("flags", "environment"),
    [
        (ProcessFlags(), {}),
        (ProcessFlags(num_processes=1), SLURM | OPEN_MPI),
        (ProcessFlags(None, 1, 0), {}),
        (ProcessFlags(), SLURM | {"SLURM_NTASKS": "1"}),
        (ProcessFlags(), {k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}),  # no srun
        (
            ProcessFlags(),
            {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"},
        ),
        (ProcessFlags(), POD),
        (ProcessFlags(), POD | {"JOB_COMPLETION_INDEX": "0"}),  # without the package to ask with
    ],
)
def test_a_process_on_its_own_joins_nothing(flags, environment):
    assert initialize_arguments(flags, environment) is None


@pytest.mark.parametrize(
    ("environment", "method"),
    [(SLURM, "slurm"), (OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}, "ompi")],
)
def test_clusters_are_found(environment, method):
    """By us as by JAX, which is to find out the rest."""
    assert initialize_arguments(ProcessFlags(), environment) == {"cluster_detection_method": method}


def test_flags_go_before_the_environment():
    found = initialize_arguments(ProcessFlags("a:1", 4, 3), SLURM | OPEN_MPI)
    assert found.pop("cluster_detection_method") == "deactivate"
    assert found == {"coordinator_address": "a:1", "num_processes": 4, "process_id": 3}


def test_open_mpi_5_is_found_on_one_host_only():
    found = initialize_arguments(ProcessFlags(), OPEN_MPI | {"PMIX_NAMESPACE": "prterun-1"})
    assert (found["num_processes"], found["process_id"], found["local_device_ids"]) == (2, 1, [1])
    # All processes of a job must come to the same port, whatever else they draw.
    assert found["coordinator_address"] == "127.0.0.1:62649"
    with pytest.raises(InputError, match="does not say where process 0 is; give --coordinator"):
        initialize_arguments(ProcessFlags(), OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"})


def test_a_single_process_gets_its_own_wishes():
    agree = collectives.AnyProcess(sharding.make_mesh())
    assert agree(True, False) == (True, False)
    assert agree(False, True) == (False, True)


def test_a_folder_that_is_not_shared_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(directory, "SHARED_SECONDS", 0.2)
    with pytest.raises(InputError, match="must name a folder on a file system that all"):
        directory.check_shared(tmp_path)


# One process of a run, with the command line of `main`, that sends itself a signal at a step.
DRIVER = """
import os, sys
from alexnet_jax import main
from alexnet_jax.distributed import watchdog
from alexnet_jax.run import writers
watchdog.HEARTBEAT_SECONDS = 10
number, step = int(sys.argv[1]), int(sys.argv[2])
update = writers.Progress.update
def update_then_signal(self, record):
    update(self, record)
    if number and record["step"] == step:
        os.kill(os.getpid(), number)
writers.Progress.update = update_then_signal
sys.argv = ["main", *sys.argv[3:]]
sys.exit(main.run())
"""


def free_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def run_two(*arguments, signals=((0, 0), (0, 0)), code=DRIVER, slurm=False):
    """Returns exit code and standard error of two processes with two devices each.

    With `slurm` they find each other by the environment that `srun` would set.
    """
    address = free_address()
    variables = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
        "PYTHONPATH": str(ROOT),
    }
    if slurm:  # JAX takes the last 12 bits of the job's number for the port
        job = {"SLURM_JOB_ID": address.split(":")[1], "SLURM_STEP_NODELIST": "localhost"}
        variables |= SLURM | job
    started = [
        subprocess.Popen(
            [
                *(sys.executable, "-c", code, *map(str, signals[i]), *map(str, arguments)),
                *(f"--coordinator={address}", "--num_processes=2", f"--process_id={i}"),
            ],
            cwd=ROOT,
            env=os.environ | variables | ({"SLURM_PROCID": str(i)} if slurm else {}),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        texts = [process.communicate(timeout=200)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(p.returncode, text) for p, text in zip(started, texts, strict=True)]


OPTIONS = {
    "data.image_size": 8,
    "model.features": (8, 8),
    "model.kernels": (3, 3),
    "model.strides": (1, 1),
    "model.pools": (True, True),
    "model.hidden": (16,),
    "model.dropout": 0.1,
    "optimizer.learning_rate": 1e-2,
    "optimizer.warmup_epochs": 0.0,
    "train.batch_size": 128,
    "train.epochs": 2,
    "eval.batch_size": 100,
    "writers.tensorboard": False,
}


def records(folder):
    return writers.read_metrics(folder / "metrics.jsonl")


def newest(folder):
    return max(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


def test_two_processes_train_stop_die_and_go_on_as_one(tmp_path, monkeypatch):
    """One chain of sessions, each a restore of what the last one left."""
    data_dir = tmp_path / "data"
    alone, many = tmp_path / "alone", tmp_path / "many"
    config = runpy.run_path(str(ROOT / "configs/digits.py"))["get_config"]()
    config.update_from_flattened_dict(OPTIONS | {"data.data_dir": str(data_dir)})
    monkeypatch.setattr(sharding, "make_mesh", lambda: MAKE_MESH(jax.devices()[:1]))
    monkeypatch.setattr(page, "write_report", lambda folder: None)  # has its own tests
    train.run(config, alone)
    arguments = ["--config=configs/digits.py", f"--workdir={many}"]
    arguments += [f"--config.{key}={value}" for key, value in OPTIONS.items()]
    arguments += [f"--config.data.data_dir={data_dir}"]

    # SIGTERM comes to one of them: both save the same step, in the middle of an epoch, and leave.
    ended = run_two(*arguments, signals=((0, 0), (int(signal.SIGTERM), 4)))
    assert [code for code, _ in ended] == [75, 75], ended
    saved = int(re.search(r"Saved at step (\d+)\. To go on", ended[0][1])[1])
    assert 4 < saved < 10
    assert newest(many) == saved
    assert [r["step"] for r in records(many) if r["split"] == "train"] == list(range(1, saved + 1))
    assert "Saved" not in ended[1][1]  # the first speaks for all
    assert "step" not in ended[1][1]

    # One of them is killed: the other says so and ends.
    ended = run_two(*arguments, signals=((0, 0), (int(signal.SIGKILL), 14)))
    assert [code for code, _ in ended] == [EXIT_LOST, -signal.SIGKILL], ended
    assert f"Resuming from step {saved}." in ended[0][1]
    assert (
        "error: process 1 of this run is gone, and none can continue without it; re" in ended[0][1]
    )
    assert "Traceback" not in ended[0][1]

    # What two processes have saved goes on in one, with another number of devices.
    train.run(config, many)
    log = (many / "log.txt").read_text()
    assert re.search(r"epochs, on 4 x cpu on .* in 2 processes\.$", log, re.MULTILINE)
    assert re.search(r"epochs, on \d+ cores? of .*\.$", log, re.MULTILINE)
    # All of it is the run that one process does on one device, to rounding, which grows.
    for one, other in zip(records(alone), records(many), strict=True):
        assert one.keys() == other.keys()
        assert (one["step"], one["split"]) == (other["step"], other["split"])
        if one["step"] <= 10:
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert not list(many.glob("events*"))

    # Each process reads the weights of a run that another begins as.
    tuned = ["--config=configs/finetune.py:" + str(many), "--config.data.name=digits"]
    tuned += [f"--config.data.data_dir={data_dir}", f"--workdir={tmp_path / 'tuned'}"]
    tuned += ["--config.train.epochs=1", "--config.train.batch_size=512"]
    assert [code for code, _ in run_two(*tuned)] == [0, 0]


# What only one process finds wrong ends both, with the sentence of the one; nothing hangs.
MISTAKEN = """
import os, sys
from alexnet_jax import errors
from alexnet_jax.distributed import collectives, sharding
from alexnet_jax.distributed.initialize import ProcessFlags, initialized
import jax
flags, (host, count, process) = ProcessFlags(), (a.split("=")[1] for a in sys.argv[-3:])
process = int(process)
if "SLURM_JOB_ID" not in os.environ:
    flags = ProcessFlags(host, int(count), process)
with initialized(flags) as found:
    assert found == process == jax.process_index()
    mesh = sharding.make_mesh()
    assert mesh.size == 4
    agree = collectives.AnyProcess(mesh)
    said = [agree(process == 1 and i == 2, i == 3) for i in range(6)]
    n, y = False, True
    assert said == [(n, n), (n, n), (n, n), (y, n), (n, y), (n, n)], said
    agree(True, True)
    agree.forget()
    assert agree(False, False) == (False, False)
    collectives.check_equal([1, "a"], "the list")
    for what in (lambda: collectives.check_equal(process, "the number"), None):
        try:
            if what is None:
                with collectives.fail_together():
                    if process == 1:
                        raise errors.InputError("x" * 3000)
            else:
                what()
        except errors.InputError as error:
            print(str(error)[:62], len(str(error)), file=sys.stderr)
    if process == 1 and sys.argv[3] == "program":
        raise KeyError("a mistake of the program")
    if process == 1:
        with collectives.fail_alone():
            raise errors.InputError("image 7 cannot be decoded.")
    jax.block_until_ready(agree(True))
    jax.experimental.multihost_utils.sync_global_devices("wait for one that does not come")
"""


def test_an_error_of_one_process_alone_ends_all():
    (first, said), (second, said_too) = run_two("image", code=MISTAKEN)
    assert (first, second) == (EXIT_LOST, 2), (said, said_too)
    assert said_too.endswith("error: image 7 cannot be decoded.\n")
    assert "error: process 1 of this run is gone" in said


def test_processes_agree_and_fail_together():
    (first, said), (second, said_too) = run_two("program", code=MISTAKEN, slurm=True)
    for text in (said, said_too):
        assert "process 1: the number differs from that of process 0; it must  74" in text
        assert f"process 1: {'x' * 51} 2000" in text
    assert (first, second) == (EXIT_LOST, 1), (said, said_too)
    assert "KeyError: 'a mistake of the program'" in said_too
    assert said_too.endswith("This process ends here, and with it the others.\n")
    assert "error: process 1 of this run is gone, and none can continue without it; rerun" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("flags", "environment", "code", "says"),
    [
        (
            ["--coordinator={address}", "--num_processes=2", "--process_id=1"],
            {},
            EXIT_LOST,
            r"the processes have not all connected at 127\.0\.0\.1:\d+ within 2 s; .*\n",
        ),
        (
            [],
            SLURM | {"SLURM_PROCID": "x"},
            2,
            r"the processes cannot be joined \(ValueError.*'x'.*\n",
        ),
    ],
    ids=["nobody_answers", "broken_environment"],
)
def test_processes_that_cannot_be_joined_are_a_sentence(flags, environment, code, says):
    program = """
import sys
from alexnet_jax import main
from alexnet_jax.distributed import initialize
initialize.CONNECT_SECONDS = 2
sys.argv = ["main", "--config=configs/digits.py", *sys.argv[1:]]
sys.exit(main.run())
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *(flag.format(address=free_address()) for flag in flags)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == code
    assert re.fullmatch(f"error: {says}", done.stderr)
