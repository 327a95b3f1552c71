"""Measures this library beside PyTorch, and what stands around its training step.

python benchmarks/performance.py                       everything, about 30 minutes on 2 cores
python benchmarks/performance.py train_step inference  some of it
python benchmarks/performance.py --json=figures.json

Contenders take turns within one run, so that what else the machine does meets all alike; the
figures are medians, and ratios of medians. PyTorch comes with `pip install -e ".[peers]"`.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.contenders import (  # noqa: E402  (the path comes first)
    AIRBENCH,
    AIRBENCH_BFLOAT16,
    CONTENDERS,
    DEFAULT_CONFIG,
    FAST_CONFIG,
    serve,
)

MAIN = [sys.executable, "-m", "alexnet_jax.main"]
FLOPS_FORWARD = 400.3e6  # of the reference network, an image; a training step has three times that


class Contender:
    """A process of its own that times what it is asked to."""

    def __init__(self, name: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._connection, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, name), daemon=True)
        self._process.start()

    def time(self, what: str, size: int, seconds: float) -> list[float] | str:
        """Returns seconds, one for each time it was done, or why it cannot be."""
        self._connection.send((what, size, seconds))
        return self._connection.recv()

    def close(self) -> None:
        """Ends the process."""
        self._connection.send(None)
        self._process.join()


def take_turns(what: str, size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Times all contenders, one after the other, round after round."""
    contenders = [Contender(name) for name in options.contenders]
    taken: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    failed: dict[str, str] = {}
    for _, contender in itertools.product(range(options.rounds), contenders):
        enough = taken[contender.name][1:] and taken[contender.name][-1] > options.seconds
        if contender.name in failed or enough:
            continue
        result = contender.time(what, size, options.seconds)
        if isinstance(result, str):
            failed[contender.name] = result
        else:
            taken[contender.name] += result
    for contender in contenders:
        contender.close()
    medians = {name: statistics.median(times) for name, times in taken.items() if times}
    first = next(iter(medians), "")
    work = FLOPS_FORWARD * size * (3 if what == "train" else 1)
    rows: list[dict[str, Any]] = [
        {
            "contender": name,
            "milliseconds": 1e3 * seconds,
            "range": [1e3 * min(taken[name]), 1e3 * max(taken[name])],
            "images_per_second": size / seconds,
            "gflops_per_second": work / seconds / 1e9,
            "times_the_first": medians[first] / seconds,
        }
        for name, seconds in medians.items()
    ]
    print(f"\n{what}, {size} images\n")
    print("| | ms | from - to | images/s | GFLOP/s | speed of the first is so many times this |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        low, high = row["range"]
        print(
            f"| {row['contender']} | {row['milliseconds']:.0f} | {low:.0f} - {high:.0f} "
            f"| {row['images_per_second']:.1f} | {row['gflops_per_second']:.0f} "
            f"| {1 / row['times_the_first']:.2f} |"
        )
    for name, why in failed.items():
        print(f"| {name} | not measured: {why} | | | | |")
    return {"rows": rows, "not_measured": failed}


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """What is measured on, and the most that a matrix product reaches there."""
    import jax
    import jax.numpy as jnp

    from alexnet_jax.ops.cpu_info import cpu_name

    names = ("jax", "flax", "optax", "numpy", "torch")
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "device": str(jax.devices()[0].device_kind),
        "platform": jax.default_backend(),
        "processor": cpu_name(),
        "versions": {name: _version(name) for name in names},
    }
    print(json.dumps(found, indent=1))
    if jax.default_backend() == "cpu":
        print("No accelerator is at hand: what follows is measured on the CPU alone.")
    side = 2048 if jax.default_backend() == "cpu" else 8192
    for dtype in ("float32", "bfloat16"):
        matrix = jnp.ones((side, side), dtype)
        product = jax.jit(lambda a: jnp.dot(a, a, preferred_element_type=jnp.float32))
        times = []
        for _ in range(10):
            started = time.perf_counter()
            jax.block_until_ready(product(matrix))
            times.append(time.perf_counter() - started)
            if times[-1] > 5:
                break
        found[f"matrix_product_{dtype}_gflops"] = 2 * side**3 / min(times) / 1e9
        print(f"matrix product, {dtype}: {found[f'matrix_product_{dtype}_gflops']:.0f} GFLOP/s")
    return found


