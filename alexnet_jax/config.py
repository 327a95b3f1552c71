"""Every option of a run, declared once, and the checks that refuse impossible values.

A config is an ``ml_collections.ConfigDict`` with one section per module; each module is handed
only its own section. Files in ``configs/`` call `default_config` and change a few lines. The
options of a network are the fields of its linen class, so that they too stand in one place.
"""

import difflib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from alexnet_jax.data.tta import VIEWS
from alexnet_jax.errors import InputError, show
from alexnet_jax.models import check_model, model_options
from alexnet_jax.ops import SWITCH
from alexnet_jax.optim.optimizers import check_patterns


def default_config(model: str = "alexnet") -> ConfigDict:
    """Returns all options with their default values.

    Args:
        model: Name of the network, a key of `alexnet_jax.models.MODELS`.

    Returns:
        A locked ConfigDict: assigning a key that is not declared here raises.
    """
    config = ConfigDict()
    config.seed = 0
    config.num_seeds = 1  # trained in one run, each as by itself: seed, seed + 1, ...
    config.cpu_kernels = "auto"  # "auto", "on", "off": convolve as alexnet_jax.ops does on a CPU

    config.data = ConfigDict()
    config.data.name = "cifar10"  # a TFDS name, a prepared data set, or "digits"
    config.data.data_dir = ""  # "" is TFDS's usual folder, ~/tensorflow_datasets
    config.data.train_split = "train"
    config.data.test_split = "test"
    config.data.validation_fraction = 0.1  # held out of train, per class; 0 trains on all of it
    config.data.image_size = 32  # pixels; images of another size are resized
    config.data.crop_size = 0  # pixels of it that the network sees, of anywhere while training and
    #                            of the middle otherwise; 0 is all
    config.data.normalization = "standardize"  # or "subtract_mean": 0..255 minus the mean
    config.data.in_memory = (
        "auto"  # "on" the devices, "off" streams; "auto" by memory: docs/data.md
    )
    config.data.workers = 2  # processes that read where images are streamed; 0 reads in threads
    config.data.prefetch = 2  # batches that each of these has ready, or threads

    config.augment = ConfigDict()
    config.augment.crop_padding = 4  # pixels of reflected border before a random crop; 0 is off
    config.augment.pad_mode = "reflect"  # or "constant", what fills the border
    config.augment.flip = True  # mirror left-right with probability 1/2
    config.augment.alternating_flip = False  # in place of that every other epoch, half by half
    config.augment.cutout = 0  # side in pixels of a square that is covered; 0 is off
    config.augment.pca_jitter = 0.0  # deviation along the principal colours, in theirs; paper: 0.1

    config.model = ConfigDict({"name": model, **model_options(model)})

    config.init = ConfigDict()
    config.init.from_run = ""  # a run folder whose network this one begins as; "" begins anew
    config.init.checkpoint = "newest"  # of it, or "best", or a step
    config.init.reinitialize = ("logits/*",)  # parameters that begin anew all the same

    config.optimizer = ConfigDict()
    config.optimizer.name = "adam"  # "adam", "adamw", "sgd", "sgd_2012"
    config.optimizer.learning_rate = 1e-3  # at its peak
    config.optimizer.schedule = "cosine"  # after warm-up: "constant", "cosine", "linear", "step",
    #                                       and "plateau", which goes by the validation accuracy
    config.optimizer.warmup_epochs = 0.0
    config.optimizer.end_lr_fraction = 0.0  # of the peak rate, at the end of "cosine", "linear"
    config.optimizer.step_epochs = (10, 15)  # "step" multiplies the rate by step_factor here
    config.optimizer.step_factor = 0.1
    config.optimizer.plateau_patience = 5  # without improvement, after which "plateau" does so, too
    config.optimizer.b1 = 0.9  # Adam's decay rates and epsilon
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.momentum = 0.9  # SGD's
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 0.0  # on kernels only; decoupled in adamw, L2 in sgd
    config.optimizer.rate_patterns = ()  # parameters, as "norm*/bias", whose learning rate is
    config.optimizer.rate_factors = ()  # multiplied by these
    config.optimizer.frozen = ()  # parameters, as "conv*", that stay as they begin
    config.optimizer.muon_learning_rate = (
        0.0  # peak learning rate of Muon on muon_pattern; 0 is off
    )
    config.optimizer.muon_pattern = "conv*/kernel"  # kernels with a normalisation behind them
    config.optimizer.muon_momentum = 0.95
    config.optimizer.muon_weight_decay = 0.0  # decoupled
    config.optimizer.muon_normalize_filters = (
        False  # keep those kernels at the norm of unit filters
    )
    config.optimizer.lookahead_period = 0  # updates between steps of slow weights; 0 is off
    config.optimizer.lookahead_decay = 0.5  # share of the slow weights that these steps keep
    config.optimizer.lookahead_power = 0.0  # 0: always; else times (updates made / all) ** power
    config.optimizer.clip_norm = 0.0  # largest global gradient norm; 0 is off
    config.optimizer.accumulate_steps = 1  # batches whose gradients are averaged per update

    config.train = ConfigDict()
    config.train.batch_size = 128  # images per step, over all devices
    config.train.epochs = 20
    config.train.label_smoothing = 0.0
    config.train.ema_decay = 0.0  # of an average of the weights, which is then evaluated; 0 is off
    config.train.steps_per_dispatch = 0  # steps per call into the device; 0 chooses

    config.eval = ConfigDict()
    # Rounded up to a multiple of the devices. Of CIFAR-10's default network, this many images fit
    # into the memory that a training step leaves.
    config.eval.batch_size = 250
    config.eval.test = True  # at the end; False never opens the test set: for runs to choose by
    config.eval.tta = "none"  # measured beside: "flip", "flip_translate", "ten_crop"

    config.checkpoint = ConfigDict()
    config.checkpoint.every_seconds = 300.0  # beside those after each epoch; 0 is off

    config.writers = ConfigDict()
    config.writers.tensorboard = True
    return config.lock()


