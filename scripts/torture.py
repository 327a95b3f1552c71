"""Try to lose a run: kill it at random moments, or damage its checkpoints, and count what held.

Each run is the digits with a small network, so that most of the time goes into starting it.

Examples:
  python scripts/torture.py                           100 kills, 15 to 30 minutes
  python scripts/torture.py --damage                  100 damages of each kind, 7 to 9 minutes
  python scripts/torture.py --kills=5 --json=kills.json
"""

import collections
import dataclasses
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from alexnet_jax.cli import common
from alexnet_jax.run import files

_ROOT = Path(__file__).resolve().parents[1]
_EPOCHS, _STEPS_PER_EPOCH = 6, 10
_OPTIONS = {
    "data.image_size": 8,
    "model.features": (8, 8),
    "model.kernels": (3, 3),
    "model.strides": (1, 1),
    "model.pools": (True, True),
    "model.hidden": (16, 16),
    "train.batch_size": 128,
    "train.epochs": _EPOCHS,
    "train.ema_decay": 0.9,
    "writers.tensorboard": False,  # importing TensorFlow takes longer than the run
}
_PATIENCE = 300.0  # seconds that a session may take before it counts as hung


# Killing


@dataclasses.dataclass(frozen=True)
class Moment:
    """When to kill: `delay` times a random number in [0, 1) after `sign` is first true.

    Attributes:
        sign: Of a session, whether what is to be disturbed goes on.
        delay: Seconds; about as long as what is going on then lasts.
    """

    sign: Callable[["Session"], bool]
    delay: float


class Session:
    """One process of a run, from its start to its end, which leaving its context brings about."""

    def __init__(self, folder: Path, data_dir: Path, cache: Path) -> None:
        self.folder = folder
        self._lines_before = len(self._read("metrics.jsonl").splitlines())
        self._log_before = len(self._read("log.txt"))
        environment = os.environ | {
            "PYTHONPATH": str(_ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        options = [f"--config.{key}={value}" for key, value in _OPTIONS.items()]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `__exit__`
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "alexnet_jax.main", "--config=configs/digits.py"),
                *(f"--workdir={folder}", f"--config.data.data_dir={data_dir}", *options),
            ],
            cwd=_ROOT,
            env=environment,
            stderr=self._errors,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()  # does nothing to one that has ended
        self.process.wait()
        self._errors.close()

    def _read(self, name: str) -> str:
        path = self.folder / name
        return path.read_text() if path.exists() else ""

    def said(self, text: str) -> bool:
        """Whether the log of this session has the text."""
        return text in self._read("log.txt")[self._log_before :]

    def last_record(self) -> dict[str, Any] | None:
        """The last whole line that this session wrote of its metrics, if any."""
        if not self.said("Training on"):  # what there is may still be cut to the last checkpoint
            return None
        lines = [line for line in self._read("metrics.jsonl").split("\n")[:-1] if line]
        return json.loads(lines[-1]) if self.said("Compiling") and lines else None

    def is_saving(self) -> bool:
        """Whether a checkpoint is half-written just now."""
        return any((self.folder / "checkpoints").glob("*.orbax-checkpoint-tmp*"))

    def kill_at(self, moment: Moment, rng: random.Random) -> bool:
        """Kills the process at that moment; returns False if it has ended before, by itself."""
        deadline = time.monotonic() + _PATIENCE
        while not moment.sign(self):
            if self.process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        time.sleep(rng.random() * moment.delay)
        if self.process.poll() is not None:
            return False
        self.process.send_signal(signal.SIGKILL)
        return True

    def ended(self, killed: bool = False) -> str:
        """Waits for the end; returns what is wrong with it, or nothing.

        Args:
            killed: Whether `kill_at` did so, unless the end came first.
        """
        try:
            code = self.process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            return f"still ran after {_PATIENCE:.0f} s"
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace")
        if "Traceback" in said or not (code == 0 or (killed and code == -signal.SIGKILL)):
            return f"exit code {code}: {said[-2000:]}"
        return ""


def _trained(epoch_end: bool) -> Callable[[Session], bool]:
    def sign(session: Session) -> bool:
        record = session.last_record()
        if record is None or record["split"] != "train":
            return False
        return (record["step"] % _STEPS_PER_EPOCH == 0) == epoch_end

    return sign