def train_step(options: argparse.Namespace) -> dict[str, Any]:
    """One step: forward, backward, Adam."""
    return {"128": take_turns("train", 128, options)}


def inference(options: argparse.Namespace) -> dict[str, Any]:
    """The forward pass alone."""
    return {str(size): take_turns("infer", size, options) for size in (1, 128, 1000)}


def recipes(options: argparse.Namespace) -> dict[str, Any]:
    """What an epoch of 50,000 images takes with ours, and with those the fast one is held against.

    How many epochs each needs is another question (docs/results.md). Steps alone: without reading
    and changing images. PyTorch's classic recipe is the reference network with Adam; it and
    airbench's are measured in bfloat16, too, which some machines compute sooner.
    """
    sizes = {
        DEFAULT_CONFIG: 128,
        FAST_CONFIG: 256,
        AIRBENCH: 500,
        AIRBENCH_BFLOAT16: 500,
        "PyTorch float32, channels_last": 128,
        "PyTorch bfloat16, fused Adam": 128,
    }
    contenders = {name: Contender(name) for name in sizes}
    rates: dict[str, list[float]] = {name: [] for name in sizes}
    for _, (name, contender) in itertools.product(range(options.rounds), contenders.items()):
        seconds = contender.time("train", sizes[name], options.seconds)
        if isinstance(seconds, str):
            raise SystemExit(f"{name}: {seconds}")
        rates[name].append(sizes[name] / statistics.median(seconds))
    found = {}
    for name, contender in contenders.items():
        contender.close()
        rate = statistics.median(rates[name])
        found[name] = {"images_per_second": rate, "range": [min(rates[name]), max(rates[name])]}
        print(f"{name}: {rate:.0f} images/s, {50_000 / rate:.0f} s an epoch; {found[name]}")
    return found


class Run:
    """A run of the main program that goes only when it is let."""

    def __init__(self, arguments: list[str]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._metrics = Path(self._folder.name, "run", "metrics.jsonl")
        command = [*MAIN, *arguments, f"--workdir={self._metrics.parent}"]
        # In a session of its own, with the process that writes for TensorBoard.
        self._process = subprocess.Popen(
            command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True
        )
        os.killpg(self._process.pid, signal.SIGSTOP)
        self.seconds = 0.0  # that it went

    def go(self, step: int, seconds: float = float("inf")) -> bool:
        """Lets it go until a step is written down, or for so long; returns whether it is."""
        os.killpg(self._process.pid, signal.SIGCONT)
        started = time.perf_counter()
        reached = _wait_for_step(self._metrics, step, self._process, seconds)
        os.killpg(self._process.pid, signal.SIGSTOP)
        self.seconds += time.perf_counter() - started
        return reached

    def memory(self) -> tuple[float, float]:
        """Returns the resident memory, and the most there has been, in GiB."""
        return _memory(self._process.pid)

    def close(self) -> None:
        """Ends it."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._folder.cleanup()


def epoch(options: argparse.Namespace) -> dict[str, Any]:
    """Epochs of the default network through the main program, beside its steps alone.

    The two take turns of a few seconds, one of them stopped while the other computes, since this
    is about less than a machine's speed changes in a minute. Of the run, the second and third
    epoch are timed: with their data, augmentation, metrics, log and saving, and without start-up
    or evaluation. The steps alone are of one batch that is there.
    """
    size, steps = 128, options.epoch_steps
    contender = Contender(DEFAULT_CONFIG)
    alone: list[float] = []

    def turn() -> None:
        seconds = contender.time("train", size, options.seconds)
        if isinstance(seconds, str):
            raise SystemExit(seconds)
        alone.extend(seconds)

    turn()  # compiles; so does the run's first epoch
    alone.clear()
    flags = ["--config.data.validation_fraction=0.0", "--config.train.epochs=3"]
    run = Run([*_data(options, size * steps), *flags])
    try:
        run.go(steps)
        run.seconds = 0.0
        while not run.go(3 * steps, options.seconds):
            turn()
    finally:
        run.close()
        contender.close()
    found = {
        "steps": steps,
        "milliseconds_in_the_run": 1e3 * run.seconds / (2 * steps),
        "milliseconds_alone": 1e3 * statistics.mean(alone),
        "epoch_over_steps": run.seconds / (2 * steps) / statistics.mean(alone),
    }
    print(json.dumps(found, indent=1))
    return found


def _wait_for_step(
    metrics: Path, step: int, process: subprocess.Popen[bytes], seconds: float = float("inf")
) -> bool:
    """Waits until a run has written down a step, or for so long; returns whether it has."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        if _last_step(metrics) >= step:
            return True
        if process.poll() is not None:
            raise SystemExit(f"the run ended before step {step}")
        time.sleep(0.01)
    return False


def _last_step(metrics: Path) -> int:
    if not metrics.exists():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 4096))
        whole_lines = file.read().split(b"\n")[:-1]
    return json.loads(whole_lines[-1])["step"] if whole_lines else 0


