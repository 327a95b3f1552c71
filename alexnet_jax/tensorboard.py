"""Writes TensorBoard events from ``metrics.jsonl``, in a process of its own, through CLU.

CLU's writer needs TensorFlow, which takes seconds to import, talks to the terminal from C++, and
reserves GPU memory. In another process none of that reaches the training.

Run by `alexnet_jax.writers.TensorBoard` as ``python -m alexnet_jax.tensorboard FOLDER OFFSET``;
it follows the file from the byte OFFSET on and ends when its standard input does.
"""

import json
import os
import select
import signal
import sys
from pathlib import Path
from typing import Any

SECONDS_BETWEEN_LOOKS = 1.0


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """Names the figures of a metrics record as TensorBoard shows them, "split/figure"."""
    return {
        f"{record['split']}/{name}": value
        for name, value in record.items()
        if isinstance(value, float) and name != "epoch"
    }


def follow(folder: Path, offset: int) -> None:
    """Writes each record after `offset` as events into `folder`, until standard input ends."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # TensorFlow draws no memory from the GPUs
    from clu.metric_writers import SummaryWriter

    writer = SummaryWriter(str(folder))
    with (folder / "metrics.jsonl").open() as file:
        file.seek(offset)
        ended = False
        while not ended:
            ended = bool(select.select([sys.stdin], [], [], SECONDS_BETWEEN_LOOKS)[0])
            position = file.tell()
            while line := file.readline():
                if not line.endswith("\n"):  # half-written: look again
                    file.seek(position)
                    break
                record = json.loads(line)
                writer.write_scalars(record["step"], scalars(record))
                position = file.tell()
            writer.flush()
    writer.close()


if __name__ == "__main__":
    # Signals are meant for the run, which says when it ends, or is gone, by closing the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    follow(Path(sys.argv[1]), int(sys.argv[2]))
