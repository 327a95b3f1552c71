"""Where a run reports to: metrics.jsonl, TensorBoard, log.txt, and the terminal."""

import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from alexnet_jax.distributed import collectives
from alexnet_jax.errors import SaveFailed
from alexnet_jax.run.files import write_text

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


class MetricWriter:
    """Writes the metrics of a run to ``metrics.jsonl``, TensorBoard and the terminal.

    Of many processes only the first one writes. As a context manager it returns when everything is
    written, and raises SaveFailed, in all processes, if ``metrics.jsonl`` is incomplete.
    """

    LAPS = 20

    def __init__(
        self,
        folder: Path,
        *,
        step: int,
        total_steps: int,
        steps_per_epoch: int,
        seconds_before: float,
        tensorboard: bool,
    ) -> None:
        """Opens the files, and drops what they have after `step`, that of the checkpoint.

        `seconds_before` is the training time of earlier sessions.
        """
        self._steps_per_epoch = steps_per_epoch
        self._seconds_before = seconds_before
        self._stack = ExitStack()
        self._metrics: MetricsFile | None = None
        first = jax.process_index() == 0
        with collectives.fail_together():
            if first:
                self._metrics = MetricsFile(folder / METRICS, last_step=step)
                self._stack.enter_context(closing(self._metrics))
        if first and tensorboard:
            self._stack.enter_context(tensorboard_events(folder))
        self.progress = self._stack.enter_context(closing(Progress(total_steps, bar=first)))
        self._start = time.monotonic()
        # When the last dispatches were seen to end, and the images of each; the pace is measured
        # over them all, for a single one may have ended long before it was looked at.
        self._laps: deque[tuple[float, int]] = deque([(self._start, 0)], maxlen=self.LAPS)

    @property
    def seconds(self) -> float:
        """Training time of all sessions."""
        return self._seconds_before + time.monotonic() - self._start

    def write_train(self, step: int, images: int, metrics: Mapping[str, Any]) -> None:
        """Writes the mean metrics of the steps up to `step`, which trained on `images`."""
        self._laps.append((time.monotonic(), images))
        (first, _), *laps = self._laps
        pace = sum(n for _, n in laps) / max(laps[-1][0] - first, 1e-9)
        counts = {"images": images, "images_per_second": pace}
        self.progress.update(self._write(step, "train", {**metrics, **counts}))

    def write_eval(self, step: int, split: str, metrics: Mapping[str, Any]) -> None:
        """Writes the metrics of an evaluation; its time does not count in images per second."""
        self._write(step, split, metrics)
        self._laps.clear()
        self._laps.append((time.monotonic(), 0))

    def _write(self, step: int, split: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
        record = {"step": step, "epoch": step / self._steps_per_epoch, "split": split, **metrics}
        if self._metrics:
            self._metrics.write(record)
        return record

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stack.close()
        if kind is None:
            with collectives.fail_together():
                if self._metrics and not self._metrics.complete:
                    raise SaveFailed(
                        f"{self._metrics.path} could not be completed; fix this and rerun the same "
                        "command to resume."
                    )


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, in the order of the steps.

    Each has `step`, `epoch` and `split` ("train", "validation", "validation_ema", "test",
    "test_ema", with "_tta" for test-time augmentation) beside its metrics.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        """Opens the file, dropping what a resumed run writes again: later steps, and its end."""
        kept = [
            record
            for record in read_metrics(path)
            if record["step"] <= last_step
            and not record["split"].startswith("test")
            and "_tta" not in record["split"]
        ]
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        trained = max((r["step"] for r in kept if r["split"] == "train"), default=0)
        if trained < last_step:
            log.warning("%s lacks the metrics after step %s; they were lost.", path.name, trained)
        self.path = path
        self._file = path.open("ab", buffering=0)  # so that we know what is in it
        self._unwritten = b""

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a record, which then survives the process; on a full disk, at a later call."""
        was_complete = self.complete
        self._unwritten += json.dumps(record).encode() + b"\n"
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if was_complete:
                log.warning(
                    "%s cannot be written (%s); what is missing there follows when it can.",
                    self.path.name,
                    error.strerror,
                )
        else:
            if not was_complete:
                log.info("%s is complete again.", self.path.name)

    @property
    def complete(self) -> bool:
        """Whether all records are in the file."""
        return not self._unwritten

    def close(self) -> None:
        """Closes the file once it is on disk."""
        with suppress(OSError):
            os.fsync(self._file.fileno())
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads ``metrics.jsonl`` up to a line that a kill cut short; [] if there is no file."""
    records: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
            if not record.keys() >= {"step", "epoch", "split"}:
                break
        except (ValueError, AttributeError):
            break
        records.append(record)
    return records


TENSORBOARD_PATIENCE = 60.0  # seconds to wait at the end; importing TensorFlow may take ten


@contextmanager
def tensorboard_events(folder: Path) -> Iterator[None]:
    """Has `alexnet_jax.run.tensorboard` write events of all metrics that are written meanwhile.

    Warns where it cannot.
    """
    needs = ("tensorflow", "tensorboard")
    if missing := [name for name in needs if importlib.util.find_spec(name) is None]:
        names = " and ".join(missing)
        log.warning("No TensorBoard events are written without %s.", names)
        yield
        return
    command = [sys.executable, "-m", "alexnet_jax.run.tensorboard", str(folder)]
    command.append(str((folder / METRICS).stat().st_size))
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,  # else Ctrl-C would reach it, too, while it starts
        )
        try:
            yield
        finally:
            try:
                process.communicate(timeout=TENSORBOARD_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.returncode:
                errors.seek(0)
                lines = errors.read().decode(errors="replace").strip().splitlines()
                reason = lines[-1] if lines else f"exit code {process.returncode}"
                log.warning("TensorBoard events are incomplete (%s).", reason)


class Progress:
    """Shows the progress of a run: a bar on a terminal; elsewhere a line in the log per minute."""

    PLAIN_SECONDS = 60.0

    def __init__(self, total_steps: int, bar: bool = True) -> None:
        self._total = total_steps
        self._hidden = not (bar and sys.stderr.isatty())
        self._bar: tqdm | None = None

    def update(self, record: Mapping[str, Any]) -> None:
        """Shows the metrics of a train record."""
        step, now = record["step"], time.monotonic()
        if self._bar is None:
            # Only now: compiling came before, and would spoil the estimate of the time left.
            self._first, self._start, self._logged = step, now, now
            self._bar = tqdm(
                total=self._total,
                initial=step,
                unit="step",
                desc="train",
                disable=self._hidden,
                dynamic_ncols=True,
                smoothing=0.1,
            )
        metrics = (
            f"loss {record['loss']:.3f}, accuracy {record['accuracy']:.1%}, "
            f"{record['images_per_second']:,.0f} images/s"
        )
        self._bar.set_postfix_str(metrics, refresh=False)
        self._bar.update(step - self._bar.n)
        if self._bar.disable and now - self._logged >= self.PLAIN_SECONDS:
            self._logged = now
            left = duration(self.seconds_left(step))
            log.info("step %s of %s: %s, %s left", f"{step:,}", f"{self._total:,}", metrics, left)

    def seconds_left(self, step: int) -> float:
        """Estimates the time to the last step from the pace since the first update."""
        pace = (time.monotonic() - self._start) / max(1, step - self._first)
        return pace * (self._total - step)

    def close(self) -> None:
        """Leaves the bar on the terminal."""
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """Formats seconds as "1:02:03"."""
    return tqdm.format_interval(seconds)


class _TerminalHandler(logging.Handler):
    """Writes messages above the progress bar, where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        # A signal's handler may log while another message is being written (RuntimeError), and
        # nobody reads any more behind `| tee` after Ctrl-C: a run continues without.
        with suppress(RuntimeError, OSError):
            tqdm.write(self.format(record), file=sys.stderr)


def log_to_terminal(level: int = logging.INFO) -> None:
    """Shows the package's messages of at least `level` on standard error."""
    package = logging.getLogger("alexnet_jax")
    if not any(isinstance(handler, _TerminalHandler) for handler in package.handlers):
        package.addHandler(_TerminalHandler())
    package.setLevel(level)
    package.propagate = False


class _FileHandler(logging.FileHandler):
    _failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._failed:  # once, and without a traceback
            self._failed = True
            log.warning("%s cannot be written (%s).", self.baseFilename, sys.exc_info()[1])


@contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Appends the package's messages, with the time, to a file."""
    try:
        handler: logging.Handler = _FileHandler(path)
    except OSError as error:
        log.warning("%s cannot be written (%s).", path, error)
        handler = logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    package = logging.getLogger("alexnet_jax")
    package.addHandler(handler)
    package.setLevel(logging.INFO)  # also where no program has set up the terminal
    try:
        yield
    finally:
        package.removeHandler(handler)
        with suppress(OSError):
            handler.close()
