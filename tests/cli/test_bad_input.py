"""Thousands of wrong options: each is one sentence, or a run that can really be built.

`pytest tests/cli/test_bad_input.py --hypothesis-profile=thousand` tries 1,000 of each kind.
"""

import ast
import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forking import ROOT, answering
from hypothesis import example, given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from alexnet_jax.config import default_config, flatten, input_size, validate
from alexnet_jax.data import augment
from alexnet_jax.errors import InputError
from alexnet_jax.models import create_model
from alexnet_jax.optim.optimizers import create_optimizer
from alexnet_jax.optim.schedules import create_schedule
from alexnet_jax.state import create_state
from alexnet_jax.steps import train_step

DEFAULTS = dict(flatten(default_config()))
KEYS = st.sampled_from(sorted(DEFAULTS))


def build(config, steps_per_epoch=7, num_classes=10):
    """Goes as far as a run can without computing: shapes and dtypes of a whole training step."""
    config = validate(config)
    model = create_model(config.model, num_classes)
    schedule = create_schedule(config.optimizer, steps_per_epoch, config.train.epochs)
    optimizer = create_optimizer(config.optimizer, schedule)
    size, batch = config.data.image_size, config.train.batch_size
    seen, crop_size = input_size(config.data), config.data.crop_size
    create = functools.partial(
        create_state, model, optimizer, (seen, seen, 3), config.seed, ema=config.train.ema_decay > 0
    )
    step = functools.partial(
        train_step,
        model=model,
        optimizer=optimizer,
        augment=augment.create_augment(config.augment, (0.5,) * 3, crop_size, np.eye(3).tolist()),
        normalize=augment.create_normalize((0.5,) * 3, (0.2,) * 3, crop_size),
        steps_per_epoch=steps_per_epoch,
        label_smoothing=config.train.label_smoothing,
        ema_decay=config.train.ema_decay,
    )
    before = jax.eval_shape(create)
    after, _ = jax.eval_shape(
        step,
        before,
        {
            "image": jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8),
            "label": jax.ShapeDtypeStruct((batch,), jnp.int32),
            "mask": jax.ShapeDtypeStruct((batch,), bool),
        },
    )
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, before)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(after.params))
    updates = steps_per_epoch * config.train.epochs // config.optimizer.accumulate_steps
    assert updates >= 1
    for update in {0, updates // 2, updates - 1}:
        rate = float(schedule(jnp.int32(update)))
        assert 0 <= rate <= np.float32(config.optimizer.learning_rate) * (1 + 1e-6), update


def check_sentence(error):
    message = str(error)
    assert message
    assert message.isprintable(), "one line, with nothing that moves a terminal's cursor"


# --- configs ------------------------------------------------------------------------------------

ODD_NUMBERS = st.sampled_from(
    [
        0,
        1,
        -1,
        2,
        3,
        2**31 - 1,
        2**31,
        2**32,
        2**63,
        10**30,
        10**400,
        True,
        False,
        0.0,
        -0.0,
        0.5,
        1.0,
        1 - 1e-12,
        1e-12,
        1e-40,
        1e-320,
        1e30,
        1e39,
        1e308,
        -0.5,
        float("nan"),
        float("inf"),
        float("-inf"),
        1j,
        np.float32(0.5),
        np.int64(3),
    ]
)
SCALARS = st.one_of(
    ODD_NUMBERS,
    st.integers(-5, 70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["sgd", "adamw", "step", "linear", "batch", "bfloat16", "lecun_normal"]),
    st.none(),
    st.binary(max_size=4),
)
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=6).map(tuple),
    st.lists(st.integers(-1, 9), min_size=5, max_size=5).map(tuple),
    st.lists(st.booleans(), min_size=5, max_size=5).map(tuple),
    st.lists(SCALARS, max_size=3),
    st.dictionaries(st.text("abc", min_size=1, max_size=3), SCALARS, max_size=2),
)


def near(default):
    """Values that are often right, so that many configs get as far as being built."""
    if type(default) is bool:
        return st.booleans()
    if type(default) is int:
        return st.integers(0, 40)
    if type(default) is float:
        return st.floats(0, 1) | st.integers(0, 2)
    if default == ():  # that of patterns and their factors
        return st.sampled_from([(), ("norm*/bias",), (64.0,)])
    if type(default) is tuple:
        items = near(default[0])
        return st.lists(items, min_size=len(default), max_size=len(default)).map(tuple)
    return st.sampled_from(sorted({str(value) for value in DEFAULTS.values()} | {"sgd", "batch"}))


