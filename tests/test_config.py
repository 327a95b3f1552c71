"""The config: what validate accepts, what it rejects, and whether it says why."""

import ast
import importlib
import runpy
from pathlib import Path
from typing import ClassVar

import pytest
from ml_collections import ConfigDict

from alexnet_jax.config import (
    RESUMABLE,
    SECTIONS,
    declared_options,
    default_config,
    flatten,
    unknown_option,
    validate,
)
from alexnet_jax.errors import InputError
from alexnet_jax.models import MODELS

ROOT = Path(__file__).parents[1]
DECLARED = declared_options("alexnet")
DEFAULTS = dict(flatten(default_config()))

# For each option whose values have a range, some that are out of it.
IMPOSSIBLE = {
    "cpu_kernels": ("fast", ""),
    "seed": (-1, 2**32),
    "num_seeds": (0, 1025),
    "data.name": ("",),
    "data.train_split": ("",),
    "data.test_split": ("",),
    "data.validation_fraction": (-0.1, 1.0),
    "data.image_size": (7, 1025),
    "data.crop_size": (-1, 7, 1025),
    "data.normalization": ("none", ""),
    "data.in_memory": ("yes", ""),
    "data.workers": (-1,),
    "data.prefetch": (0,),
    "augment.crop_padding": (-1,),
    "augment.pad_mode": ("white",),
    "augment.cutout": (-1,),
    "eval.tta": ("five_crop",),
    "augment.pca_jitter": (-0.1,),
    "optimizer.name": ("adamax", ""),
    "optimizer.learning_rate": (0.0, -1e-3),
    "optimizer.schedule": ("exponential",),
    "optimizer.warmup_epochs": (-1.0,),
    "optimizer.end_lr_fraction": (-0.1, 1.1),
    "optimizer.step_epochs": ((0, 10), (5, -1)),
    "optimizer.step_factor": (0.0,),
    "optimizer.plateau_patience": (0,),
    "init.checkpoint": ("last", ""),
    "optimizer.b1": (-0.1, 1.0),
    "optimizer.b2": (-0.1, 1.0),
    "optimizer.eps": (0.0,),
    "optimizer.momentum": (-0.1, 1.0),
    "optimizer.weight_decay": (-1e-4,),
    "optimizer.lr_multipliers": ((("*", 0.0),), (("*", 2.0), ("*", 1e7))),
    "optimizer.muon_learning_rate": (-0.1,),
    "optimizer.muon_momentum": (-0.1, 1.0),
    "optimizer.muon_weight_decay": (-0.1,),
    "optimizer.lookahead_period": (-1,),
    "optimizer.lookahead_decay": (-0.1, 1.0),
    "optimizer.lookahead_power": (-1.0,),
    "optimizer.clip_norm": (-1.0,),
    "optimizer.accumulate_steps": (0,),
    "train.batch_size": (0,),
    "train.epochs": (0,),
    "train.label_smoothing": (-0.1, 1.0),
    "train.ema_decay": (-0.1, 1.0),
    "train.steps_per_dispatch": (-1,),
    "eval.batch_size": (0,),
    "checkpoint.every_seconds": (-1.0,),
}


def changed(**values):
    """The default config with options set before ConfigDict can check or convert their types."""
    options = default_config().to_dict()
    for key, value in values.items():
        section, _, name = key.rpartition("__")
        (options[section] if section else options)[name] = value
    return ConfigDict(options)


def with_option(key, value):
    return changed(**{key.replace(".", "__"): value})


def refusal(config):
    with pytest.raises(InputError) as caught:
        validate(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_default_is_valid():
    validate(default_config())


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.name)
def test_every_config_file_is_valid(path):
    module = importlib.import_module(f"configs.{path.stem}")
    validate(module.get_config())
    assert f"--config=configs/{path.name}" in module.__doc__, "it opens with its command"


