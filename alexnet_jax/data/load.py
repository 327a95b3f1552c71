"""The data of a run: opened, split, measured, and placed on the devices or streamed to them."""

import functools
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from alexnet_jax.config import Config
from alexnet_jax.data import cache
from alexnet_jax.data.decode import count_values
from alexnet_jax.data.in_memory import InMemoryDataset, memory_limit, place_batches
from alexnet_jax.data.options import DataConfig
from alexnet_jax.data.sampling import Batch, eval_batch_size, evenly_spaced, stratified_split
from alexnet_jax.data.source import Source, load_source
from alexnet_jax.data.statistics import channel_statistics, principal_components
from alexnet_jax.data.streaming import Reader, StreamedBatches, StreamedDataset, in_rows
from alexnet_jax.distributed import collectives
from alexnet_jax.errors import InputError

log = logging.getLogger(__name__)

# Pixels that mean and std are measured on, evenly spaced over the images: all of CIFAR-10; 5,000
# photographs of 224 x 224, which tell the mean to 1% of the std in seconds.
STATISTICS_PIXELS = 2**28
# The principal components need them all at once: 1,024 photographs of 256 x 256.
COMPONENTS_PIXELS = 2**26
_SPLIT_NAMES = {"train": "training", "validation": "validation", "test": "test"}