def startup(options: argparse.Namespace) -> dict[str, Any]:
    """Importing the package, and the first finished step with programs and data kept."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import alexnet_jax"], cwd=ROOT, check=True)
        times.append(time.perf_counter() - started)
    found = {"import_seconds": statistics.median(times)}
    firsts = [_until_first_step(options) for _ in range(4)][1:]  # the first fills the caches
    found["first_step_seconds"] = statistics.median(firsts)
    print(f"import alexnet_jax: {found['import_seconds']:.2f} s")
    print(f"first step finished after: {found['first_step_seconds']:.1f} s (of {firsts})")
    return found


def _until_first_step(options: argparse.Namespace) -> float:
    run = Run(_data(options))
    run.go(step=1)
    run.close()
    return run.seconds


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Resident memory of a run on the whole data set, over its first minutes."""
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            [*MAIN, *_data(options), f"--workdir={folder}/run"],
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
        ) as process,
    ):
        sizes: list[float] = []
        while len(sizes) < options.memory_seconds:
            time.sleep(1)
            if process.poll() is not None:  # its status has no memory any more
                break
            now, peak = _memory(process.pid)
            sizes.append(now)
        process.send_signal(signal.SIGTERM)
        process.wait()
    # 75: stopped and saved; the signal's own number: stopped while it started.
    if not sizes or process.returncode not in (0, 75, -signal.SIGTERM):
        raise SystemExit(f"The run has ended early, with exit code {process.returncode}.")
    half = len(sizes) // 2
    print(f"peak {peak:.2f} GiB; now {sizes[-1]:.2f}, halfway {sizes[half]:.2f} GiB")
    return {"peak_gib": peak, "gib_each_second": sizes}


def checkpoint(options: argparse.Namespace) -> dict[str, Any]:
    """Saving and restoring the reference network with Adam's state."""
    import jax
    import optax

    from alexnet_jax import state
    from alexnet_jax.checkpoint.manager import Checkpoints
    from alexnet_jax.models.alexnet import AlexNet

    def create() -> Any:
        return state.create_state(AlexNet(num_classes=10), optax.adam(1e-3), (32, 32, 3), 0)

    run = jax.block_until_ready(jax.jit(create)())
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(run) if leaf.dtype != run.key.dtype)
    held, whole, restored = [], [], []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            checkpoints = Checkpoints(Path(folder))
            started = time.perf_counter()
            checkpoints.save(run, {"train_seconds": 0.0}, None)
            held.append(time.perf_counter() - started)
            checkpoints.finish()
            whole.append(time.perf_counter() - started)
            started = time.perf_counter()
            place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            jax.block_until_ready(checkpoints.restore(lambda: jax.eval_shape(create), place))
            restored.append(time.perf_counter() - started)
            checkpoints.close()
    found = {
        "megabytes": size / 1e6,
        "save_holds_up_seconds": statistics.median(held),
        "save_seconds": statistics.median(whole),
        "restore_seconds": statistics.median(restored),
    }
    print(json.dumps(found, indent=1))
    return found


