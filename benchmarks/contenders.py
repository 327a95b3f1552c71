"""The reference network in this library and in PyTorch, each ready to be timed.

Five 3x3 convolutions with 64, 192, 384, 256, 256 channels, pooling after 1, 2 and 5, then 4096,
4096 and 10 units: 36 million parameters, dropout 1/2, 32x32 images, cross-entropy, Adam.
"""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Timed = Callable[[], float]  # does it once, and returns the seconds it took
Build = Callable[[str, int], Timed]  # "train" or "infer", for a batch size

CHANNELS = (64, 192, 384, 256, 256)
POOLS = (True, True, False, False, True)
HIDDEN = (4096, 4096)
CLASSES = 10


def images(count: int) -> np.ndarray:
    """Returns uint8[count, 32, 32, 3]."""
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)


def timed(function: Callable[[], Any], wait: Callable[[Any], Any]) -> Timed:
    """Returns a function that times one call, until its result is there."""

    def once() -> float:
        started = time.perf_counter()
        wait(function())
        return time.perf_counter() - started

    return once


def ours(dtype: str = "float32", cpu_kernels: str = "auto") -> Build:
    """Returns a function that builds "train" or "infer" for a batch size."""
    import optax

    from alexnet_jax.config import default_config, validate

    config = default_config("alexnet")
    config.cpu_kernels = cpu_kernels
    config.model.features, config.model.pools, config.model.hidden = CHANNELS, POOLS, HIDDEN
    config.model.dtype = dtype
    return _ours(validate(config), optax.adam(1e-4))


def config_alone(path: str) -> Build:
    """As `ours`, of the network and optimizer of a config file, without its augmentation."""
    from alexnet_jax.config import load_config, validate
    from alexnet_jax.optim import optimizers, schedules

    config = validate(load_config(str(Path(__file__).parents[1] / path)))
    schedule = schedules.create_schedule(config.optimizer, 390, config.train.epochs)
    return _ours(config, optimizers.create_optimizer(config.optimizer, schedule))


def _ours(config: Any, optimizer: Any) -> Build:
    import jax

    from alexnet_jax import environment, models, ops, state, steps
    from alexnet_jax.data.augment import create_normalize

    environment.keep_freed_memory()
    chosen = ops.choose(config.cpu_kernels, jax.default_backend(), config.model.fields["dtype"])
    model = models.create_model(config.model, CLASSES, ops=chosen)
    normalize = create_normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    create = functools.partial(state.create_state, model, optimizer, (32, 32, 3), 0)
    holder = {"state": jax.jit(create)()}

    def build(what: str, size: int) -> Timed:
        batch = {
            "image": jax.numpy.asarray(images(size)),
            "label": jax.numpy.arange(size, dtype="int32") % CLASSES,
            "mask": jax.numpy.ones(size, bool),
        }
        if what == "train":
            step = jax.jit(
                functools.partial(
                    steps.train_step,
                    model=model,
                    optimizer=optimizer,
                    normalize=normalize,
                    steps_per_epoch=390,
                ),
                donate_argnums=0,
            )

            def train() -> Any:
                holder["state"], metrics = step(holder["state"], batch)
                return holder["state"], metrics

            return timed(train, jax.block_until_ready)
        predict = jax.jit(functools.partial(steps.predict_step, model=model, normalize=normalize))
        return timed(lambda: predict(holder["state"], batch["image"]), jax.block_until_ready)

    return build