# What may change between the runs that share a folder: where things lie and how often they are
# written, never what is computed.
FREE_KEYS = frozenset(
    {"data.data_dir", "data.in_memory", "data.workers", "data.prefetch"}
    | {"checkpoint.every_seconds", "writers.tensorboard"}
)


# A step computes in float32 and counts in int32. Plain numbers, as NumPy's compare no huge int.
_SMALLEST_FLOAT, _LARGEST_FLOAT = (
    float(getattr(np.finfo(np.float32), name)) for name in ("tiny", "max")
)
_LARGEST_INT = 2**31 - 1


def _at_least(bound: float) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: value >= bound), f"at least {bound}"


def _count(least: int) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: least <= value <= _LARGEST_INT), f"between {least} and {_LARGEST_INT}"


def _one_of(*names: str) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: value in names), "one of " + ", ".join(names)


_POSITIVE = ((lambda value: value > 0), "greater than 0")
_PATTERNS = (
    (lambda value: all(type(item) is str for item in value)),
    'shell patterns of parameters, such as "norm*/bias"',
)
_FRACTION = ((lambda value: 0 <= value < 1), "at least 0 and less than 1")

# Key to (test, what would be right). Options of a model are checked by the model itself.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed": ((lambda value: 0 <= value < 2**32), "at least 0 and less than 2**32"),
    "num_seeds": ((lambda value: 1 <= value <= 1024), "between 1 and 1024"),
    "cpu_kernels": _one_of(*SWITCH),
    "data.name": (bool, "the name of a data set"),
    "data.train_split": (bool, "the name of a split"),
    "data.test_split": (bool, "the name of a split"),
    "data.validation_fraction": _FRACTION,
    "data.image_size": ((lambda value: 8 <= value <= 1024), "between 8 and 1024"),
    "data.crop_size": ((lambda value: value == 0 or 8 <= value <= 1024), "0, or from 8 to 1024"),
    "data.normalization": _one_of("standardize", "subtract_mean"),
    "data.in_memory": _one_of("auto", "on", "off"),
    "data.workers": _at_least(0),
    "data.prefetch": _at_least(1),
    "augment.crop_padding": _at_least(0),
    "augment.pad_mode": _one_of("reflect", "constant"),
    "augment.cutout": _count(0),
    "augment.pca_jitter": _at_least(0),
    "init.checkpoint": (
        (lambda value: value in ("newest", "best") or (value.isdecimal() and len(value) < 12)),
        '"newest", "best" or the number of a step',
    ),
    "optimizer.name": _one_of("adam", "adamw", "sgd", "sgd_2012"),
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.schedule": _one_of("constant", "cosine", "linear", "step", "plateau"),
    "optimizer.warmup_epochs": _at_least(0),
    "optimizer.end_lr_fraction": ((lambda value: 0 <= value <= 1), "between 0 and 1"),
    "optimizer.step_epochs": (
        (lambda value: all(epoch > 0 for epoch in value)),
        "epochs greater than 0",
    ),
    "optimizer.step_factor": ((lambda value: 0 < value <= 1), "greater than 0 and at most 1"),
    "optimizer.plateau_patience": _count(1),
    "optimizer.b1": _FRACTION,
    "optimizer.b2": _FRACTION,
    "optimizer.eps": _POSITIVE,
    "optimizer.momentum": _FRACTION,
    "optimizer.weight_decay": _at_least(0),
    "optimizer.rate_patterns": _PATTERNS,
    "optimizer.frozen": _PATTERNS,
    "optimizer.rate_factors": (
        (lambda value: all(type(x) in (int, float) and 0 < x <= 1e6 for x in value)),
        "numbers greater than 0 and at most 1e6",
    ),
    "optimizer.muon_learning_rate": _at_least(0),
    "optimizer.muon_momentum": _FRACTION,
    "optimizer.muon_weight_decay": _at_least(0),
    "optimizer.lookahead_period": _count(0),
    "optimizer.lookahead_decay": _FRACTION,
    "optimizer.lookahead_power": _at_least(0),
    "optimizer.clip_norm": _at_least(0),
    "optimizer.accumulate_steps": _count(1),
    "train.batch_size": _count(1),
    "train.epochs": _count(1),
    "train.label_smoothing": _FRACTION,
    "train.ema_decay": _FRACTION,
    "train.steps_per_dispatch": _count(0),
    "eval.batch_size": _count(1),
    "eval.tta": _one_of(*VIEWS),
    "checkpoint.every_seconds": _at_least(0),
}


