"""Weak and strong scaling of the training step over the devices of this process.

JAX_NUM_CPU_DEVICES=8 python benchmarks/scaling.py --json=scaling.json

Weak: the batch grows with the devices; strong: it is shared by them. Programs for all numbers of
devices are measured in turn, round by round, so that what else the machine does falls on all of
them; printed are medians. Fake CPU devices share the cores of one, so there the best possible
speed-up is that of the cores which one device leaves idle, and the table shows what splitting
costs.
"""

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax import steps
from alexnet_jax.config import Config, load_config, validate
from alexnet_jax.data import augment
from alexnet_jax.data.feed import InMemoryFeed
from alexnet_jax.distributed import sharding
from alexnet_jax.models import create_model
from alexnet_jax.optim.optimizers import create_optimizer
from alexnet_jax.optim.schedules import create_schedule
from alexnet_jax.state import create_state

CLASSES = 10


def main() -> None:
    """Measures, prints the tables, and writes them as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/digits.py")
    parser.add_argument("--batch", type=int, default=256, help="images per step on one device")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config = validate(load_config(options.config))

    counts = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= jax.device_count()]
    batches = {
        "weak": {n: options.batch * n for n in counts},
        "strong": dict.fromkeys(counts, options.batch),
    }
    run = {
        (n, batch): _stepper(config, n, batch)
        for sizes in batches.values()
        for n, batch in sizes.items()
    }
    paces: dict[tuple[int, int], list[float]] = {key: [] for key in run}
    for _ in range(options.rounds):
        for key, step in run.items():
            paces[key].append(_steps_per_second(step, options.seconds))

    device = jax.devices()[0].device_kind
    print(f"{options.config} on {device}, {os.cpu_count()} cores, {options.rounds} rounds")
    result: dict[str, Any] = {"config": options.config, "device": device, "cores": os.cpu_count()}
    for kind, sizes in batches.items():
        print(f"\n| {kind}: devices | images a step | images/s | speed-up |\n|---|---|---|---|")
        result[kind] = []
        for n, batch in sizes.items():
            # Of each round by itself, in which the machine was the same.
            one, many = paces[1, sizes[1]], paces[n, batch]
            ratios = [b * batch / (a * sizes[1]) for a, b in zip(one, many, strict=True)]
            row = {
                "devices": n,
                "batch": batch,
                "images_per_second": statistics.median(many) * batch,
                "speed_up": statistics.median(ratios),
                "speed_up_range": [min(ratios), max(ratios)],
            }
            result[kind].append(row)
            print(
                f"| {n} | {batch:,} | {row['images_per_second']:,.0f} | {row['speed_up']:.2f} "
                f"({min(ratios):.2f} to {max(ratios):.2f}) |"
            )
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def _stepper(config: Config, devices: int, batch_size: int) -> Callable[[], Any]:
    """Compiles a run's training step for some devices; each call starts the next step."""
    mesh = sharding.make_mesh(jax.devices()[:devices])
    everywhere = sharding.replicated(mesh)
    size = config.data.image_size
    random = np.random.default_rng(0)
    rows = random.permutation(4 * batch_size)[:batch_size].reshape(1, batch_size)
    images = random.integers(256, size=(4 * batch_size, size, size, 3), dtype=np.uint8)
    feed = InMemoryFeed(
        image=jnp.asarray(images),
        label=jnp.asarray(random.integers(CLASSES, size=4 * batch_size, dtype=np.int32)),
        rows=jnp.asarray(rows, jnp.int32),
    )
    model = create_model(config.model, CLASSES)
    optimizer = create_optimizer(config.optimizer, create_schedule(config.optimizer, 4, 20))
    one_step = functools.partial(
        steps.train_step,
        model=model,
        optimizer=optimizer,
        normalize=augment.create_normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        augment=augment.create_augment(config.augment),
        steps_per_epoch=4,
    )
    advance = sharding.jit_update(
        functools.partial(
            steps.train_steps,
            step_fn=one_step,
            constrain=sharding.split_batch(mesh),
            unroll=sharding.on_cpu(mesh),
        ),
        mesh,
    )
    create = functools.partial(create_state, model, optimizer, (size, size, 3), config.seed)
    state = jax.jit(create, out_shardings=everywhere)()
    placed = sharding.place(feed, everywhere)

    def step() -> Any:
        nonlocal state
        state, metrics = advance(state, placed)
        return metrics

    jax.block_until_ready(step())  # compiles
    return step


def _steps_per_second(step: Callable[[], Any], seconds: float) -> float:
    jax.block_until_ready(step())
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(4):  # as a run does, which does not wait for each
            metrics = step()
        jax.block_until_ready(metrics)
        count += 4
    return count / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