class RunData(NamedTuple):
    """The images of a run; batches to evaluate on are split over the devices."""

    train: InMemoryDataset | StreamedDataset
    train_size: int  # N
    steps_per_epoch: int  # whole batches in N images
    validation: Iterable[Batch]  # none if no images are held out
    test: Callable[[], Iterable[Batch]] | None  # reads them; None if the run does not test
    # What dataset.json holds: class names, shape, mean and std, principal components where they
    # are asked for, checksums of the files.
    info: dict[str, Any]
    in_memory: dict[str, bool]  # by split, whether its images are on the devices

    def examples(self, count: int) -> np.ndarray:
        """Returns at most `count` training images uint8[n, S, S, 3], evenly spaced in the set."""
        count = min(count, STATISTICS_PIXELS // self.info["image_shape"][0] ** 2)
        return self.train.read(evenly_spaced(self.train_size, count))


def load_data(config: Config, mesh: Mesh) -> RunData:
    """Opens the data, holds the validation images out of it, and places what fits."""
    with collectives.fail_together():
        data = _load(config, mesh)
    # By the memory of each, unless config.data.in_memory says so; the programs would not meet.
    collectives.check_equal(data.in_memory, "which of the images fit into memory")
    return data


def _load(config: Config, mesh: Mesh) -> RunData:
    started = time.monotonic()
    data, fraction = config.data, config.data.validation_fraction
    source = load_source(data, data.train_split)
    test = load_source(data, data.test_split) if config.eval.test else None
    if in_memory := _fits(data, len(source), mesh):
        images, labels = cache.decoded(source)
    else:
        labels = _labels(source, fraction)
    first, second = stratified_split(labels, fraction)
    _check(config, len(first), len(second), in_memory)
    reader = Reader(data.workers, data.prefetch, mesh)
    train: InMemoryDataset | StreamedDataset
    if in_memory:
        train = InMemoryDataset.place(images, labels, first, config.train, mesh)
        count = functools.partial(count_values, images)
        validation: Iterable[Batch] = place_batches(
            images[second], labels[second], config.eval.batch_size, mesh
        )
    else:
        train = StreamedDataset(source, first, config.train, reader)
        count = functools.partial(_count_streamed, source, reader)
        validation = _eval_batches(config, reader, source, second)
    sizes = {"train": len(first), "validation": len(second)} | ({"test": len(test)} if test else {})
    counts = ", ".join(f"{size:,} {_SPLIT_NAMES[split]} images" for split, size in sizes.items())
    log.info(
        f"{'Read' if in_memory else 'Streaming'} {data.name}: {counts}"
        f"{'' if test else ', the test set is not evaluated'}, {len(source.class_names)} classes "
        f"({time.monotonic() - started:.1f} s)."
    )
    checksums = {"train": source.checksum()} | ({"test": test.checksum()} if test else {})
    return RunData(
        train=train,
        train_size=len(first),
        steps_per_epoch=len(first) // config.train.batch_size,
        validation=validation,
        test=functools.partial(_eval_batches, config, reader, test) if test else None,
        info={
            "name": data.name,
            "class_names": list(source.class_names),
            "image_shape": list(source.image_shape),
            **_statistics(config, source, first, count, train.read),
            "checksums": checksums,
            "images": sizes,
        },
        in_memory={
            split: _fits(data, size, mesh)
            for split, size in (sizes | {"train": len(source)}).items()
        },
    )


def _statistics(
    config: Config,
    source: Source,
    train: np.ndarray,
    count: Callable[[np.ndarray], np.ndarray],
    read: Callable[[np.ndarray], np.ndarray],
) -> dict[str, Any]:
    """Returns what is measured on the training images, `train` of the source.

    `count` is `count_values` of indices in the source; `read` reads by position in `train`.
    """
    data = config.data
    pixels = data.image_size**2
    sample = train[evenly_spaced(len(train), STATISTICS_PIXELS // pixels)]
    depends = {"validation": data.validation_fraction, "size": len(sample)}
    found = cache.load_or_compute(source, "colours", lambda: {"counts": count(sample)}, **depends)
    mean, std = channel_statistics(found["counts"])
    if data.normalization == "subtract_mean":
        std = (1 / 255,) * len(mean)  # on the scale 0..1, which leaves pixels as they are
    statistics: dict[str, Any] = {"mean": mean, "deviation": std}
    if config.augment.pca_jitter:
        some = evenly_spaced(len(train), COMPONENTS_PIXELS // pixels)
        statistics["principal_colours"] = principal_components(read(some))
    return statistics


def _check(config: Config, train: int, validation: int, in_memory: bool) -> None:
    """Rejects too few images; warns where no class has enough of them for validation."""
    if config.num_seeds > 1 and not in_memory:
        raise InputError(
            f"config.num_seeds is {config.num_seeds}, and the images are streamed, in one order; "
            "many seeds need them on the devices (config.data.in_memory), or a run each."
        )
    name, fraction = config.data.name, config.data.validation_fraction
    if train < config.train.batch_size:
        raise InputError(
            f"config.train.batch_size is {config.train.batch_size}; {name} has {train:,} training "
            "images, so it must be at most that."
        )
    if validation or not fraction:
        return
    what = _less_than_an_image(fraction, name)
    if config.optimizer.schedule == "plateau":
        raise InputError(f"{what}; raise it: config.optimizer.schedule 'plateau' depends on them.")
    if not config.eval.test:
        raise InputError(f"{what}; raise it: a run with config.eval.test False is judged by them.")
    log.warning("%s: nothing is evaluated before the end.", what)


def _less_than_an_image(fraction: float, name: str) -> str:
    return (
        f"config.data.validation_fraction is {fraction}, which is less than one image of each "
        f"class of {name}"
    )


class Split(NamedTuple):
    """The images of one split, to evaluate on."""

    batches: Iterable[Batch]  # split over the devices; each iteration gives every image once
    size: int
    class_names: tuple[str, ...]  # by label
    part: str  # "train" or "test", by whose files among the run's it reads; "" for others
    checksum: Callable[[], str]  # of these files


def load_split(config: Config, mesh: Mesh, split: str) -> Split:
    """Opens the images of one split in the batches that a run evaluates on.

    `split` is "train", "validation" or "test", as the run has them, or any TFDS split.
    """
    data, fraction = config.data, config.data.validation_fraction
    if split == "validation" and not fraction:
        raise InputError(
            "config.data.validation_fraction is 0, so that the run has no validation images; "
            "choose another split."
        )
    own = {"train": data.train_split, "validation": data.train_split}
    name = (own | {"test": data.test_split}).get(split, split)
    source = load_source(data, name)
    indices = None
    if split in own and fraction:
        in_memory = _fits(data, len(source), mesh)
        labels = cache.decoded(source)[1] if in_memory else _labels(source, fraction)
        indices = stratified_split(labels, fraction)[split == "validation"]
        if not len(indices):
            raise InputError(
                f"{_less_than_an_image(fraction, data.name)}, so that the run has no "
                "validation images; choose another split."
            )
    parts = {data.test_split: "test", data.train_split: "train"}
    whole = name if name in parts else name.partition("[")[0]
    files = source if whole == name or whole not in parts else load_source(data, whole)
    reader = Reader(data.workers, data.prefetch, mesh)
    return Split(
        batches=_eval_batches(config, reader, source, indices),
        size=len(source) if indices is None else len(indices),
        class_names=source.class_names,
        part=parts.get(whole, ""),
        checksum=files.checksum,
    )


def _eval_batches(
    config: Config, reader: Reader, source: Source, indices: np.ndarray | None = None
) -> Iterable[Batch]:
    """Returns the batches of a source, or of some of its images, to evaluate on."""
    chosen = np.arange(len(source)) if indices is None else indices
    batch_size, mesh = config.eval.batch_size, reader.mesh
    if not _fits(config.data, len(chosen), mesh):
        size = eval_batch_size(batch_size, len(chosen), mesh)
        return StreamedBatches(source, chosen, size, reader)
    if _fits(config.data, len(source), mesh):  # then a run has kept them all decoded
        images, labels = cache.decoded(source)
        if indices is not None:
            images, labels = images[indices], labels[indices]
    else:
        images, labels = source.read(chosen)
    return place_batches(images, labels, batch_size, mesh)


def _fits(data: DataConfig, size: int, mesh: Mesh) -> bool:
    if data.in_memory == "auto":
        return size * 3 * data.image_size**2 <= memory_limit(mesh)
    return data.in_memory == "on"


def _labels(source: Source, validation_fraction: float) -> np.ndarray:
    if not validation_fraction:  # no one asks for them
        return np.zeros(len(source), np.int32)
    arrays = cache.load_or_compute(source, "labels", lambda: {"labels": source.read_labels()})
    return arrays["labels"]


def _count_streamed(source: Source, reader: Reader, indices: np.ndarray) -> np.ndarray:
    """Counts the values of some images, as `count_values` does."""

    def count(batch: dict[str, np.ndarray]) -> np.ndarray:
        return count_values(np.asarray(batch["image"])[np.asarray(batch["mask"])])

    rows, title = in_rows(indices, 64), "Measuring channel statistics"
    with reader.stream(source, rows, count) as stream:
        return sum(tqdm(stream, title, len(rows), disable=None, delay=1), np.zeros((3, 256), int))