def test_an_unknown_model_is_refused_by_name():
    with pytest.raises(InputError, match=r"'vgg19'.*alexnet"):
        default_config("vgg19")
    assert "'vgg19'" in refusal(with_option("model.name", "vgg19"))


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("optimizer.lerning_rate", "did you mean config.optimizer.learning_rate?"),
        ("optimzer.learning_rate", "did you mean config.optimizer.learning_rate?"),
        ("train.learning_rate", "did you mean config.optimizer.learning_rate?"),
        ("learning_rate", "did you mean config.optimizer.learning_rate?"),
        ("model.naem", "did you mean config.model.name?"),
        ("optimizer.lr", "did you mean config.optimizer.learning_rate?"),
        ("lr", "did you mean config.optimizer.learning_rate?"),
        ("train.wd", "did you mean config.optimizer.weight_decay?"),
        ("train.bs", "did you mean config.train.batch_size?"),
        ("bs", "did you mean config.train.batch_size or config.eval.batch_size?"),
        ("epochs", "did you mean config.train.epochs?"),
        ("num_epochs", "did you mean config.train.epochs"),
        ("train.ema", "did you mean config.train.ema_decay?"),
        ("optimizer.beta1", "did you mean config.optimizer.b1?"),
        ("optimizer.nonsense", "the options of optimizer are name, learning_rate"),
        ("nonsense", "the sections are data, augment"),
        ("nonsense.nonsense", "the sections are data, augment"),
    ],
)
def test_an_unknown_key_names_what_was_meant(key, hint):
    assert unknown_option(key, DECLARED).startswith(f"unknown option config.{key}; {hint}")


def test_an_unknown_key_is_refused():
    assert "unknown option config.optimizer.lr" in refusal(changed(optimizer__lr=0.1))
    assert "unknown option config.lr" in refusal(changed(lr=0.1))
    with pytest.raises(AttributeError):
        default_config().optimizer.lr = 0.1


def test_a_missing_key_is_refused():
    config = changed()
    del config.train.epochs
    assert refusal(config) == "config.train.epochs is missing; its default is 20."
    assert "config.model.name is None" in refusal(ConfigDict({"seed": 0}))
    assert "config.model.name is None" in refusal(ConfigDict({"model": 3}))


@pytest.mark.parametrize(
    ("key", "value", "wrong", "right"),
    [
        ("train.epochs", "20", "'20', a str", "an int such as 20"),
        ("train.epochs", True, "True, a bool", "an int"),
        ("train.epochs", 2.0, "2.0, a float", "an int"),
        ("augment.flip", 1, "1, an int", "a bool"),
        ("data.name", 10, "10, an int", "a str such as 'cifar10'"),
        ("data.name", None, "None, a NoneType", "a str"),
        ("optimizer.learning_rate", "1e-3", "'1e-3', a str", "a float such as 0.001"),
        ("optimizer.learning_rate", True, "True, a bool", "a float"),
        ("model.hidden", 4096, "4096, an int", "a tuple"),
        ("model.hidden", [4096], "[4096], a list", "a tuple"),
    ],
)
def test_a_wrong_type_is_refused(key, value, wrong, right):
    message = refusal(with_option(key, value))
    assert message.startswith(f"config.{key} is {wrong}; it must be {right}")


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        ((8, 8, "8", 8, 8), "[2] is '8', a str"),
        ((8, 8, 8, 8, 8.0), "[4] is 8.0, a float"),
        ((1, True, 1, 1, 1), "[1] is True, a bool"),  # though True == 1, which is the first
    ],
)
def test_a_wrong_type_in_a_tuple_is_refused_with_its_place(value, wrong):
    assert refusal(with_option("model.features", value)).startswith(f"config.model.features{wrong}")


@pytest.mark.parametrize(
    ("key", "value"),
    [("optimizer.learning_rate", 1), ("checkpoint.every_seconds", 60), ("model.hidden", ())],
)
def test_an_int_is_a_float_and_a_tuple_may_be_empty(key, value):
    validate(with_option(key, value))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", [k for k, v in DEFAULTS.items() if type(v) is float])