MOMENTS = {
    "start-up": Moment(lambda session: True, delay=5.0),
    "compilation": Moment(lambda session: session.said("Compiling"), delay=1.0),
    "steps": Moment(_trained(epoch_end=False), delay=0.5),
    "evaluation": Moment(_trained(epoch_end=True), delay=0.05),
    "save": Moment(Session.is_saving, delay=0.3),
    "results": Moment(lambda session: session.said("Reading the test set"), delay=1.5),
    "report": Moment(lambda session: session.said("Making the report"), delay=3.0),
}


def torture_by_kills(kills: int, rng: random.Random, folder: Path) -> dict[str, Any]:
    """Kills runs until it has done so `kills` times, lets each end, and compares it.

    Returns:
        `kills` by moment; `runs`, those that ended; `failures`, a sentence each; `seconds`.
    """
    started = time.monotonic()
    data_dir, cache = folder / "data", folder / "cache"
    reference = folder / "undisturbed"
    failures = []
    with Session(reference, data_dir, cache) as session:
        if wrong := session.ended():
            raise RuntimeError(f"the undisturbed run failed: {wrong}")
    done: collections.Counter[str] = collections.Counter()
    runs = 0
    while done.total() < kills:
        runs += 1
        run = folder / f"run{runs}"
        while not (run / "report.html").exists():
            with Session(run, data_dir, cache) as session:
                killed = False
                if done.total() < kills:
                    # The rarest so far, and of these any, for some are never reached.
                    fewest = min(done[name] for name in MOMENTS)
                    name = rng.choice([name for name in MOMENTS if done[name] <= fewest + 2])
                    killed = session.kill_at(MOMENTS[name], rng)
                    done[name] += killed
                wrong = session.ended(killed)
            if not (wrong or killed or (run / "report.html").exists()):
                wrong = "it ended well, and left no report"
            if wrong:
                failures.append(f"run {runs}, after {done.total()} kills: {wrong}")
                break
            _tell(f"{done.total()} of {kills} kills, run {runs}, {len(failures)} failures")
        else:  # it has come to its end
            failures += [f"run {runs}: {wrong}" for wrong in differences(reference, run)]
    return {
        "kills": dict(done),
        "runs": runs,
        "failures": failures,
        "seconds": round(time.monotonic() - started),
    }


def differences(reference: Path, run: Path) -> list[str]:
    """Says in what a run that ended differs from the undisturbed one."""
    found = []
    if _records(reference) != _records(run):
        found.append("metrics.jsonl differs")
    if _results(reference) != _results(run):
        found.append("results.json differs")
    found += [
        f"{name} differs"
        for name in ("predictions.npz", "report.npz")
        if (reference / name).read_bytes() != (run / name).read_bytes()
    ]
    for name, (one, other) in _arrays(reference, run).items():
        if one.tobytes() != other.tobytes():
            found.append(f"{name} differs")
    names, others = (
        {str(path.relative_to(each)) for path in each.glob("*")}
        | {str(path.relative_to(each)) for path in each.glob("checkpoints/*")}
        | {str(path.relative_to(each)) for path in each.glob("figures/*")}
        for each in (reference, run)
    )
    if names != others:
        found.append(f"files differ: {sorted(names ^ others)}")
    return found


def _records(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{k: v for k, v in r.items() if k != "images_per_second"} for r in records]


def _results(run: Path) -> dict[str, Any]:
    results = json.loads((run / "results.json").read_text())
    return {key: value for key, value in results.items() if key != "train_seconds"}


def _arrays(*runs: Path) -> dict[str, tuple[np.ndarray, ...]]:
    """Every array of the last checkpoint of each run, by its path."""
    import jax
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)
    found: list[Any] = []
    for run in runs:
        restore = ocp.args.StandardRestore()
        with ocp.CheckpointManager((run / "checkpoints").absolute()) as manager:
            tree = manager.restore(
                manager.latest_step(), args=ocp.args.Composite(params=restore, rest=restore)
            )
        leaves, _ = jax.tree_util.tree_flatten_with_path({"params": tree.params, "rest": tree.rest})
        found.append({jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves})
    if any(one.keys() != found[0].keys() for one in found):
        raise RuntimeError("the checkpoints hold other arrays")
    return {name: tuple(one[name] for one in found) for name in found[0]}


