"""The data of a run: on the devices as uint8 where they fit, streamed where they do not."""

import dataclasses
import functools
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from alexnet_jax.data import augment, cache, sampling
from alexnet_jax.data.decode import count_values
from alexnet_jax.data.reading import Batches, in_rows, read_ahead
from alexnet_jax.data.source import Source, load_source
from alexnet_jax.data.streaming import StreamedBatches, StreamedDataset
from alexnet_jax.distributed import sharding
from alexnet_jax.errors import InputError

log = logging.getLogger(__name__)

# A quarter leaves the rest to the network, to copies on the way, and to whoever else computes here.
MEMORY_SHARE = 4
# Pixels that mean and deviation are measured on, evenly spaced over the images: all of CIFAR-10;
# 5,000 photographs of 224 x 224, which tell the mean to 1% of the deviation in seconds.
STATISTICS_PIXELS = 2**28
# The principal colours need them all at once: 1,024 photographs of 256 x 256.
COLOUR_PIXELS = 2**26


@dataclasses.dataclass(frozen=True)
class ResidentDataset:
    """Images to train on, on every device.

    Attributes:
        placing: Gives `arrays` once they are there.
        size: N.
        batch_size: B, images in each batch, over all processes.
        mesh: The devices.
    """

    placing: Future[sampling.Dataset]
    size: int
    batch_size: int
    mesh: Mesh

    @property
    def arrays(self) -> sampling.Dataset:
        """The images uint8[N, S, S, 3] as `image`, and `label` int32[N]."""
        return self.placing.result()

    def feed(self, key: Array, step: int) -> AbstractContextManager[Callable[[int], Any]]:
        """Opens what `steps.train_steps` takes: all images, and the order of a step's epoch.

        Args:
            key: Of `sampling.epoch_order`, or keys[R] of replicas, whose orders are int32[R, N].
            step: Where the run stands; any other may be asked for, too.
        """
        one = functools.partial(sampling.epoch_order, size=self.size)
        order = sharding.jit_eval(jax.vmap(one, in_axes=(0, None)) if key.ndim else one, self.mesh)

        @functools.lru_cache(maxsize=1)  # to sort 45,000 random keys takes a CPU 30 ms
        def in_epoch(epoch: int) -> sampling.Dataset:
            return self.arrays | {"order": order(key, np.int32(epoch))}

        return nullcontext(lambda step: in_epoch(step // (self.size // self.batch_size)))


class RunData(NamedTuple):
    """The images of a run; the test set is open and not yet read, or left alone.

    Attributes:
        train: What the training steps draw their batches from.
        train_size: N.
        steps_per_epoch: Whole batches in N images.
        validation: Batches that are split over the devices; none if no images are held out.
        read_test: Returns the batches of the test set; for the end of the run. None if the run
            is not to see it.
        info: What ``dataset.json`` holds: names of the classes, shape, mean and deviation,
            principal colours where they are asked for, checksums of the files.
        in_memory: By split, whether its images lie on the devices, or are streamed.
    """

    train: ResidentDataset | StreamedDataset
    train_size: int
    steps_per_epoch: int
    validation: list[sampling.Batch] | StreamedBatches
    read_test: Callable[[], list[sampling.Batch] | StreamedBatches] | None
    info: dict[str, Any]
    in_memory: dict[str, bool]

    def examples(self, count: int) -> np.ndarray:
        """Returns training images uint8[N, S, S, 3] to look at, evenly spaced in the set.

        Args:
            count: N at the most: large images are fewer, and so are those of a small set.
        """
        count = min(count, STATISTICS_PIXELS // self.info["image_shape"][0] ** 2)
        chosen = _evenly_spaced(self.train_size, count)
        if isinstance(self.train, StreamedDataset):
            return self.train.source.read(self.train.indices[chosen])[0]
        images = self.train.arrays["image"].addressable_data(0)
        return np.asarray(jnp.take(images, chosen, axis=0, mode="clip"))


def load_data(config: ConfigDict, mesh: Mesh) -> RunData:
    """Opens the data, holds the validation images out of them, and places what fits.

    Args:
        config: The whole config; the data, the batch sizes, the validation share, and whether the
            test set is measured, are used.
        mesh: The devices.

    Raises:
        InputError: The data cannot be had, are fewer than a batch, or are too few for validation
            images that something depends on.
    """
    started = time.monotonic()
    source = load_source(config.data, config.data.train_split)
    test = None
    if config.eval.test:  # opened now, to know that it is there
        test = load_source(config.data, config.data.test_split)
    resident = _is_resident(config.data, len(source), mesh)
    if resident:
        images, labels = cache.decoded(source)
    else:
        labels = _labels(source, config.data.validation_fraction)
    first, second = sampling.stratified_split(labels, config.data.validation_fraction)
    if len(first) < config.train.batch_size:
        raise InputError(
            f"config.train.batch_size is {config.train.batch_size}; {config.data.name} has "
            f"{len(first):,} images to train on, so it must be at most that."
        )
    if config.data.validation_fraction and not len(second):
        _no_image_held_out(config)
    sample = first[_evenly_spaced(len(first), STATISTICS_PIXELS // config.data.image_size**2)]
    colours: dict[str, Any] = {}
    if config.augment.pca_jitter:
        some = first[_evenly_spaced(len(first), COLOUR_PIXELS // config.data.image_size**2)]
        examples = images[some] if resident else source.read(some)[0]
        colours["principal_colours"] = augment.principal_colours(examples)
    train: ResidentDataset | StreamedDataset
    validation: list[sampling.Batch] | StreamedBatches
    measure_on = functools.partial(_measure_on, config.data, config.eval.batch_size, mesh)
    if resident:
        # In the background, since to fill so much new memory can take long (`cache._mapped`).
        thread = ThreadPoolExecutor(1)
        placing = thread.submit(_place_some, images, labels, first, mesh)
        thread.shutdown(wait=False)
        count = functools.partial(count_values, images, sample)
        large = images.nbytes > cache.MIN_BYTES
        counts = _kept_counts(source, sample, config.data, count) if large else count()
        validation = place_batches(images[second], labels[second], config.eval.batch_size, mesh)
        train = ResidentDataset(placing, len(first), config.train.batch_size, mesh)
    else:
        count = functools.partial(_count_streamed, source, sample, config.data)
        counts = _kept_counts(source, sample, config.data, count)
        validation = measure_on(source, second)
        train = StreamedDataset(
            source, first, config.train.batch_size, config.train.epochs, mesh, config.data
        )
    mean, deviation = augment.channel_statistics(counts)
    if config.data.normalization == "subtract_mean":
        deviation = (1 / 255,) * len(mean)  # on the scale 0..1, which leaves pixels as they are
    log.info(
        "%s %s: %s images to train on, %s to validate, %s, %d classes (%.1f s).",
        "Read" if resident else "Streaming",
        config.data.name,
        f"{len(first):,}",
        f"{len(second):,}",
        f"{len(test):,} to test" if test else "the test set stays closed",
        len(source.class_names),
        time.monotonic() - started,
    )
    return RunData(
        train=train,
        train_size=len(first),
        steps_per_epoch=len(first) // config.train.batch_size,
        validation=validation,
        read_test=functools.partial(measure_on, test) if test else None,
        info={
            "name": config.data.name,
            "class_names": list(source.class_names),
            "image_shape": list(source.image_shape),
            "mean": mean,
            "deviation": deviation,
            **colours,
            "checksums": {"train": source.checksum()} | ({"test": test.checksum()} if test else {}),
            "images": {"train": len(first), "validation": len(second)}
            | ({"test": len(test)} if test else {}),
        },
        in_memory={
            split: _is_resident(config.data, size, mesh)
            for split, size in (
                ("train", len(source)),
                ("validation", len(second)),
                ("test", len(test) if test else 0),
            )
        },
    )


def _no_image_held_out(config: ConfigDict) -> None:
    """Tells that no class has images enough for validation; refuses what depends on them."""
    what = _less_than_an_image(config.data.validation_fraction, config.data.name)
    if config.optimizer.schedule == "plateau" or not config.eval.test:
        reason = (
            "config.optimizer.schedule, 'plateau', goes by"
            if config.optimizer.schedule == "plateau"
            else "a run with config.eval.test False is measured on"
        )
        raise InputError(f"{what}; raise it, for validation images are what {reason}.")
    log.warning("%s: nothing is measured before the end.", what)


def _less_than_an_image(fraction: float, name: str) -> str:
    return (
        f"config.data.validation_fraction is {fraction}, which is less than one image of each "
        f"class of {name}"
    )


class Split(NamedTuple):
    """The images of one split, to measure on.

    Attributes:
        batches: Split over the devices; each iteration gives every image once.
        size: How many images.
        class_names: By label.
        part: "train" or "test", by the files of which of the run's splits it is; "" for others.
        checksum: Returns that of these files.
    """

    batches: list[sampling.Batch] | StreamedBatches
    size: int
    class_names: tuple[str, ...]
    part: str
    checksum: Callable[[], str]


def load_split(config: ConfigDict, mesh: Mesh, split: str) -> Split:
    """Opens the images of one split in the batches that a run measures on.

    Args:
        config: The whole config, as for `load_data`.
        mesh: The devices.
        split: "train", "validation" or "test", as a run has them; anything else is a TFDS split.

    Raises:
        InputError: The data cannot be had, or the run holds out no validation images.
    """
    fraction = config.data.validation_fraction
    if split == "validation" and not fraction:
        raise InputError(
            "config.data.validation_fraction is 0, so that the run has no validation images; "
            "choose another split."
        )
    own = {"train": config.data.train_split, "validation": config.data.train_split}
    own["test"] = config.data.test_split
    name = own.get(split, split)
    source = load_source(config.data, name)
    indices = None
    if split in ("train", "validation") and fraction:
        if _is_resident(config.data, len(source), mesh):
            labels = cache.decoded(source)[1]
        else:
            labels = _labels(source, fraction)
        indices = sampling.stratified_split(labels, fraction)[split == "validation"]
        if not len(indices):
            raise InputError(
                f"{_less_than_an_image(fraction, config.data.name)}, so that the run has no "
                "validation images; choose another split."
            )
    parts = {config.data.test_split: "test", config.data.train_split: "train"}
    whole = name if name in parts else name.partition("[")[0]
    files = source if whole == name or whole not in parts else load_source(config.data, whole)
    return Split(
        batches=_measure_on(config.data, config.eval.batch_size, mesh, source, indices),
        size=len(source) if indices is None else len(indices),
        class_names=source.class_names,
        part=parts.get(whole, ""),
        checksum=files.checksum,
    )


def resident_limit(mesh: Mesh) -> int:
    """Returns how many bytes of images may lie on each device, by the memory there is."""
    host = min(_host_memory()) // MEMORY_SHARE
    device = mesh.local_devices[0]
    if sharding.on_cpu(mesh):
        return host // len(mesh.local_devices)  # each of which has a copy, in the same memory
    memory = (device.memory_stats() or {}).get("bytes_limit")
    return min(host, memory // MEMORY_SHARE) if memory else host


def _host_memory() -> list[int]:
    """Returns the machine's memory in bytes, and what a container is allowed of it."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # of cgroups 2 and 1
        try:
            found.append(int(Path("/sys/fs/cgroup", limit).read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return found


def _is_resident(config: ConfigDict, size: int, mesh: Mesh) -> bool:
    if config.in_memory == "auto":
        return size * 3 * config.image_size**2 <= resident_limit(mesh)
    return config.in_memory == "on"


def _labels(source: Source, validation_fraction: float) -> np.ndarray:
    if not validation_fraction:  # no one asks for them
        return np.zeros(len(source), np.int32)
    kept = cache.load_or_compute(source, "labels", lambda: {"labels": source.read_labels()})
    return kept["labels"]


def _place_some(
    images: np.ndarray, labels: np.ndarray, chosen: np.ndarray, mesh: Mesh
) -> sampling.Dataset:
    host = {"image": images[chosen], "label": labels[chosen]}
    placed: sampling.Dataset = sharding.place(host, sharding.replicated(mesh))
    return placed


def _evenly_spaced(size: int, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, size - 1, min(size, max(most, 1))).astype(int))


def _kept_counts(
    source: Source, indices: np.ndarray, config: ConfigDict, count: Callable[[], np.ndarray]
) -> np.ndarray:
    """Returns what `count` does of some images, counted once for all runs."""
    fraction = config.validation_fraction
    return cache.load_or_compute(
        source, "colours", lambda: {"counts": count()}, validation=fraction, size=len(indices)
    )["counts"]


def _count_streamed(source: Source, indices: np.ndarray, config: ConfigDict) -> np.ndarray:
    """Counts the values of some images, as `count_values` does."""
    counts = np.zeros((3, 256), np.int64)
    rows = Batches(source, in_rows(indices, 64))
    with (
        tqdm(desc="Measuring the colours", total=len(rows), disable=None, delay=1) as bar,
        read_ahead(
            rows, lambda batch: batch, workers=config.workers, ahead=config.prefetch
        ) as stream,
    ):
        for batch in stream:
            counts += count_values(np.asarray(batch["image"])[np.asarray(batch["mask"])])
            bar.update()
    return counts


def _measure_on(
    config: ConfigDict,
    batch_size: int,
    mesh: Mesh,
    source: Source,
    indices: np.ndarray | None = None,
) -> list[sampling.Batch] | StreamedBatches:
    """Returns the batches of a source, or some of its images, to measure on: read or to stream."""
    size = len(source) if indices is None else len(indices)
    if not _is_resident(config, size, mesh):
        chosen = np.arange(size) if indices is None else indices
        return StreamedBatches(source, chosen, shared_size(batch_size, size, mesh), mesh, config)
    if _is_resident(config, len(source), mesh):  # then a run has kept them all decoded
        images, labels = cache.decoded(source)
        if indices is not None:
            images, labels = images[indices], labels[indices]
    else:
        images, labels = source.read(np.arange(size) if indices is None else indices)
    return place_batches(images, labels, batch_size, mesh)


def shared_size(batch_size: int, images: int, mesh: Mesh) -> int:
    """Returns the size of batches that devices can share equally, no larger than need be."""
    return -(-min(batch_size, max(1, images)) // mesh.size) * mesh.size


def place_batches(
    images: np.ndarray, labels: np.ndarray, batch_size: int, mesh: Mesh
) -> list[sampling.Batch]:
    """Places all images on the devices, as batches that these can share equally."""
    batch_size = shared_size(batch_size, len(labels), mesh)
    return [
        sharding.place(batch, sharding.split(mesh))
        for batch in sampling.padded_batches(images, labels, batch_size)
    ]
