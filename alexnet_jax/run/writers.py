"""Where a run tells what happens: metrics.jsonl, TensorBoard, log.txt, and the terminal."""

import functools
import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from alexnet_jax.cli.common import silence
from alexnet_jax.run.files import write_bytes

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, in the order of the steps.

    Each has `step`, `epoch` and `split` ("train", "validation", "validation_ema", "test",
    "test_ema", with "_tta" where several views were averaged) beside its figures.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        """Opens the file, dropping what comes again: all after `last_step`, and of the end."""
        # A run that goes on was killed before it was finished.
        kept = [
            record
            for record in read_metrics(path)
            if record["step"] <= last_step
            and not record["split"].startswith("test")
            and "_tta" not in record["split"]
        ]
        write_bytes(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        trained = max((r["step"] for r in kept if r["split"] == "train"), default=0)
        if trained < last_step:
            log.warning("%s lacks the figures after step %s; they were lost.", path.name, trained)
        self._name = path.name
        self._file = path.open("ab", buffering=0)  # so that we know what is in it
        self._unwritten = b""

    def write(self, record: dict[str, Any]) -> None:
        """Appends a record, which survives the process from here on unless the disk is full."""
        before = self._unwritten
        self._unwritten += json.dumps(record).encode() + b"\n"
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not before:
                log.warning(
                    "%s cannot be written (%s); what is missing there follows when it can.",
                    self._name,
                    error.strerror,
                )
        else:
            if before:
                log.info("%s is complete again.", self._name)

    @property
    def complete(self) -> bool:
        """Whether all records are in the file."""
        return not self._unwritten

    def close(self) -> None:
        """Closes the file, after the operating system has it on disk."""
        with suppress(OSError):
            os.fsync(self._file.fileno())
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads ``metrics.jsonl`` up to a line that a kill cut short, if any; [] if there is none."""
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
            if not record.keys() >= {"step", "epoch", "split"}:
                break
        except (ValueError, AttributeError):
            break
        records.append(record)
    return records


class TensorBoard:
    """Keeps TensorBoard events beside ``metrics.jsonl``, written by `alexnet_jax.run.tensorboard`.

    Without TensorFlow it says so once and does nothing.
    """

    PATIENCE = 60.0  # seconds to wait at the end; importing TensorFlow may take ten

    def __init__(self, folder: Path, offset: int) -> None:
        """Starts the process that writes what stands in the metrics from a byte on, or will."""
        self._process: subprocess.Popen[bytes] | None = None
        needs = ("tensorflow", "tensorboard")
        missing = [name for name in needs if importlib.util.find_spec(name) is None]
        if missing:
            log.warning(
                "There are no TensorBoard events, for want of %s; metrics.jsonl has every figure.",
                " and ".join(missing),
            )
            return
        try:
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `close`
            self._process = subprocess.Popen(
                [sys.executable, "-m", "alexnet_jax.run.tensorboard", str(folder), str(offset)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                start_new_session=True,  # else Ctrl-C would reach it, too, while it starts
            )
        except OSError as error:  # no room for a file or another process, say
            log.warning("There are no TensorBoard events (%s).", error.strerror)

    def close(self) -> None:
        """Returns when all is written; warns if it could not be, for the metrics are safe."""
        if self._process is None:
            return
        try:
            self._process.communicate(timeout=self.PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.returncode:
            self._errors.seek(0)
            last = self._errors.read().decode(errors="replace").strip().rsplit("\n", 1)[-1]
            log.warning(
                "TensorBoard events are incomplete (%s); metrics.jsonl has every figure.",
                last or f"exit code {self._process.returncode}",
            )
        self._errors.close()


class Progress:
    """Tells a person how far a run is: a bar on a terminal, a line now and then elsewhere."""

    PLAIN_SECONDS = 60.0

    def __init__(self, total_steps: int, bar: bool = True) -> None:
        """Shows nothing yet.

        Args:
            total_steps: Where the run ends.
            bar: Whether to draw on a terminal; else there are lines in the log.
        """
        self._total = total_steps
        self._hidden = not (bar and sys.stderr.isatty())
        self._bar: tqdm | None = None

    def update(self, record: dict[str, Any]) -> None:
        """Shows the figures of a train record."""
        step = record["step"]
        now = time.monotonic()
        if self._bar is None:
            # Only now: compiling came before, and would spoil the estimate of the time left.
            self._first, self._start, self._said = step, now, now
            self._bar = tqdm(
                total=self._total,
                initial=step,
                unit="step",
                desc="train",
                disable=self._hidden,
                dynamic_ncols=True,
                smoothing=0.1,
            )
        figures = (
            f"loss {record['loss']:.3f}, accuracy {record['accuracy']:.1%}, "
            f"{record['images_per_second']:,.0f} images/s"
        )
        self._bar.set_postfix_str(figures, refresh=False)
        self._bar.update(step - self._bar.n)
        if self._bar.disable and now - self._said >= self.PLAIN_SECONDS:
            self._said = now
            log.info(
                "step %s of %s: %s, %s left",
                f"{step:,}",
                f"{self._total:,}",
                figures,
                duration(self.seconds_left(step)),
            )

    def seconds_left(self, step: int) -> float:
        """Estimates the time to the last step from the pace since the first update."""
        pace = (time.monotonic() - self._start) / max(1, step - self._first)
        return pace * (self._total - step)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


class RunWriter:
    """All that a run tells while it trains: the metrics file, TensorBoard, and the progress."""

    LAPS = 20

    def __init__(
        self,
        folder: Path | None,
        *,
        step: int,
        total_steps: int,
        steps_per_epoch: int,
        seconds_before: float,
        tensorboard: bool,
    ) -> None:
        """Opens everything.

        Args:
            folder: The run folder; None to leave no files, as all processes but the first do.
            step: Where the run stands; what was written of later steps is dropped.
            total_steps: Where it ends.
            steps_per_epoch: To tell the epoch of a step.
            seconds_before: Spent on training in earlier sessions.
            tensorboard: Whether to write TensorBoard events.
        """
        self._steps_per_epoch = steps_per_epoch
        self._metrics = MetricsFile(folder / METRICS, last_step=step) if folder else None
        self._tensorboard: TensorBoard | None = None
        self._open_tensorboard: Callable[[], TensorBoard] | None = None
        if folder and tensorboard:
            offset = (folder / METRICS).stat().st_size
            self._open_tensorboard = functools.partial(TensorBoard, folder, offset)
        self.progress = Progress(total_steps, bar=folder is not None)
        self._seconds_before = seconds_before
        self._start = time.monotonic()
        # When the last dispatches were seen to end, and the images of each; the pace is measured
        # over them all, for a single one may have ended long before it was looked at.
        self._laps: deque[tuple[float, int]] = deque([(self._start, 0)], maxlen=self.LAPS)

    @property
    def seconds(self) -> float:
        """Spent on training in all sessions."""
        return self._seconds_before + time.monotonic() - self._start

    def trained(self, step: int, images: int, figures: dict[str, float]) -> None:
        """Tells of the steps up to `step`, which trained on `images`, with their mean figures."""
        self._laps.append((time.monotonic(), images))
        (first, _), *laps = self._laps
        record = self._record(step, "train", figures)
        record["images"] = images
        record["images_per_second"] = sum(n for _, n in laps) / max(laps[-1][0] - first, 1e-9)
        self._write(record)
        self.progress.update(record)

    def measured(self, step: int, split: str, figures: dict[str, float]) -> None:
        """Tells of an evaluation on `split`; what it took is not counted as training pace."""
        self._write(self._record(step, split, figures))
        self._laps.clear()
        self._laps.append((time.monotonic(), 0))

    @property
    def complete(self) -> bool:
        """Whether ``metrics.jsonl`` holds all that was told."""
        return self._metrics is None or self._metrics.complete

    def _record(self, step: int, split: str, figures: dict[str, float]) -> dict[str, Any]:
        return {"step": step, "epoch": step / self._steps_per_epoch, "split": split, **figures}

    def _write(self, record: dict[str, Any]) -> None:
        if self._metrics:
            self._metrics.write(record)
        if self._open_tensorboard:  # only now: it takes seconds that the first step is waited for
            self._tensorboard, self._open_tensorboard = self._open_tensorboard(), None

    def close(self) -> None:
        """Returns when everything is written."""
        self.progress.close()
        if self._metrics:
            self._metrics.close()
        if self._tensorboard:
            self._tensorboard.close()


def duration(seconds: float) -> str:
    """Formats seconds as "1:02:03"."""
    return tqdm.format_interval(seconds)


class _TerminalHandler(logging.Handler):
    """Writes messages above the progress bar, where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except RuntimeError:  # a signal's handler speaks while another message is being written
            pass
        except OSError:  # nobody reads any more, as behind `| tee`; a run goes on without
            with suppress(OSError, ValueError):
                silence(sys.stderr)


def log_to_terminal(level: int = logging.INFO) -> None:
    """Shows the package's messages from `level` on on standard error."""
    package = logging.getLogger("alexnet_jax")
    if not any(isinstance(handler, _TerminalHandler) for handler in package.handlers):
        package.addHandler(_TerminalHandler())
    package.setLevel(level)
    package.propagate = False
    # absl lets every library talk at INFO, such as JAX of the backends that it did not find.
    logging.getLogger("jax").setLevel(logging.WARNING)


class _FileHandler(logging.FileHandler):
    """Says once, and not with a traceback each time, that the file cannot be written."""

    _failed = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # it cannot even be opened
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._failed:
            self._failed = True
            log.warning("%s cannot be written (%s).", self.baseFilename, sys.exc_info()[1])

    def close(self) -> None:
        with suppress(OSError):
            super().close()


@contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Appends the package's messages, with the time, to a file."""
    handler = _FileHandler(path, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    package = logging.getLogger("alexnet_jax")
    package.addHandler(handler)
    package.setLevel(logging.INFO)  # also where no program has set up the terminal
    try:
        yield
    finally:
        package.removeHandler(handler)
        handler.close()