def flatten(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields each option as ("section.key", value), in the order of the names."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def unknown_key_message(key: str, config: ConfigDict) -> str:
    """Says that `key` is no option and names those that it may have been meant to be."""
    key = key if len(key) <= 80 else show(key)[1:-1]
    section, _, last = key.rpartition(".")
    options = {name: name.rpartition(".")[2] for name, _ in flatten(config)}
    near = [name for name, option in options.items() if option == last]  # in the wrong section
    if not near:
        close = difflib.get_close_matches(last, options.values())
        near = [name for name, option in options.items() if option in close]
    near = [name for name in near if section and name.startswith(f"{section}.")] or near
    sections = difflib.get_close_matches(section or last, list(config), n=1)
    if near:
        hint = f"did you mean {' or '.join(f'config.{name}' for name in near)}?"
    elif sections and isinstance(config[sections[0]], ConfigDict):
        hint = f"the options of {sections[0]} are {', '.join(config[sections[0]])}."
    else:
        hint = f"the sections are {', '.join(config)}."
    return f"config.{key} is not an option; {hint}"


def validate(config: ConfigDict) -> None:
    """Refuses unknown keys, wrong types and impossible values before anything is built.

    Args:
        config: A config as `default_config` makes it, with changes.

    Raises:
        InputError: Names the first option found wrong, its value, and what would be right.
    """
    model = config.get("model")
    name: Any = model.get("name") if isinstance(model, ConfigDict) else None
    reference = dict(flatten(default_config(name)))
    given = dict(flatten(config))
    for key in given:
        if key not in reference:
            raise InputError(unknown_key_message(key, default_config(name)))
    for key, default in reference.items():
        if key not in given:
            raise InputError(f"config.{key} is missing; its default is {default!r}.")
        check_option(key, given[key], default)
    _check_together(config)
    variables = check_model(config.model, input_size(config.data))
    check_patterns(config.optimizer, variables["params"])


def input_size(config: ConfigDict) -> int:
    """Returns the side, in pixels, of what the network sees, of the section `config.data`."""
    return config.crop_size or config.image_size


def check_option(key: str, value: Any, default: Any) -> None:
    """Refuses a value that an option cannot have, whatever the others are.

    Options of a network are checked for their type alone; the rest depends on the network.

    Raises:
        InputError: Names the option, its value, and what would be right.
    """
    check_type(key, value, default)
    if key not in _RULES:
        return
    test, right = _RULES[key]
    if not test(value):
        raise InputError(f"config.{key} is {show(value)}; it must be {right}.")
    if type(default) is float and not test(_to_float32(value)):
        raise InputError(
            f"config.{key} is {value!r}, in float32 {_to_float32(value)!r}; it must be {right} "
            "there, too."
        )


def check_type(key: str, value: Any, default: Any) -> None:
    """Refuses a value of another type than the option's default; an int may stand for a float.

    Raises:
        InputError: Names the option, its value, and what would be right.
    """
    wanted = type(default)
    if type(value) is not wanted and not (wanted is float and type(value) is int):
        raise InputError(
            f"config.{key} is {show(value)}, {_a(type(value))}; "
            f"it must be {_a(wanted)} such as {default!r}."
        )
    if wanted is float and not abs(value) <= _LARGEST_FLOAT:
        raise InputError(
            f"config.{key} is {show(value)}; it must be a finite number of at most "
            f"{_LARGEST_FLOAT:.1e}."
        )
    if wanted is tuple and default:
        for i, item in enumerate(value):
            check_type(f"{key}[{i}]", item, default[0])


def _to_float32(value: float) -> float:
    """Rounds as the devices do, which take the smallest numbers for 0."""
    rounded = float(np.float32(value))
    return rounded if abs(rounded) >= _SMALLEST_FLOAT else 0.0


def _a(kind: type) -> str:
    return f"{'an' if kind.__name__[0] in 'aeiou' else 'a'} {kind.__name__}"


def _check_together(config: ConfigDict) -> None:
    """Refuses options that are possible alone and impossible together."""
    optimizer, train = config.optimizer, config.train
    if optimizer.name == "adam" and optimizer.weight_decay > 0:
        raise InputError(
            f"config.optimizer.weight_decay is {optimizer.weight_decay} and config.optimizer.name "
            "is 'adam', which has none; use 'adamw' for decoupled weight decay."
        )
    if optimizer.schedule == "plateau" and not config.data.validation_fraction:
        raise InputError(
            "config.optimizer.schedule is 'plateau' and config.data.validation_fraction is 0; it "
            "must be more than 0, for the schedule goes by the accuracy on these images."
        )
    if optimizer.warmup_epochs > train.epochs:
        raise InputError(
            f"config.optimizer.warmup_epochs is {optimizer.warmup_epochs}; "
            f"it must be at most config.train.epochs, {train.epochs}."
        )
    if not config.eval.test and not config.data.validation_fraction:
        raise InputError(
            "config.eval.test is False and config.data.validation_fraction is 0; nothing would "
            "tell how good the network is: hold out validation images, or measure on the test set."
        )
    if len(optimizer.rate_patterns) != len(optimizer.rate_factors):
        raise InputError(
            f"config.optimizer.rate_factors is {optimizer.rate_factors}; it must have one factor "
            f"for each of config.optimizer.rate_patterns, {optimizer.rate_patterns}."
        )
    if optimizer.muon_normalize_filters:
        if not optimizer.muon_learning_rate:
            raise InputError(
                "config.optimizer.muon_normalize_filters is True and config.optimizer.muon_learning_rate is 0; "
                "the first is about Muon's kernels, and needs the second."
            )
        if config.model.get("norm") == "none":
            raise InputError(
                "config.optimizer.muon_normalize_filters is True and config.model.norm is 'none'; it "
                "holds kernels at one size, so a normalisation must stand behind them: 'batch'."
            )
    if optimizer.lookahead_power and not optimizer.lookahead_period:
        raise InputError(
            f"config.optimizer.lookahead_power is {optimizer.lookahead_power} and "
            "config.optimizer.lookahead_period is 0; the first needs the second."
        )
    if config.augment.cutout >= input_size(config.data):
        raise InputError(
            f"config.augment.cutout is {config.augment.cutout}; it must be less than the side of "
            f"the images, {input_size(config.data)}."
        )
    if config.eval.tta == "ten_crop" and not (config.augment.crop_padding or config.data.crop_size):
        raise InputError(
            "config.eval.tta is 'ten_crop', and both config.augment.crop_padding and "
            "config.data.crop_size are 0; the crops are of images with a border of the first, or "
            "have the size of the second."
        )
    if config.augment.alternating_flip and not config.augment.flip:
        raise InputError(
            "config.augment.alternating_flip is True and config.augment.flip is False; the first "
            "says how images are mirrored, and needs the second."
        )
    if config.data.crop_size > config.data.image_size:
        raise InputError(
            f"config.data.crop_size is {config.data.crop_size}; it must be at most "
            f"config.data.image_size, {config.data.image_size}."
        )
    if config.augment.crop_padding >= input_size(config.data):
        seen = "crop_size" if config.data.crop_size else "image_size"
        raise InputError(
            f"config.augment.crop_padding is {config.augment.crop_padding}; it must be less than "
            f"config.data.{seen}, {config.data[seen]}, or a crop could miss the image."
        )
