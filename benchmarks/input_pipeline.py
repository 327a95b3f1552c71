"""Measures how many images a second the data path delivers, and what memory it takes.

python benchmarks/input_pipeline.py --name=cifar10

In memory: batches are gathered, inside jit, from images that are on the device; the time to read
them first is reported separately. Streamed: read and decoded by threads, or by so many worker
processes, from the first batch on. Each is measured in a process of its own.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

WAYS = {"in memory": None, "threads": 0, "1 worker": 1, "2 workers": 2}


def measure(way: str, options: dict[str, Any], answer: Any) -> None:
    """Delivers batches for some seconds and answers with what was measured."""
    import jax

    from alexnet_jax import steps
    from alexnet_jax.config import default_config, validate
    from alexnet_jax.data.load import load_data
    from alexnet_jax.distributed import sharding

    workers = WAYS[way]
    config = default_config()
    config.data.name = options["name"]
    config.data.data_dir = options["data_dir"]
    config.data.image_size = options["image_size"]
    config.data.in_memory = "on" if workers is None else "off"
    config.data.workers = workers or 0
    config.train.epochs = 1000
    config.train.steps_per_dispatch = 1
    mesh = sharding.make_mesh()
    started = time.perf_counter()
    data = load_data(validate(config), mesh)
    load_seconds = time.perf_counter() - started
    size = config.train.batch_size
    key = steps.order_key(jax.random.key(0))

    gather = jax.jit(lambda feed: feed.batch(0))
    with data.train.feeds(key, 0) as feeds:
        started = time.perf_counter()

        def batch() -> int:
            step, feed = next(feeds)
            jax.block_until_ready(gather(feed))
            return step

        batch()
        first_seconds = time.perf_counter() - started
        for _ in range(1, 20):  # what was read ahead is not of this pace
            step = batch()
        started = time.perf_counter()
        while time.perf_counter() - started < options["seconds"]:
            step = batch()
        rate = (step - 20) * size / (time.perf_counter() - started)
        answer.send(
            {
                "way": way,
                "images_per_second": round(rate, 1),
                "load_seconds": round(load_seconds, 3),
                "first_batch_seconds": round(first_seconds, 3),
                "main_mib": round(_resident_mib(os.getpid())),
                "workers_mib": [
                    round(_resident_mib(child.pid or 0))
                    for child in multiprocessing.active_children()
                ],
            }
        )


def _resident_mib(process: int) -> float:
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    """Measures every way, prints a table, and writes JSON if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--name", default="cifar10", help="the data set, prepared or TFDS's")
    parser.add_argument("--data_dir", default="", help="by default TFDS's usual folder")
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each way")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()

    context = multiprocessing.get_context("spawn")
    rows = []
    print(f"{'':10} {'images/s':>10} {'load s':>8} {'first s':>8} {'main MiB':>9}  workers MiB")
    for way in WAYS:
        ours, theirs = context.Pipe()
        process = context.Process(target=measure, args=(way, vars(options), theirs))
        process.start()
        theirs.close()
        try:
            row = ours.recv()
        except EOFError:
            sys.exit(f"The measurement of {way} failed.")
        process.join()
        rows.append(row)
        print(
            f"{way:10} {row['images_per_second']:10,.0f} {row['load_seconds']:8.2f} "
            f"{row['first_batch_seconds']:8.2f} {row['main_mib']:9,}  "
            + " + ".join(map(str, row["workers_mib"])),
            flush=True,
        )
    if options.json:
        options.json.write_text(
            json.dumps({"cores": os.cpu_count(), "ways": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
