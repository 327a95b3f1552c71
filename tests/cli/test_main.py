"""The command line: each way to get it wrong is one sentence, exit code 2, and nothing on disk."""

import json
import subprocess
import sys

import pytest
from forking import ROOT, answering

FILES = {
    "no_function.py": "x = 1\n",
    "returns_nothing.py": "def get_config():\n    pass\n",
    "syntax.py": "def get_config(:\n",
    "text.txt": "hello world\n",
    "raises.py": "def get_config():\n    raise KeyError('of mine')\n",
    "reads.py": "open('/no/such/file')\n",
    "imports.py": "import no_such_module\n",
    "exits.py": "raise SystemExit(0)\n",
    "typo.py": (
        "from alexnet_jax.config import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        "    config.optimizer.lr = 1\n"
        "    return config\n"
    ),
    "lenet.py": (
        "from alexnet_jax.config import default_config\n"
        "def get_config():\n    return default_config('lenet')\n"
    ),
}

GIVEN = "--config=configs/digits.py"
EXAMPLES = "name a config file, or one of ablation, cifar10,"
LACKS = "has no function get_config() that returns a ConfigDict"

# Command line and what its sentence must contain.
BAD = [
    ([], "--config is missing; " + EXAMPLES),
    (["configs/digits.py"], "--config is missing"),
    (["--config.train.epochs=3"], "--config is missing"),
    (["--config"], "--config is missing"),
    (["--config=nowhere.py"], "--config=nowhere.py is not a file; " + EXAMPLES),
    (["--config", "nowhere.py"], "--config=nowhere.py is not a file; " + EXAMPLES),
    (["--config="], "--config= is not a file"),
    (["--config=configs"], "--config=configs is not a file"),
    (["--config", "configs"], "--config=configs is not a file"),
    ([GIVEN, GIVEN], "--config is given twice"),
    ([GIVEN + ":x"], "configs/digits.py:x cannot be used: TypeError: get_config() takes 0"),
    (["--config=no_function.py"], f"no_function.py {LACKS}"),
    (["--config", "no_function.py", "--config.seed=1"], f"no_function.py {LACKS}"),
    (["--config=returns_nothing.py"], f"returns_nothing.py {LACKS}"),
    (["--config=syntax.py"], "syntax.py cannot be used: SyntaxError"),
    (["--config=text.txt"], "text.txt cannot be used: SyntaxError"),
    (["--config=raises.py"], "raises.py, line 2, cannot be used: KeyError: 'of mine'"),
    (["--config=reads.py"], "reads.py, line 1, cannot be used: FileNotFoundError"),
    (["--config=imports.py"], "imports.py, line 1, cannot be used: ModuleNotFoundError"),
    (["--config=exits.py"], "exits.py, line 1, cannot be used: SystemExit"),
    (["--config=typo.py"], "typo.py, line 4, cannot be used: AttributeError"),
    (["--config=lenet.py"], "lenet.py, line 3, cannot be used: config.model.name is 'lenet'"),
    (
        [GIVEN, "--config.optimzer.lr=1"],
        "unknown option config.optimzer.lr; did you mean",
    ),
    ([GIVEN, "-config.optimizer.lr", "1"], "did you mean config.optimizer.learning_rate?"),
    ([GIVEN, "--config.learning_rate=1"], "did you mean config.optimizer.learning_rate?"),
    (
        ["--config", GIVEN[9:], "--config.no.thing=1"],
        "unknown option config.no.thing; the sections are",
    ),
    ([GIVEN, "--noconfig.augment.flipp"], "did you mean config.augment.flip?"),
    ([GIVEN, "--config.model.features[0]=3"], "did you mean config.model.features?"),
    ([GIVEN, "--config.=1"], "unknown option config.; the sections are"),
    ([GIVEN, "--config.train=3"], "config.train is a section; set its options one by one"),
    ([GIVEN, "--config.train={'epochs':3}"], "such as --config.train.batch_size="),
    ([GIVEN, "--config.train.epochs=many"], "config.train.epochs is 'many', a str; it must be an"),
    ([GIVEN, "--config.train.epochs=1.5"], "it must be an int such as 20."),
    ([GIVEN, "--config.train.epochs="], "config.train.epochs is '', a str"),
    ([GIVEN, "--config.train.epochs"], "Missing value for flag --config.train.epochs"),
    ([GIVEN, "--noconfig.train.epochs"], "unknown option --noconfig.train.epochs"),
    ([GIVEN, "--config.augment.flip=maybe"], "config.augment.flip is 'maybe', a str; it must be a"),
    ([GIVEN, "--config.optimizer.learning_rate=nan"], "must be a finite number"),
    ([GIVEN, "--config.model.features=(1,"], "config.model.features is '(1,', a str; it must be"),
    ([GIVEN, "--config.model.features=a"], "config.model.features[0] is 'a', a str; it must be an"),
    ([GIVEN, "--config.model.features=3"], "config.model.kernels is (3, 3, 3, 3, 3); it must have"),
    ([GIVEN, "--config.model.dropout=1.5"], "config.model.dropout is 1.5; it must be at least 0"),
    (
        [GIVEN, "--config.model.name=lenet"],
        "config.model.name is 'lenet'; it must be one of alexnet",
    ),
    ([GIVEN, "stray"], "unknown argument 'stray'; options begin with --."),
    (["stray", GIVEN], "unknown argument 'stray'; options begin with --."),
    ([GIVEN, "--", "stray"], "unknown argument 'stray'"),
    ([GIVEN, "--stray"], "unknown option --stray; --help lists the options."),
    ([GIVEN, "--epochs=3"], "unknown option --epochs; did you mean --config.train.epochs?"),
    ([GIVEN, "--workdr=x"], "unknown option --workdr; did you mean --workdir?"),
    ([GIVEN, "--workdir"], "Missing value for flag --workdir"),
    ([GIVEN, "--workdir="], "--workdir is empty"),
    ([GIVEN, "--coordinator=a:1"], "go together, and there is only --coordinator; give all three"),
    ([GIVEN, "--num_processes=many"], "flag --num_processes=many: invalid literal for int()"),
    ([GIVEN, "--process_ids=1"], "unknown option --process_ids; did you mean --process_id?"),
    (["--config=nowhere.py", "--help"], "--config=nowhere.py is not a file"),
]

