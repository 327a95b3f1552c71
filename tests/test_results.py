"""The table of results: statistics by hand, runs that are no use, and what each row names."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

from alexnet_jax.config import default_config, flatten
from alexnet_jax.errors import InputError
from alexnet_jax.results import BEGIN, END, command, confidence, group, read_run, table

ROOT = Path(__file__).parents[1]


def program(folder, name):
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_run(folder, accuracies, *, config=None, seed=0, views=(), **results):
    """A run folder with what a finished run leaves, without the run."""
    config = config or program("configs", "cifar10_classic").get_config()
    config.seed, config.num_seeds = seed, len(accuracies)
    folder.mkdir()

    def measured(values):
        found = {"loss": 1.0, "accuracy": float(np.mean(values))}
        return found | ({"accuracy_each": list(values)} if len(values) > 1 else {})

    content = {
        "step": 7020,
        "epochs": 20,
        "train_seconds": 100.0 * len(accuracies),
        "parameters": 35_855_178,
        "flops": 4e8,
        "devices": "1 x cpu",
        "seeds": [seed + i for i in range(len(accuracies))],
        "test": measured(accuracies),
    }
    if views:
        content["test_tta"] = measured(views)
    dataset = {
        "name": "cifar10_jpeg",
        "images": {"train": 45_000, "validation": 5_000, "test": 10_000},
        "checksums": {"train": "a", "test": "b"},
    }
    for name, value in (
        ("config.json", dict(flatten(config))),
        ("dataset.json", dataset),
        ("results.json", content | results),
    ):
        (folder / name).write_text(json.dumps(value))
    return folder


def rows(text):
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return lines[0], lines[2:]


def test_confidence_agrees_with_the_table_of_student():
    values = [0.80, 0.82, 0.84]
    # t of 0.975 with 2 degrees of freedom is 4.303; the deviation is 0.02.
    assert confidence(values) == pytest.approx(4.303 * 0.02 / 3**0.5, rel=1e-4)
    assert np.isnan(confidence([0.8]))


def test_runs_of_one_kind_make_one_row(tmp_path):
    several = make_run(tmp_path / "several", (0.80, 0.82), views=(0.81, 0.85))
    single = make_run(tmp_path / "single", (0.84,), seed=2, views=(0.86,))
    other = default_config()
    alone = make_run(tmp_path / "alone", (0.9,), config=other)
    groups = group([read_run(folder) for folder in (several, alone, single)])
    assert [[run.folder.name for run in members] for members in groups] == [
        ["several", "single"],
        ["alone"],
    ]
    text = table(groups, ["classic", "default"])
    header, (first, second) = rows(text)
    found = dict(zip(header, first, strict=True))
    assert first[:4] == ["classic", "82.00", "2.00", "77.03 - 86.97"]
    assert first[4:6] == ["84.00", "2.65"]
    assert found["seeds"] == "3"
    assert found["training (s)"] == "100"
    assert found["images/s"] == f"{351 * 128 * 20 / 100:,.0f}"
    assert (found["parameters (M)"], found["MFLOPs"]) == ("35.86", "400")
    assert second[:6] == ["default", "90.00", "-", "-", "-", "-"]
    assert (
        "cifar10_jpeg, trained on 45,000 images, tested on 10,000; 1 x cpu; seeds 0, 1, 2" in text
    )


def test_the_average_of_the_weights_is_what_counts(tmp_path):
    averaged = {"test_ema": {"loss": 1.0, "accuracy": 0.91}}
    run = read_run(make_run(tmp_path / "run", (0.9,), **averaged))
    assert run.accuracies() == [0.91]


def test_the_command_names_the_nearest_config_and_what_differs(tmp_path):
    config = program("configs", "cifar10_classic").get_config()
    config.train.epochs = 3
    config.model.features = (8, 8, 8, 8, 8)
    config.augment.flip = False
    config.data.workers = 7  # free to change, and so not named
    run = read_run(make_run(tmp_path / "run", (0.9,), config=config, seed=4))
    assert command(run) == (
        "python -m alexnet_jax.main --config=configs/cifar10_classic.py --noconfig.augment.flip "
        '--config.model.features="(8,8,8,8,8)" --config.train.epochs=3'
    )


def test_a_seed_that_comes_twice_is_refused(tmp_path):
    one = make_run(tmp_path / "one", (0.8, 0.9), seed=3)
    other = make_run(tmp_path / "other", (0.9,), seed=4)
    with pytest.raises(InputError, match=r"one and .*other are the same run .*, 4; name one"):
        group([read_run(one), read_run(other)])


def test_what_is_no_finished_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="is no run folder"):
        read_run(tmp_path)
    folder = make_run(tmp_path / "run", (0.9,))
    (folder / "results.json").unlink()
    with pytest.raises(InputError, match="is not finished; give its command again"):
        read_run(folder)


def test_the_program_prints_the_table_and_puts_it_into_a_file(tmp_path, capsys):
    main = program("scripts", "results").main
    run, page = make_run(tmp_path / "run", (0.9,)), tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert main([str(run), f"--into={page}"]) == 0
    printed = capsys.readouterr().out
    assert page.read_text() == f"before\n{BEGIN}\n{printed}{END}\nafter\n"
    page.write_text("no marks")
    assert main([str(run), f"--into={page}"]) == 2
    assert re.match(r"error: .*page\.md has no lines", capsys.readouterr().err)
    assert page.read_text() == "no marks"


def test_the_ablation_leads_from_classic_to_best():
    ablation = program("configs", "ablation")
    first, last = (
        dict(flatten(ablation.get_config(row))) for row in ("0", str(len(ablation.STEPS) - 1))
    )
    classic, best = (
        dict(flatten(program("configs", name).get_config()))
        for name in ("cifar10_classic", "cifar10_best")
    )
    assert first == classic | {"test.views": "flip_translate"}
    assert last == best
    for row in range(1, len(ablation.STEPS)):
        assert ablation.get_config(str(row)) != ablation.get_config(str(row - 1))


def test_the_ablation_runs_its_rows_in_turn_and_stops_where_one_does(tmp_path, capsys, monkeypatch):
    module, called = program("scripts", "ablation"), []

    class Ended:
        returncode = 0

    def run(arguments):
        called.append(arguments[1:])
        folder = Path(arguments[4].removeprefix("--workdir="))
        if Ended.returncode == 0:
            make_run(folder, (0.8, 0.9))
        return Ended

    monkeypatch.setattr(module.subprocess, "run", run)
    tmp_path /= "runs"
    tmp_path.mkdir()
    flags = ["--rows=0,2", "--num_seeds=2", f"--workdir={tmp_path}"]
    assert module.main([*flags, "--", "--config.data.name=x"]) == 0
    assert [a[2].rpartition(":")[2] for a in called] == ["0", "2"]
    assert called[0][3:] == [
        f"--workdir={tmp_path / '00-classic'}",
        "--config.num_seeds=2",
        "--config.data.name=x",
    ]
    assert "| 00-classic | 85.00 |" in capsys.readouterr().out
    Ended.returncode = 75
    assert module.main(flags) == 75
    assert len(called) == 3
    assert module.main(["--rows=99"]) == 2
    assert "--rows=99 must be numbers between 0 and" in capsys.readouterr().err