# Damaging


def _flip(files: list[Path], rng: random.Random) -> str:
    # Half the time any file, for most are small; else any byte, for most lie in the arrays.
    sizes = [path.stat().st_size for path in files]
    path = rng.choices(files, sizes if rng.random() < 0.5 else None)[0]
    content = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return f"bit {bit} of {path.name}"


def _truncate(files: list[Path], rng: random.Random) -> str:
    sizes = [path.stat().st_size for path in files]
    path = rng.choices(files, sizes if rng.random() < 0.5 else None)[0]
    length = rng.randrange(path.stat().st_size)
    os.truncate(path, length)
    return f"{path.name} to {length}"


def _empty(files: list[Path], rng: random.Random) -> str:
    if rng.random() < 0.5:
        for path in files:
            path.write_bytes(b"")
        return "files"
    for path in files:
        path.unlink()
    return "folders"


def _delete_half(files: list[Path], rng: random.Random) -> str:
    for path in rng.sample(files, len(files) // 2):
        path.unlink()
    return "half of the files"


def _delete_one(files: list[Path], rng: random.Random) -> str:
    path = rng.choice(files)
    path.unlink()
    return path.name


def _unmark(files: list[Path], rng: random.Random) -> str:
    markers = [p for p in files if p.name == "commit_success.txt"]
    min(markers, key=lambda path: len(path.parts)).unlink()
    return "the marker of the whole"


def _remove(files: list[Path], rng: random.Random) -> str:
    step = min(files, key=lambda path: len(path.parts)).parent
    shutil.rmtree(step)
    return "the whole checkpoint"


DAMAGES: dict[str, Callable[[list[Path], random.Random], str]] = {
    "one bit flipped": _flip,
    "one file truncated": _truncate,
    "emptied": _empty,
    "half-deleted": _delete_half,
    "one file deleted": _delete_one,
    "commit marker missing": _unmark,
    "removed": _remove,
}
# These are always more than what the values can do without.
_CERTAIN = ("emptied", "commit marker missing", "removed")
OF_BOTH = (*_CERTAIN, "half-deleted")


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def torture_by_damage(tries: int, rng: random.Random, folder: Path) -> dict[str, Any]:
    """Damages the newest of two checkpoints, or both, and looks at what is restored.

    Returns:
        `damages` by kind, each {"tried", "held", "fallen back", "harmless", "refused"}: what held
        either fell back to the one before with a word about it, or found every value of the
        newest unharmed, or, where both were damaged, refused to go on; `failures`; `seconds`.
    """
    import jax

    from alexnet_jax import config, models, state
    from alexnet_jax.checkpoint.manager import Checkpoints
    from alexnet_jax.cli.quiet import silence_orbax
    from alexnet_jax.distributed import sharding
    from alexnet_jax.errors import InputError
    from alexnet_jax.optim import optimizers, schedules

    silence_orbax()
    started = time.monotonic()
    options = config.default_config()
    options.update_from_flattened_dict(_OPTIONS)
    model = models.create_model(options.model, num_classes=10)
    schedule = schedules.create_schedule(options.optimizer, 10, 3)
    optimizer = optimizers.create_optimizer(options.optimizer, schedule)
    create = jax.jit(
        lambda seed: state.create_state(model, optimizer, (8, 8, 3), seed, ema=True),
        static_argnums=0,
    )
    states = {step: create(step).replace(step=jax.numpy.int32(step)) for step in (10, 20)}
    everywhere = sharding.replicated(sharding.make_mesh())
    intact = folder / "intact" / "checkpoints"
    checkpoints = Checkpoints(intact)
    for step, each in states.items():
        checkpoints.save(each, {"train_seconds": float(step)}, step / 100)
    checkpoints.finish()
    checkpoints.close()

    def content(of: Any) -> list[bytes]:
        of = of.replace(key=jax.random.key_data(of.key))
        return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(jax.device_get(of))]

    expected = {step: content(each) for step, each in states.items()}
    messages = _Messages()
    package = logging.getLogger("alexnet_jax")
    package.addHandler(messages)
    package.propagate = False

    def restore(copy: Path) -> str:
        """Says what is restored: "10", "20", "refused", or what is wrong."""
        checkpoints = Checkpoints(copy / "checkpoints")
        try:
            found = checkpoints.restore(lambda: states[10], everywhere)
            if found is None:
                return "began anew"
            values = content(found[0])
            step = next((s for s in expected if expected[s] == values), None)
            if step is None:
                return "wrong values"
            if found[1] != {"train_seconds": float(step)}:
                return "wrong progress"
            if step == 10:  # the run comes to that step again
                checkpoints.save(states[20], {"train_seconds": 20.0})
                checkpoints.finish()
            return str(step)
        except InputError:
            return "refused"
        finally:
            checkpoints.close()

    table: dict[str, collections.Counter[str]] = {}
    failures = []
    for both in (False, True):
        for kind in OF_BOTH if both else DAMAGES:
            label = f"both: {kind}" if both else kind
            counts = table[label] = collections.Counter(tried=0, held=0)
            for number in range(tries):
                copy = folder / "copy"
                shutil.copytree(intact.parent, copy)
                what = ""
                for step in (10, 20) if both else (20,):
                    damaged = copy / "checkpoints" / str(step)
                    files = sorted(path for path in damaged.rglob("*") if path.is_file())
                    what = DAMAGES[kind](files, rng)
                messages.texts.clear()
                try:
                    outcome = restore(copy)
                except Exception as error:  # whatever it is, it would have been a traceback
                    outcome = f"{type(error).__name__}: {error}"
                told = any(text.startswith("checkpoint 20 is") for text in messages.texts)
                counts["tried"] += 1
                if both and outcome == "refused":
                    counts.update(("held", "refused"))
                elif outcome == "10" and told and not (both and kind in _CERTAIN):
                    counts.update(("held", "fallen back"))
                elif outcome == "20" and not told and kind not in _CERTAIN:
                    counts.update(("held", "harmless"))
                else:
                    failures.append(f"{label} ({what}): {outcome}; said: {messages.texts}")
                shutil.rmtree(copy)
                _tell(f"{label}: {number + 1} of {tries}, {len(failures)} failures")
    package.removeHandler(messages)
    return {
        "damages": {label: dict(counts) for label, counts in table.items()},
        "failures": failures,
        "seconds": round(time.monotonic() - started),
    }


