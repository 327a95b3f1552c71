"""The options of a run: frozen dataclasses by section, and the ConfigDict that users change.

Files in ``configs/`` change a few values of `default_config`, flags a few more. `validate` makes
the typed, immutable `Config` that the rest of the library takes. Each section is declared beside
the module that reads it; the options of a network are fields of its linen class.
"""

import dataclasses
import os
import runpy
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ml_collections import ConfigDict

from alexnet_jax.data.options import AugmentConfig, DataConfig, input_size
from alexnet_jax.errors import InputError, show
from alexnet_jax.optim.options import OptimizerConfig
from alexnet_jax.options import Option, Section, fraction, option, options_of, unknown_option

_CHECKPOINT = '"newest", "best" or the number of a step'


@dataclass(frozen=True)
class ModelConfig(Section, section="model"):
    """The network.

    Attributes:
        fields: Fields of its linen class; those left out have their defaults.
    """

    name: str = option("alexnet", "Network, by its name in `alexnet_jax.models.MODELS`.")
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class InitConfig(Section, section="init"):
    """Initial parameters from another run."""

    from_run: str = option("", 'Run folder to initialize parameters from; "" is at random.')
    checkpoint: str = option(
        "newest",
        f"Its checkpoint: {_CHECKPOINT}.",
        check=(lambda x: x in ("newest", "best") or (x.isdecimal() and len(x) < 12), _CHECKPOINT),
    )
    reinitialize: tuple[str, ...] = option(
        ("logits/*",), "Patterns of parameters that are initialized at random nevertheless."
    )


@dataclass(frozen=True)
class TrainConfig(Section, section="train"):
    """Training."""

    batch_size: int = option(128, "Images per step, over all devices.", at_least=1)
    epochs: int = option(20, "Passes over the training images.", at_least=1)
    label_smoothing: float = fraction(0.0, "Probability that is spread over all classes.")
    ema_decay: float = fraction(
        0.0, "Decay of a moving average of the parameters, which is evaluated then; 0 is off."
    )
    steps_per_dispatch: int = option(
        0, "Steps in one call of the compiled program; 0 chooses.", at_least=0
    )


@dataclass(frozen=True)
class EvalConfig(Section, section="eval"):
    """Evaluation."""

    # Of CIFAR-10's default network, 250 fit into the memory that a training step leaves.
    batch_size: int = option(
        250, "Images per step, rounded up to a multiple of the devices.", at_least=1
    )
    test: bool = option(True, "Evaluate on the test set at the end; False for a search.")
    tta: Literal["none", "flip", "flip_translate", "ten_crop"] = option(
        "none", "Test-time augmentation, reported beside the plain accuracy."
    )


@dataclass(frozen=True)
class CheckpointConfig(Section, section="checkpoint"):
    """Checkpoints, saved after each epoch."""

    every_seconds: float = option(
        300.0, "Seconds between more of them; 0 is off.", at_least=0, resumable=True
    )


@dataclass(frozen=True)
class WritersConfig(Section, section="writers"):
    """Metric writers."""

    tensorboard: bool = option(True, "Write TensorBoard event files.", resumable=True)