def growth(options: argparse.Namespace) -> dict[str, Any]:
    """Time and memory of an epoch with 1, 2 and 4 times the data, and of later epochs.

    The three runs take turns, as long as they are large, so that they end together. Timed are two
    epochs, with their validation and saving, from the second step of the second epoch on: by then
    all is compiled.
    """
    size, batch = options.growth_images, 128
    flags = ["--config.train.epochs=4", "--config.checkpoint.every_seconds=0"]
    runs = {times: Run([*_data(options, size * times), *flags]) for times in (1, 2, 4)}
    per_epoch = {times: times * round(0.9 * size) // batch for times in runs}
    found: dict[str, Any] = {}
    try:
        for times, run in runs.items():
            run.go(per_epoch[times] + 2)
            run.seconds = 0.0
            found[str(times)] = {"gib_after_1_epoch": run.memory()[1]}
        left = list(runs)
        while left:
            left = [n for n in left if not runs[n].go(3 * per_epoch[n] + 2, n * options.seconds)]
        for times, run in runs.items():
            found[str(times)] |= {
                "epoch_seconds": run.seconds / 2,
                "milliseconds_a_step": 1e3 * run.seconds / 2 / per_epoch[times],
                "gib_after_3_epochs": run.memory()[1],
            }
            first = found["1"]["milliseconds_a_step"]
            relative = found[str(times)]["milliseconds_a_step"] / first
            print(f"{times} times the data: {relative:.3f} of the time a step; {found[str(times)]}")
    finally:
        for run in runs.values():
            run.close()
    return found


def _memory(process: int) -> tuple[float, float]:
    """Returns the resident memory of a process, and the most there has been, in GiB."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    now, peak = (int(fields[name].split()[0]) / 2**20 for name in ("VmRSS", "VmHWM"))
    return now, peak


def _data(options: argparse.Namespace, size: int | None = None) -> list[str]:
    split = "train" if size is None else f"train[:{size}]"
    return [
        "--config=configs/cifar10.py",
        f"--config.data.name={options.name}",
        f"--config.data.data_dir={options.data_dir}",
        f"--config.data.train_split={split}",
        f"--config.data.test_split={'test' if size is None else 'test[:500]'}",
    ]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


SECTIONS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    section.__name__: section
    for section in (
        machine,
        train_step,
        inference,
        recipes,
        epoch,
        startup,
        memory,
        checkpoint,
        growth,
    )
}


def run() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; by default all")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each turn")
    parser.add_argument("--epoch_steps", type=int, default=390, help="50,000 images make 390")
    parser.add_argument("--growth_images", type=int, default=10_000, help="of the smallest run")
    parser.add_argument("--memory_seconds", type=int, default=120)
    parser.add_argument("--name", default="cifar10", help="the prepared data set")
    parser.add_argument("--data_dir", default="", help="where it lies, if not in TFDS's folder")
    parser.add_argument(
        "--contenders",
        nargs="+",
        default=list(CONTENDERS),
        metavar="NAME",
        help=f"of {', '.join(map(repr, CONTENDERS))}; by default all",
    )
    options = parser.parse_args()
    for kind, given, known in (
        ("section", options.sections, SECTIONS),
        ("contender", options.contenders, CONTENDERS),
    ):
        for name in given:
            if name not in known:
                parser.error(f"{name!r} is no {kind}; there are {', '.join(known)}.")
    figures: dict[str, Any] = {}
    for name in options.sections or SECTIONS:
        print(f"\n## {name}\n", flush=True)
        figures[name] = SECTIONS[name](options)
        sys.stdout.flush()
        if options.json:  # after each: what is measured stays, whatever comes next
            options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    run()