# The program


def _tell(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{line:<78}", end="", file=sys.stderr, flush=True)


def _table(result: dict[str, Any]) -> str:
    if "kills" in result:
        lines = [f"{'killed during':<24}kills"]
        lines += [f"{name:<24}{count:>5}" for name, count in sorted(result["kills"].items())]
        lines.append(f"{sum(result['kills'].values())} kills of {result['runs']} runs")
    else:
        columns = ("tried", "held", "fallen back", "harmless", "refused")
        lines = [f"{'newest checkpoint':<30}" + "".join(f"{name:>13}" for name in columns)]
        for label, counts in result["damages"].items():
            lines.append(f"{label:<30}" + "".join(f"{counts.get(c, 0):>13}" for c in columns))
    lines += [f"failed: {failure}" for failure in result["failures"]]
    lines.append(f"{len(result['failures'])} failures, {result['seconds']} s")
    return "\n".join(lines)


@common.entry_point
def main(arguments: Sequence[str]) -> int:
    """Runs the program."""
    parser = common.create_parser(
        "python scripts/torture.py", __doc__, success="all held, 1 something did not"
    )
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="how many (100)")
    parser.add_argument(
        "--damage", action="store_true", help="damage checkpoints instead of killing"
    )
    parser.add_argument(
        "--tries", type=int, default=100, metavar="N", help="damages of each kind (100)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (0)")
    parser.add_argument(
        "--json", type=common.path, metavar="FILE", help="write the counts there, too"
    )
    options = parser.parse_args(arguments)
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="torture_") as folder:
        if options.damage:
            result = torture_by_damage(options.tries, rng, Path(folder))
        else:
            result = torture_by_kills(options.kills, rng, Path(folder))
    print(_table(result))
    if options.json:
        files.write_json(options.json, result)
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