@dataclass(frozen=True)
class Config(Section, section=""):
    """All options of a run."""

    seed: int = option(0, "Seed of all random numbers.", at_least=0, at_most=2**32 - 1)
    num_seeds: int = option(
        1, "Networks trained in one run, with seeds seed, seed + 1, ...", at_least=1, at_most=1024
    )
    cpu_kernels: Literal["auto", "on", "off"] = option(
        "auto", "Whether a CPU computes with the kernels of `alexnet_jax.ops`."
    )
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    init: InitConfig = field(default_factory=InitConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    writers: WritersConfig = field(default_factory=WritersConfig)

    def check(self) -> None:
        """Rejects values of one section that those of another exclude."""
        data, augment, optimizer = self.data, self.augment, self.optimizer
        if optimizer.schedule == "plateau" and not data.validation_fraction:
            raise InputError(
                "config.optimizer.schedule is 'plateau' and config.data.validation_fraction is 0; "
                "hold out validation images, whose accuracy the schedule depends on."
            )
        if optimizer.warmup_epochs > self.train.epochs:
            raise InputError(
                f"config.optimizer.warmup_epochs is {optimizer.warmup_epochs}; it must be at most "
                f"config.train.epochs, {self.train.epochs}."
            )
        if not self.eval.test and not data.validation_fraction:
            raise InputError(
                "config.eval.test is False and config.data.validation_fraction is 0, so nothing "
                "would be evaluated; hold out validation images, or evaluate on the test set."
            )
        if optimizer.muon_normalize_filters and self.model.fields.get("norm") == "none":
            raise InputError(
                "config.optimizer.muon_normalize_filters is True and config.model.norm is 'none'; "
                "kernels of fixed norm need a normalization behind them: 'batch'."
            )
        if augment.cutout >= input_size(data):
            raise InputError(
                f"config.augment.cutout is {augment.cutout}; it must be less than the side of the "
                f"images, {input_size(data)}."
            )
        if self.eval.tta == "ten_crop" and not (augment.crop_padding or data.crop_size):
            raise InputError(
                "config.eval.tta is 'ten_crop', and both config.augment.crop_padding and "
                "config.data.crop_size are 0; set one of them, the padding or the size of crops."
            )
        if augment.crop_padding >= input_size(data):
            name = "crop_size" if data.crop_size else "image_size"
            raise InputError(
                f"config.augment.crop_padding is {augment.crop_padding}; it must be less than "
                f"config.data.{name}, {input_size(data)}, so that no crop misses the image."
            )


# The class of each section; "" has the options outside of sections.
SECTIONS: dict[str, type[Section]] = {"": Config} | {
    field.name: field.type
    for field in dataclasses.fields(Config)
    if isinstance(field.type, type) and issubclass(field.type, Section)
}


def declared_options(model: str | None = None) -> dict[str, Option]:
    """Returns the declaration of each option by its key, "section.name".

    Args:
        model: Name of the network, whose options are left out if it is None. An unknown one raises
            an InputError.
    """
    found = {
        f"{section}.{name}".lstrip("."): declared
        for section, cls in SECTIONS.items()
        for name, declared in options_of(cls).items()
    }
    if model is not None:
        from alexnet_jax.models import model_options  # imports JAX, which --help does without

        found["model.name"] = dataclasses.replace(found["model.name"], default=model)
        found |= {f"model.{name}": declared for name, declared in model_options(model).items()}
    return found


# In a wheel the configs are in the package, in a checkout beside it.
CONFIGS = Path(__file__).with_name("configs")
CONFIGS = CONFIGS if CONFIGS.is_dir() else Path(__file__).parents[1] / "configs"

# A run may resume with other values of these.
RESUMABLE = frozenset(key for key, declared in declared_options().items() if declared.resumable)


def default_config(model: str = "alexnet") -> ConfigDict:
    """Returns all options with their default values, for the network of that name.

    It is locked: assigning a key that is not declared raises.
    """
    values: dict[str, Any] = {}
    for key, declared in declared_options(model).items():
        section, _, name = key.rpartition(".")
        (values.setdefault(section, {}) if section else values)[name] = declared.default
    return ConfigDict(values).lock()


def flatten(config: ConfigDict | Section) -> Iterator[tuple[str, Any]]:
    """Yields each option as ("section.name", value)."""
    items = config.items() if isinstance(config, ConfigDict) else vars(config).items()
    for key, value in items:
        if isinstance(value, ConfigDict | Section):
            yield from ((f"{key}.{name}", option) for name, option in flatten(value))
        elif isinstance(value, Mapping):  # the fields of a network
            yield from value.items()
        else:
            yield key, value


def validate(config: ConfigDict | Config) -> Config:
    """Checks a config before anything is built.

    Args:
        config: As `default_config` returns it, with changes.

    Returns:
        The typed config.

    Raises:
        InputError: Names the first option found wrong, its value, and what would be right.
    """
    return validate_options(dict(flatten(config)))


def validate_options(given: Mapping[str, Any]) -> Config:
    """Checks the values of all options by "section.name", as `validate` does."""
    from alexnet_jax.models import check_model
    from alexnet_jax.optim.patterns import check_patterns

    network = given.get("model.name")
    if not isinstance(network, str):
        raise InputError(f"config.model.name is {show(network)}; it must name a network.")
    known = declared_options(network)
    for key in given:
        if key not in known:
            raise InputError(unknown_option(key, known))
    values: dict[str, Any] = {section: {} for section in SECTIONS}
    for key, declared in known.items():
        if key not in given:
            raise InputError(f"config.{key} is missing; its default is {declared.default!r}.")
        section, _, name = key.rpartition(".")
        values[section][name] = given[key]
    del values["model"]["name"]
    values["model"] = {"name": network, "fields": values["model"]}
    made = values.pop("") | {name: SECTIONS[name](**fields) for name, fields in values.items()}
    config = Config(**made)
    variables = check_model(config.model, input_size(config.data))
    check_patterns(config.optimizer, variables["params"])
    return config


def find_config(name: str) -> str:
    """Returns the path of a config file, with the argument that may follow it after a colon.

    Args:
        name: A path, or the name of a config of the package or of this checkout: "cifar10".

    Raises:
        InputError: There is no such file.
    """
    file, colon, argument = name.partition(":")
    named = [] if os.sep in file else [os.path.join(CONFIGS, f"{file}.py")]
    for path in (file, *named):
        if os.path.isfile(path):  # pathlib's raises where a name is too long
            return f"{path}{colon}{argument}"
    raise InputError(f"--config={name} is not a file; {known_configs()}.")


def known_configs() -> str:
    """Says what --config may be, for a message."""
    names = sorted(path.stem for path in CONFIGS.glob("[!_]*.py"))
    return f"name a config file, or one of {', '.join(names)}"


def load_config(name: str) -> ConfigDict:
    """Returns what the function get_config of a config file returns.

    Args:
        name: As of `find_config`; what follows a colon is passed to the function.

    Raises:
        InputError: There is no such file, or it returns no config.
    """
    path, *argument = find_config(name).split(":", 1)
    try:
        get_config = runpy.run_path(path).get("get_config")
        config = get_config(*argument) if get_config else None
        if isinstance(config, ConfigDict):
            dict(flatten(config))  # A placeholder without a value raises when it is read.
    except (Exception, SystemExit) as error:  # a user's program may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f", line {f.lineno}," for f in frames[::-1] if f.filename == path), "")
        what = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        message = " ".join(str(error).split())
        raise InputError(f"{name}{line} cannot be used: {what}{message}") from None
    if not isinstance(config, ConfigDict):
        raise InputError(
            f"{name} has no function get_config() that returns a ConfigDict; write it as in "
            f"{find_config('cifar10')}."
        )
    return config