def test_only_finite_numbers(key, value):
    assert f"config.{key} is {value}; it must be a finite number" in refusal(
        with_option(key, value)
    )


def test_every_rule_is_tested():
    ranged = {key for key, declared in declared_options().items() if declared.allowed}
    assert ranged == IMPOSSIBLE.keys()
    assert set(DEFAULTS) >= RESUMABLE


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in IMPOSSIBLE.items() for value in values]
)
def test_an_impossible_value_is_refused(key, value):
    right = DECLARED[key].allowed
    which = "each of its items" if isinstance(value, tuple) else "it"
    assert (
        refusal(with_option(key, value)) == f"config.{key} is {value!r}; {which} must be {right}."
    )


def test_every_number_has_a_rule():
    """An option without one would be found wrong only when the run has begun."""
    numbers = {key for key, declared in DECLARED.items() if declared.type in (int, float)}
    without = {key for key in numbers if not DECLARED[key].allowed}
    assert not without


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({"optimizer__weight_decay": 0.1}, ("optimizer.weight_decay", "optimizer.name", "adamw")),
        ({"optimizer__warmup_epochs": 20.5}, ("optimizer.warmup_epochs", "train.epochs, 20")),
        (
            {"eval__tta": "ten_crop", "augment__crop_padding": 0},
            ("eval.tta", "augment.crop_padding and config.data.crop_size are 0"),
        ),
        (
            {"eval__test": False, "data__validation_fraction": 0.0},
            ("eval.test is False", "data.validation_fraction is 0"),
        ),
        (
            {"augment__flip": False, "augment__alternating_flip": True},
            ("augment.alternating_flip", "augment.flip is False"),
        ),
        ({"augment__crop_padding": 32}, ("augment.crop_padding", "data.image_size, 32")),
        (
            {"augment__crop_padding": 24, "data__crop_size": 24},
            ("augment.crop_padding", "data.crop_size, 24"),
        ),
        ({"data__crop_size": 33}, ("data.crop_size", "data.image_size, 32")),
        (
            {"optimizer__muon_normalize_filters": True},
            ("muon_normalize_filters", "muon_learning_rate is 0"),
        ),
        (
            {"optimizer__muon_normalize_filters": True, "optimizer__muon_learning_rate": 0.1},
            ("muon_normalize_filters", "model.norm is 'none'", "'batch'"),
        ),
        ({"optimizer__lookahead_power": 3.0}, ("lookahead_power is 3.0", "lookahead_period is 0")),
        ({"augment__cutout": 32}, ("augment.cutout is 32", "less than", "32")),
        (
            {"optimizer__schedule": "plateau", "data__validation_fraction": 0.0},
            ("optimizer.schedule", "data.validation_fraction"),
        ),
    ],
)
def test_impossible_together_though_possible_alone(options, keys):
    message = refusal(changed(**options))
    assert all(key in message for key in keys)


def test_possible_together():
    validate(changed(optimizer__weight_decay=0.1, optimizer__name="adamw"))
    validate(changed(optimizer__weight_decay=0.1, optimizer__name="sgd"))
    validate(changed(optimizer__warmup_epochs=20.0, augment__crop_padding=31))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("model.dropout", 1.5, "config.model.dropout is 1.5; it must be at least 0"),
        ("model.strides", (1, 1), r"config.model.strides is (1, 1); it must have one entry per"),
        (
            "model.hidden",
            (0,),
            "config.model.hidden is (0,); each of its items must be between 1 and 65536",
        ),
        ("model.norm", "layer", "config.model.norm is 'layer'; it must be one of none, batch"),
        ("model.pool_window", 9, "images of 32x32 pixels are too small for this network"),
        ("model.strides", (4, 4, 4, 1, 1), "images of 32x32 pixels are too small"),
        ("model.hidden", (65536,) * 3, "config.model describes a network of 8,"),
    ],
)
def test_the_network_refuses_its_own_options(key, value, says):
    assert refusal(with_option(key, value)).startswith(says)