@st.composite
def mutations(draw):
    """A list of (action, key, value) to be done to the options of a config."""
    found = []
    for _ in range(draw(st.integers(1, 5))):
        key = draw(KEYS)
        action = draw(st.sampled_from(["near", "near", "near", "set", "delete", "add", "section"]))
        if action == "near":
            found.append(("set", key, draw(near(DEFAULTS[key]))))
        elif action == "add":
            found.append(("set", key + draw(st.text("abé_ \n", min_size=1, max_size=3)), 1))
        else:
            found.append((action, key, draw(VALUES)))
    return found


def mutated(changes):
    options = default_config().to_dict()
    for action, key, value in changes:
        section, _, name = key.rpartition(".")
        holder = options.get(section) if section else options
        if action == "section":
            options[section or name] = value
        elif isinstance(holder, dict) and action == "delete":
            holder.pop(name, None)
        elif isinstance(holder, dict):
            holder[name] = value
    return ConfigDict(options)


@given(mutations())
@example([("set", "model.name", ["alexnet"])])
@example([("set", "optimizer.learning_rate", 10**400)])
@example([("set", "optimizer.eps", 1e-50)])
@example([("set", "optimizer.b2", 1 - 1e-9)])
@example([("set", "model.features", (10**30,) * 5)])
@example([("set", "model.hidden", (65536, 65536))])
@example([("set", "train.epochs", 2**31 - 1)])
@example([("set", "optimizer.accumulate_steps", 2**31 - 1)])
@example([("set", "optimizer.schedule", "step"), ("set", "optimizer.step_epochs", (2**70,))])
@example([("set", "model.pools", (True,) * 5), ("set", "data.image_size", 16)])
def test_a_mutated_config_is_refused_or_can_be_built(changes):
    config = mutated(changes)
    try:
        build(config)
    except InputError as error:
        check_sentence(error)
    else:
        for key, value in flatten(config):
            default = DEFAULTS[key]
            assert type(value) in ((int, float) if type(default) is float else (type(default),))


# --- command lines ------------------------------------------------------------------------------

CONFIG_FILES = {
    "good.py": "from configs.digits import get_config\n",
    "syntax.py": "def get_config(:\n",
    "bytes.py": "x = '\0'\n",
    "raises.py": "def get_config():\n    raise KeyError('a\\nb\\x1b[31m')\n",
    "exits.py": "raise SystemExit(0)\n",
    "recursion.py": "def get_config():\n    return get_config()\n",
    "number.py": "def get_config():\n    return 3\n",
    "empty_dict.py": (
        "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict()\n"
    ),
    "placeholder.py": (
        "from ml_collections import config_dict\n"
        "from alexnet_jax.config import default_config\n"
        "def get_config():\n"
        "    config = default_config().unlock()\n"
        "    config.seed = config_dict.required_placeholder(int)\n"
        "    return config\n"
    ),
    "frozen.py": (
        "from ml_collections import FrozenConfigDict\n"
        "from configs.digits import get_config as digits\n"
        "def get_config():\n    return FrozenConfigDict(digits())\n"
    ),
    "flags.txt": "--config.seed=3\n--nonsense=1\n",
    "naïve name.py": "from configs.digits import get_config\n",
}


@pytest.fixture(scope="module")
def answer(tmp_path_factory):
    """Asks for exit code, standard output and standard error of a command line."""
    folder = tmp_path_factory.mktemp("bad_input")
    with answering(folder, CONFIG_FILES, "test_bad_input.build") as ask:
        yield ask


# What a shell can hand over: anything but the null character, bytes that are no UTF-8 included.
ARGUMENT = st.text(
    st.characters(exclude_characters="\0", exclude_categories=("Cs",))
    | st.sampled_from("\udc80\udcff=-.,()[]{}'\"#:\\\n\t "),
    max_size=12,
)
FILES = st.sampled_from(
    [
        *CONFIG_FILES,
        "configs/digits.py",
        "configs/cifar10.py",
        "configs",
        "nowhere.py",
        "",
        "/dev/null",
        "/proc/self/mem",
        "x" * 300,
        "configs/digits.py:x",
        "~/x.py",
        "\udc80.py",
    ]
)
ODD_TEXTS = st.sampled_from(
    [
        "",
        "0",
        "-1",
        "1e400",
        "nan",
        "inf",
        "-inf",
        "1e-400",
        "0x10",
        "1_0",
        "9" * 5000,
        "None",
        "(1,",
        "(",
        ")",
        "()",
        "[]",
        "(1,2,3,4,5)",
        "(1.5,2)",
        "('a',)",
        "((1,),)",
        "{}",
        "1,2",
        "(" * 300,
        "__import__('os').mkdir('pwned')",
        "(__import__('os').mkdir('pwned'),)",
        "@file",
        "$(mkdir pwned)",
        "--config.seed=1",
        "٣",
        "True",
        "yes",
        "adamw",
        "step",
        "batch",
    ]
)