# Command line and what the run is given, beside what the config file says.
GOOD = [
    ([GIVEN], {"workdir": "runs/digits", "data.name": "digits"}),
    (["--config", "configs/digits.py"], {"workdir": "runs/digits", "data.name": "digits"}),
    (["-config", "./configs/cifar10.py"], {"workdir": "runs/cifar10", "data.name": "cifar10"}),
    ([GIVEN, "--workdir=some/where"], {"workdir": "some/where"}),
    (["--workdir", "some/where", GIVEN], {"workdir": "some/where"}),
    ([GIVEN, "--config.model.features=(8,8,8,8,8)"], {"model.features": [8, 8, 8, 8, 8]}),
    ([GIVEN, "--config.model.hidden", "(8,)"], {"model.hidden": [8]}),
    ([GIVEN, "--config.model.hidden=8"], {"model.hidden": [8]}),
    ([GIVEN, "--config.train.epochs=3"], {"train.epochs": 3}),
    ([GIVEN, "--config.train.epochs", "3"], {"train.epochs": 3}),
    (["--config.train.epochs=3", GIVEN], {"train.epochs": 3}),
    (["--config=digits"], {"workdir": "runs/digits", "data.name": "digits"}),
    (["--config=ablation:3"], {"workdir": "runs/ablation", "data.name": "cifar10"}),
    (
        [GIVEN, "--config.optimizer.lr_multipliers=(('norm*/bias',10.0),('conv*',0.1))"],
        {"optimizer.lr_multipliers": [["norm*/bias", 10.0], ["conv*", 0.1]]},
    ),
    ([GIVEN, "--config.train.epochs=3", "--config.train.epochs=4"], {"train.epochs": 4}),
    ([GIVEN, "--config.optimizer.learning_rate=1"], {"optimizer.learning_rate": 1.0}),
    ([GIVEN, "--config.augment.flip"], {"augment.flip": True}),
    ([GIVEN, "--config.augment.flip=true"], {"augment.flip": True}),
    ([GIVEN, "--noconfig.writers.tensorboard"], {"writers.tensorboard": False}),
    ([GIVEN, "--config.data.name=1"], {"data.name": "1"}),
    ([GIVEN, "--num_processes=1"], {"workdir": "runs/digits"}),
]

HELP = [["--help"], ["-h"], ["--helpfull"], [GIVEN, "--help"], [GIVEN, "--config.a=1", "--help"]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Exit code, standard output and standard error of each command line."""
    lines = [line for line, _ in BAD + GOOD] + HELP
    check = "alexnet_jax.config.validate"
    with answering(tmp_path_factory.mktemp("main"), FILES, check) as ask:
        return {tuple(line): ask(line) for line in lines}


@pytest.mark.parametrize(("line", "says"), BAD, ids=[" ".join(line) or "-" for line, _ in BAD])
def test_a_bad_command_line_is_one_sentence(outcomes, line, says):
    code, out, err = outcomes[tuple(line)]
    assert says in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert (code, out) == (2, "")


@pytest.mark.parametrize(("line", "given"), GOOD, ids=[" ".join(line) for line, _ in GOOD])
def test_a_good_command_line_reaches_the_run(outcomes, line, given):
    code, out, err = outcomes[tuple(line)]
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert {key: found[key] for key in given} == given


@pytest.mark.parametrize("line", HELP, ids=" ".join)
def test_help_shows_the_options_and_their_values(outcomes, line):
    code, out, err = outcomes[tuple(line)]
    assert (code, err) == (0, "")
    assert out.startswith("Trains a network: alexnet-jax train --config=")
    epochs = "  --config.data.name=" + ("digits" if GIVEN in line else "cifar10")
    assert epochs in out.splitlines()
    assert "  --workdir=FOLDER" in out
    assert "  --coordinator=HOST:PORT --num_processes=N --process_id=I" in out
    assert max(map(len, out.splitlines())) <= 100


def test_the_module_itself_runs(tmp_path):
    """The one real process; what comes before the flags are parsed must be quiet too."""
    done = subprocess.run(
        [sys.executable, "-m", "alexnet_jax.main", "--config=nowhere.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: --config=nowhere.py is not a file; name a config file,")
    assert list(tmp_path.iterdir()) == []