def test_advice_is_of_the_options_that_the_network_has():
    config = default_config("resnet")
    config.model.width = 65536
    message = refusal(config)
    assert message.endswith("make its layers narrower.")


def test_small_images_are_refused():
    config = changed(data__image_size=8, model__pools=(True, True, True, True, True))
    assert refusal(config).startswith("images of 8x8 pixels are too small")


class Reads(ast.NodeVisitor):
    """Collects the options that a module reads: attributes of what is typed as a section."""

    types: ClassVar = {cls.__name__: name for name, cls in SECTIONS.items()}
    networks: ClassVar = {cls.__name__ for cls in MODELS.values()}

    def __init__(self):
        self.scope, self.found = {}, set()

    def section(self, node):
        """The section that an expression is; "" for the config itself, None for anything else."""
        if (name := ast.unparse(node)) in self.scope:
            return self.scope[name]
        if not isinstance(node, ast.Attribute):
            return None
        if self.section(node.value) == "":
            return node.attr if node.attr in SECTIONS else None
        return "" if node.attr == "config" else None

    def visit_ClassDef(self, node):
        before = self.scope
        fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
        typed = {f"self.{ast.unparse(each.target)}": each.annotation for each in fields}
        self.scope = before | {name: self.types.get(ast.unparse(typed[name])) for name in typed}
        if node.name in self.networks:
            self.scope["self"] = "model"
        self.generic_visit(node)
        self.scope = before

    def visit_FunctionDef(self, node):
        if node.name == "__post_init__":  # checks what it reads, and no more
            return
        before = self.scope
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        typed = {each.arg: ast.unparse(each.annotation) for each in arguments if each.annotation}
        self.scope = before | {name: self.types.get(kind) for name, kind in typed.items()}
        self.generic_visit(node)
        self.scope = before

    def visit_Assign(self, node):
        self.generic_visit(node)
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = zip(target.elts, node.value.elts, strict=True)
            for name, value in pairs:
                if isinstance(name, ast.Name):
                    self.scope[name.id] = self.section(value)

    def visit_Attribute(self, node):
        self.generic_visit(node)
        section = self.section(node.value)
        if section is not None:
            self.found.add(f"{section}.{node.attr}".lstrip("."))

    def visit_Subscript(self, node):
        self.generic_visit(node)
        if isinstance(node.value, ast.Attribute) and node.value.attr == "fields":
            self.found.add(f"model.{getattr(node.slice, 'value', '')}")


def test_every_option_is_read_somewhere():
    """A dead option lies. Its own declaration and check do not count."""
    reads = set()
    for path in sorted((ROOT / "alexnet_jax").rglob("*.py")):
        if path.name not in ("config.py", "options.py"):
            visitor = Reads()
            visitor.visit(ast.parse(path.read_text()))
            reads |= visitor.found
    declared = set().union(*(declared_options(name) for name in MODELS))
    assert declared - reads == set()


@pytest.mark.parametrize(
    ("source", "reads"),
    [
        ("def f(config: Config):\n    return config.train.epochs", {"train.epochs", "train"}),
        ("def f(c: TrainConfig):\n    return c.epochs", {"train.epochs"}),
        ("def f(config):\n    return config.epochs, config.train.epochs", set()),
        ("def f(c: Config):\n    a, b = c.data, c.seed\n    a.name", {"data", "data.name", "seed"}),
        ("class ResNet:\n    def f(self):\n        return self.width", {"model.width"}),
        ("class C:\n    c: TrainConfig\n    def f(self):\n        self.c.epochs", {"train.epochs"}),
        ("class ResNet:\n    def __post_init__(self):\n        self.width", set()),
    ],
)
def test_what_counts_as_a_read(source, reads):
    visitor = Reads()
    visitor.visit(ast.parse(source))
    assert visitor.found == reads


def test_the_page_of_options_is_up_to_date():
    page = runpy.run_path(str(ROOT / "scripts" / "options.py"))["page"]
    assert (ROOT / "docs" / "options.md").read_text() == page(), "run: python scripts/options.py"