def misspelt(key, position, letter):
    return key[: position % (len(key) + 1)] + letter + key[position % (len(key) + 1) + 1 :]


WRONG_KEYS = st.builds(misspelt, KEYS, st.integers(0, 40), st.text("abé_.[]0= ", max_size=2))


@st.composite
def options(draw):
    """One or two arguments that set something, in any of the forms that absl takes."""
    kind = draw(st.sampled_from(["right", "right", "odd", "odd", "misspelt", "other", "text"]))
    if kind == "text":
        return [draw(ARGUMENT)]
    if kind == "other":
        return [
            draw(
                st.sampled_from(
                    [
                        "--workdir=",
                        "--workdir=a",
                        "--workdir",
                        "--wokrdir=a",
                        "--noworkdir",
                        "--",
                        "-",
                        "---",
                        "--=",
                        "--flagfile=flags.txt",
                        "--flagfile",
                        "--flagfile=no.txt",
                        "--undefok=config.nonsense",
                        "--config.nonsense=1",
                        "--noconfig",
                        "--v=x",
                        "--config.",
                        "--config.model",
                        "--noconfig.seed",
                        "--verbosity=1",
                        "-v=1",
                    ]
                )
            )
        ]
    key = draw(WRONG_KEYS if kind == "misspelt" else KEYS)
    if kind == "right" and key in DEFAULTS:
        value = str(draw(near(DEFAULTS[key])))
    else:
        value = draw(st.one_of(ODD_TEXTS, ODD_NUMBERS.filter(small).map(str), ARGUMENT))
    form = draw(st.sampled_from(["--{}={}", "--{}={}", "-{}={}", "--no{}", "--{}", "two"]))
    name = f"config.{key}"
    return [f"--{name}", value] if form == "two" else [form.format(name, value)]


def small(number):
    return abs(number) < 1e100 if isinstance(number, int) else True


@st.composite
def command_lines(draw):
    file = draw(st.just("good.py") | st.just("good.py") | FILES)
    arguments = [[f"--config={file}"] if draw(st.booleans()) else ["--config", file]]
    arguments += draw(st.lists(options(), max_size=4))
    if draw(st.integers(0, 9)) == 0:
        arguments.append(arguments[0])
    if draw(st.integers(0, 9)) == 0:
        arguments = draw(st.permutations(arguments))
    return [part for parts in arguments for part in parts]


READERS = {
    int: int,
    float: float,
    str: str,
    bool: lambda text: text.lower() in ("true", "t", "1", "yes"),
    tuple: lambda text: list(ast.literal_eval(text)),  # As JSON gives it back.
}


def check_answer(arguments, code, out, err):
    assert "Traceback" not in err
    if code == 0 and out.startswith("Trains a network"):
        assert any(word.lstrip("-").startswith(("h", "?")) for word in arguments)
    elif code == 0:
        assert err == ""
        found = json.loads(out)
        settings = [word.removeprefix("--config.").split("=", 1) for word in arguments]
        if all(len(pair) == 2 and pair[0] in {*DEFAULTS, "--config"} for pair in settings):
            for key, value in dict(settings[1:]).items():  # The last of several counts.
                assert found[key] == READERS[type(DEFAULTS[key])](value), key
    else:
        assert (code, out) == (2, ""), (code, out, err)
        assert err.startswith("error: ")
        check_sentence(err.removesuffix("\n"))


@given(command_lines())
@example(["--config=good.py", "--flagfile=flags.txt"])
@example(["--config=good.py", "--flagfile=no.txt"])
@example(["--config=good.py", f"--config.model.features={'(' * 300}"])
@example(["--config=good.py", "--config.seed=" + "9" * 5000])
@example(["--config=placeholder.py"])
@example(["--config=frozen.py", "--config.seed=1"])
@example(["--config=" + "x" * 300])
def test_a_mutated_command_line_is_refused_or_can_be_run(answer, arguments):
    check_answer(arguments, *answer(arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "alexnet_jax.main", f"--config={'x' * 300}"],
        ["-m", "alexnet_jax.main", "--config=configs/digits.py", "--config.optimizer.eps=1e-50"],
        ["-m", "alexnet_jax.main", "--config=configs/digits.py", f"--config.seed={'9' * 5000}"],
        ["-m", "alexnet_jax.cli", "prepare", "~nobody_of_this_name/images"],
        ["-m", "alexnet_jax.cli", "prepare", "x" * 300],
    ],
    ids=lambda arguments: " ".join(arguments)[:60],
)
def test_what_was_found_end_to_end(arguments, tmp_path):
    if "eps" in arguments[-1]:
        arguments = [*arguments, f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    check_sentence(done.stderr.removesuffix("\n"))
    assert list(tmp_path.iterdir()) == []