def pytorch(
    *,
    bfloat16: bool = False,
    channels_last: bool = False,
    fused: bool = False,
    compiled: bool = False,
) -> Build:
    """Returns a function that builds "train" or "infer" for a batch size."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    layers: list[nn.Module] = []
    before = 3
    for after, pool in zip(CHANNELS, POOLS, strict=True):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pool else []
        before = after
    layers.append(nn.Flatten())
    before *= 16
    for width in HIDDEN:
        layers += [nn.Dropout(), nn.Linear(before, width), nn.ReLU()]
        before = width
    network = nn.Sequential(*layers, nn.Linear(before, CLASSES))
    return _in_pytorch(
        network,
        lambda parameters: torch.optim.Adam(parameters, 1e-4, fused=fused or None),
        bfloat16=bfloat16,
        channels_last=channels_last,
        compiled=compiled,
    )


def pytorch_airbench(*, bfloat16: bool = False) -> Build:
    """Returns what builds the network of cifar10-airbench94 (Jordan, 2024), with its plain SGD.

    A frozen 2x2 convolution to 24 channels, three blocks of two 3x3 convolutions (64, 256, 256
    channels) with pooling between them, batch normalisation and GELU, and a linear layer.
    """
    import torch
    from torch import nn

    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 24, 2), nn.GELU()]
    layers[0].requires_grad_(False)
    before = 24
    for after in (64, 256, 256):
        for channels, pool in ((before, [nn.MaxPool2d(2)]), (after, [])):
            layers += [nn.Conv2d(channels, after, 3, padding=1, bias=False), *pool]
            layers += [nn.BatchNorm2d(after, momentum=0.4), nn.GELU()]
        before = after
    layers += [nn.MaxPool2d(3), nn.Flatten(), nn.Linear(before, CLASSES, bias=False)]
    return _in_pytorch(
        nn.Sequential(*layers),
        lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.85, nesterov=True),
        bfloat16=bfloat16,
        channels_last=True,
    )


def _in_pytorch(
    network: Any,
    create_optimizer: Callable[[Any], Any],
    *,
    bfloat16: bool = False,
    channels_last: bool = False,
    compiled: bool = False,
) -> Build:
    import torch
    from torch import nn

    device = "cuda" if torch.cuda.is_available() else "cpu"
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = network.to(device).to(memory_format=layout)
    optimizer = create_optimizer([each for each in network.parameters() if each.requires_grad])
    forward = torch.compile(network) if compiled else network

    def wait(result: Any) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def build(what: str, size: int) -> Timed:
        image = (torch.from_numpy(images(size)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
        image = image.to(device).contiguous(memory_format=layout)
        label = torch.arange(size, device=device) % CLASSES
        half = functools.partial(torch.autocast, device, torch.bfloat16, enabled=bfloat16)

        def train() -> None:
            network.train()
            optimizer.zero_grad()
            with half():
                loss = nn.functional.cross_entropy(forward(image), label)
            loss.backward()
            optimizer.step()

        def infer() -> Any:
            network.eval()
            with torch.inference_mode(), half():
                return forward(image)

        return timed(train if what == "train" else infer, wait)

    return build


CONTENDERS: dict[str, Callable[[], Build]] = {
    "alexnet_jax float32": ours,
    "alexnet_jax float32, cpu_kernels=off": functools.partial(ours, cpu_kernels="off"),
    "alexnet_jax bfloat16": functools.partial(ours, dtype="bfloat16"),
    "PyTorch float32": pytorch,
    "PyTorch float32, channels_last": functools.partial(pytorch, channels_last=True),
    "PyTorch float32, torch.compile": functools.partial(pytorch, compiled=True),
    "PyTorch bfloat16": functools.partial(pytorch, bfloat16=True, channels_last=True),
    "PyTorch bfloat16, fused Adam": functools.partial(
        pytorch, bfloat16=True, channels_last=True, fused=True
    ),
    "PyTorch bfloat16, torch.compile": functools.partial(
        pytorch, bfloat16=True, channels_last=True, fused=True, compiled=True
    ),
}

# Of other networks than the contenders', to compare whole epochs with.
DEFAULT_CONFIG, FAST_CONFIG = (f"configs/{name}.py" for name in ("cifar10", "cifar10_fast"))
AIRBENCH, AIRBENCH_BFLOAT16 = (f"PyTorch {dtype}, airbench94" for dtype in ("float32", "bfloat16"))
OTHERS: dict[str, Callable[[], Build]] = {
    DEFAULT_CONFIG: functools.partial(config_alone, DEFAULT_CONFIG),
    FAST_CONFIG: functools.partial(config_alone, FAST_CONFIG),
    AIRBENCH: pytorch_airbench,
    AIRBENCH_BFLOAT16: functools.partial(pytorch_airbench, bfloat16=True),
}


def serve(connection: Any, name: str) -> None:
    """Builds and times in this process what the other end of the connection asks for.

    Takes ("train" or "infer", batch size, most seconds), answers with a list of seconds, or with
    a sentence where it cannot be had.
    """
    try:
        build = (CONTENDERS | OTHERS)[name]()
    except Exception as error:
        build, broken = None, _first_line(error)
    ready: dict[tuple[str, int], Timed] = {}
    while request := connection.recv():
        what, size, seconds = request
        try:
            if build is None:
                raise RuntimeError(broken)
            if (what, size) not in ready:
                ready[what, size] = build(what, size)
                for _ in range(2):  # compiles, and allocates; once where that takes its time
                    if ready[what, size]() > seconds:
                        break
            taken = [ready[what, size]()]
            while sum(taken) + taken[-1] < seconds:
                taken.append(ready[what, size]())
            connection.send(taken)
        except Exception as error:
            connection.send(_first_line(error))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"
