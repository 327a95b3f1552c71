"""The table of results: statistics by hand, runs that are no use, and what each row names."""

import importlib
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from alexnet_jax.config import default_config, flatten
from alexnet_jax.errors import InputError
from alexnet_jax.experiments import compare, launch
from alexnet_jax.experiments.aggregate import command, confidence, group, read_run, table
from alexnet_jax.experiments.report import statistics
from alexnet_jax.plots import curves as plots
from alexnet_jax.run import writers

ROOT = Path(__file__).parents[2]


def program(folder, name):
    return importlib.import_module(f"{folder}.{name}")


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
        "devices": "2 cores of a CPU",
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
    assert found["an epoch (s)"] == "5"
    assert found["images/s"] == f"{351 * 128 * 20 / 100:,.0f}"
    assert (found["parameters (M)"], found["MFLOPs"]) == ("35.86", "400")
    assert second[:6] == ["default", "90.00", "-", "-", "-", "-"]
    assert "cifar10_jpeg, trained on 45,000 images, tested on 10,000; seeds 0, 1, 2 on 2 c" in text


def test_times_are_of_one_hardware(tmp_path):
    runs = [
        make_run(tmp_path / f"{seed}", (0.8,), seed=seed, train_seconds=seconds, devices=hardware)
        for seed, (seconds, hardware) in enumerate(
            [(100, "2 cores"), (200, "1 core"), (120, "2 cores")]
        )
    ]
    text = table(group([read_run(folder) for folder in runs]), ["mixed"])
    header, (row,) = rows(text)
    found = dict(zip(header, row, strict=True))
    assert (found["seeds"], found["training (s)"], found["an epoch (s)"]) == ("3", "110", "6")
    assert found["images/s"] == f"{351 * 128 * 20 / 110:,.0f}"
    assert "; seeds 0, 2 on 2 cores; seed 1 on 1 core." in text


def test_records_of_many_seeds_come_apart():
    train = {"split": "train", "epoch": 1.0, "loss": 2.0}
    both = {"split": "validation", "epoch": 1.0, "loss": 1.5, "loss_each": [1.0, 2.0]}
    assert statistics.by_seed([train, both | {"loss_deviation": 0.7}]) == [
        [train, {"split": "validation", "epoch": 1.0, "loss": 1.0, "loss_deviation": 0.7}],
        [train, {"split": "validation", "epoch": 1.0, "loss": 2.0, "loss_deviation": 0.7}],
    ]
    assert statistics.by_seed([train]) == [[train]]


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
    assert command(run, "three") == (
        "alexnet-jax train --config=cifar10_classic --noconfig.augment.flip "
        '--config.model.features="(8,8,8,8,8)" --config.train.epochs=3 '
        "--workdir=runs/three"
    )
    config = program("configs", "ablation").get_config("3")
    config.train.epochs = 5
    run = read_run(make_run(tmp_path / "row", (0.9,), config=config))
    assert command(run, "03-small") == (
        "alexnet-jax train --config=ablation:3 --config.train.epochs=5 --workdir=runs/03-small"
    )
    (tmp_path / "common.py").write_text("SHARED = 1")  # beside configs, and none itself
    assert "with options that no config file here has" in command(run, "three", tmp_path)


def test_a_seed_that_comes_twice_is_refused(tmp_path):
    one = make_run(tmp_path / "one", (0.8, 0.9), seed=3)
    other = make_run(tmp_path / "other", (0.9,), seed=4)
    with pytest.raises(InputError, match=r"one and .*other are the same run .*, 4; name one"):
        group([read_run(one), read_run(other)])


def test_an_option_that_is_newer_than_a_run_makes_no_other_row(tmp_path):
    old = make_run(tmp_path / "old", (0.8,))
    options = json.loads((old / "config.json").read_text())
    del options["augment.cutout"], options["model.pools"]
    (old / "config.json").write_text(json.dumps(options))
    new = make_run(tmp_path / "new", (0.9,), seed=1)
    assert len(group([read_run(old), read_run(new)])) == 1
    for folder in (old, new):
        dataset = json.loads((folder / "dataset.json").read_text())
        del dataset["checksums"]
        (folder / "dataset.json").write_text(json.dumps(dataset))
    assert len(group([read_run(old), read_run(new)])) == 1


def test_rows_of_one_name_do_not_replace_each_others_pictures(tmp_path, capsys):
    runs = [make_run(tmp_path / "best-0", (0.8,))]
    config = program("configs", "cifar10_classic").get_config()
    config.train.epochs = 3
    runs.append(make_run(tmp_path / "best-seed1", (0.9,), seed=1, config=config))
    pictures = tmp_path / "pictures"
    main = program("scripts", "results").main
    assert main([*map(str, runs), f"--pictures={pictures}"]) == 2
    assert "two rows are called 'best'" in capsys.readouterr().err
    assert not pictures.exists()


def test_what_is_no_finished_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not a run folder"):
        read_run(tmp_path)
    folder = make_run(tmp_path / "run", (0.9,))
    (folder / "results.json").unlink()
    with pytest.raises(InputError, match="is not finished; rerun its command"):
        read_run(folder)


def test_rows_that_no_column_is_right_for_are_refused(tmp_path):
    tested = make_run(tmp_path / "tested", (0.9,))
    untested = make_run(tmp_path / "untested", (0.9,), validation={"loss": 1.0, "accuracy": 0.8})
    results = json.loads((untested / "results.json").read_text())
    del results["test"]
    (untested / "results.json").write_text(json.dumps(results))
    runs = [read_run(untested), read_run(tested)]
    assert rows(table([runs[:1]], ["a"]))[1][0][1] == "80.00"
    with pytest.raises(InputError, match=r"untested was not .* and .*/tested not on validation"):
        table([[run] for run in runs], ["a", "b"])


def test_the_program_prints_the_table_and_puts_it_into_a_file(tmp_path, capsys):
    results = program("scripts", "results")
    main = results.main
    run, page = make_run(tmp_path / "run", (0.9,)), tmp_path / "page.md"
    page.write_text(f"before\n{results.BEGIN}\nold\n{results.END}\nafter\n")
    assert main([str(run), f"--into={page}"]) == 0
    printed = capsys.readouterr().out
    assert page.read_text() == f"before\n{results.BEGIN}\n{printed}{results.END}\nafter\n"
    page.write_text("no marks")
    assert main([str(run), f"--into={page}"]) == 2
    assert re.match(r"error: .*page\.md has no lines", capsys.readouterr().err)
    assert page.read_text() == "no marks"


def test_each_row_is_shown_with_its_pictures_and_classes(tmp_path, capsys):
    results = program("scripts", "results")
    main = results.main
    runs = []
    for seed, confusion in enumerate(([[9, 1], [2, 8]], [[7, 3], [0, 10]])):
        test = {"loss": 1.0, "accuracy": 0.85, "confusion": confusion}
        runs.append(make_run(tmp_path / f"small-{seed}", (0.85,), seed=seed, test=test))
        dataset = json.loads((runs[-1] / "dataset.json").read_text())
        dataset["class_names"] = ["cat", "dog"]
        (runs[-1] / "dataset.json").write_text(json.dumps(dataset))
        records = [
            {"step": n, "epoch": float(n), "split": "train", "loss": 1.0, "accuracy": 0.5}
            | {"images": 128}
            for n in (1, 2)
        ]
        (runs[-1] / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "page.md"
    page.write_text(f"{results.BEGIN}\n{results.END}\n")
    assert main([*map(str, runs), f"--into={page}", f"--pictures={tmp_path / 'pictures'}"]) == 0
    text = page.read_text()
    assert capsys.readouterr().out.strip() in text
    links = re.findall(r"!\[.*\]\((.*)\)", text)
    assert links == [f"../pictures/small-{kind}.png" for kind in ("curves", "confusion")]
    for link in links:
        assert (page.parent / link).read_bytes().startswith(b"\x89PNG")
    assert re.search(r"cat +80\.0% +20 +dog \(4\)", text)


def test_records_make_the_same_table_and_curves(tmp_path, capsys):
    main = program("scripts", "results").main
    runs = [
        make_run(tmp_path / "one", (0.8,)),
        make_run(tmp_path / "two", (0.7, 0.9), seed=1, views=(0.8, 0.95)),
    ]
    metrics = []
    for step, images in enumerate((128, 128, 64, 128, 128, 64), start=1):
        each = [1 / step, 2 / step]
        train = {"step": step, "epoch": step / 3, "split": "train", "images": images}
        train |= {"loss": sum(each) / 2, "loss_each": each, "loss_deviation": 0.7 / step}
        metrics.append(train | {"accuracy": 0.5, "accuracy_each": [0.25, 0.75]})
        if step % 3 == 0:
            measured = {"loss": 2.0, "accuracy": step / 9}
            metrics.append({"step": step, "epoch": step / 3, "split": "validation"} | measured)
    for run in runs:
        (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in metrics))
    assert main([*map(str, runs), f"--records={tmp_path / 'records'}"]) == 0
    text = capsys.readouterr().out
    kept = [tmp_path / "records" / run.name for run in runs]
    assert main([*map(str, kept)]) == 0
    assert capsys.readouterr().out == text
    records = writers.read_metrics(kept[1] / "metrics.jsonl")
    assert [record["split"] for record in records] == ["train", "validation"] * 2
    for short, whole in zip(statistics.by_seed(records), statistics.by_seed(metrics), strict=True):
        for figure in ("loss", "accuracy"):
            curves = [statistics.epoch_curves(each, figure) for each in (short, whole)]
            assert curves[0].keys() == curves[1].keys()
            for split in curves[0]:
                np.testing.assert_allclose(*(each[split] for each in curves))
    before = (runs[0] / "metrics.jsonl").read_text()
    assert main([str(runs[0]), f"--records={tmp_path}"]) == 0  # where it lies: no step is lost
    assert (runs[0] / "metrics.jsonl").read_text() == before
    capsys.readouterr()
    (tmp_path / "elsewhere").mkdir()
    other = make_run(tmp_path / "elsewhere" / "one", (0.8,), seed=7)
    assert main([str(runs[0]), str(other), f"--records={tmp_path / 'records'}"]) == 2
    assert "have the same name, 'one'" in capsys.readouterr().err


def test_the_ablation_leads_from_classic_to_best():
    ablation = program("configs", "ablation")
    first, last = (
        dict(flatten(ablation.get_config(row))) for row in ("0", str(len(ablation.STEPS) - 1))
    )
    classic, best = (
        dict(flatten(program("configs", name).get_config()))
        for name in ("cifar10_classic", "cifar10_best")
    )
    closed = {"eval.test": False}
    assert first == classic | {"eval.tta": "flip_translate"} | closed
    assert last == best | closed
    for row in range(1, len(ablation.STEPS)):
        assert ablation.get_config(str(row)) != ablation.get_config(str(row - 1))
    for row in ("-1", str(len(ablation.STEPS)), "adamw"):
        with pytest.raises(InputError, match=f"no row '{row}'; it must be a number from 0 to 17"):
            ablation.get_config(row)


def test_the_ablation_runs_its_rows_in_turn_and_stops_where_one_does(tmp_path, capsys, monkeypatch):
    module, called = program("scripts", "ablation"), []

    codes = [0, 0, 75]

    def train(arguments, should_stop):
        folder = Path(arguments[1].removeprefix("--workdir="))
        code = codes[len(called)]
        if code == 0:
            make_run(folder, (0.8, 0.9))
        called.append(arguments)
        return code

    monkeypatch.setattr(launch, "train", train)
    tmp_path /= "runs"
    tmp_path.mkdir()
    flags = ["--rows=0,2", "--num_seeds=2", f"--workdir={tmp_path}"]
    assert module.main([*flags, "--", "--config.data.name=x"]) == 0
    assert [a[0].rpartition(":")[2] for a in called] == ["0", "2"]
    assert called[0][1:] == [
        f"--workdir={tmp_path / '00-classic'}",
        "--config.num_seeds=2",
        "--config.data.name=x",
    ]
    assert "| 00-classic | 85.00 |" in capsys.readouterr().out
    assert module.main(flags) == 75
    assert len(called) == 3
    assert module.main(["--rows=99"]) == 2
    assert "--rows=99 must be numbers between 0 and" in capsys.readouterr().err


def with_curves(folder, seconds, each, *, test=(), **options):
    """A run folder of so many seeds with accuracies on the validation images, [epochs][seeds]."""
    config = program("configs", "cifar10_classic").get_config()
    config.update_from_flattened_dict(options)
    measured = {"accuracy": float(np.mean(each[-1])), "accuracy_each": list(each[-1])}
    make_run(folder, each[-1], config=config, epochs=len(each), train_seconds=seconds)
    results = json.loads((folder / "results.json").read_text()) | {"validation": measured}
    if not config.eval.test:
        del results["test"]
    (folder / "results.json").write_text(json.dumps(results))
    records = [
        {"step": epoch, "epoch": float(epoch), "split": "validation", "loss": 1.0}
        | {"accuracy": float(np.mean(values)), "accuracy_each": list(values)}
        for epoch, values in enumerate(each, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def test_configs_are_compared_over_seeds_and_time(tmp_path, capsys, monkeypatch):
    module, drawn = program("alexnet_jax.cli", "compare"), []
    curves = {"cifar10": [(0.2, 0.4), (0.5, 0.9)], "ablation-3": [(0.3, 0.3), (0.6, 0.6)]}

    def train(arguments, should_stop):
        folder = Path(arguments[1].removeprefix("--workdir="))
        assert arguments[2:] == ["--config.num_seeds=2", "--noconfig.eval.test"]
        different = {"model.dropout": 0.1 * len(folder.name)}
        with_curves(folder, 80.0, curves[folder.name], **different, **{"eval.test": False})
        return 0

    def draw(rows, split):
        drawn.extend(rows)
        assert split == "validation"
        return figure(rows, split)

    figure = plots.accuracy_over_time
    monkeypatch.setattr(launch, "train", train)
    monkeypatch.setattr(plots, "accuracy_over_time", draw)
    configs = [str(ROOT / "configs" / name) for name in ("cifar10.py", "ablation.py:3")]
    flags = ["--seeds=2", f"--workdir={tmp_path}", "--", "--noconfig.eval.test"]
    assert module.main([*configs, *flags]) == 0
    header, (first, second) = rows(capsys.readouterr().out)
    assert header[1] == "validation accuracy (%)"
    assert first[:3] == ["cifar10", "70.00", "28.28"]
    assert second[:3] == ["ablation-3", "60.00", "0.00"]
    assert "validated on 5,000" in (tmp_path / "table.md").read_text()
    for (name, seconds, accuracies), wanted in zip(drawn, curves, strict=True):
        assert name == wanted
        np.testing.assert_allclose(seconds, [20.0, 40.0])  # of one seed of two
        np.testing.assert_allclose(accuracies, np.transpose(curves[name]))
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "ablation-3" in (tmp_path / "comparison.html").read_text()


def test_seeds_in_runs_of_their_own_make_one_curve(tmp_path):
    for seed, accuracy in enumerate((0.5, 0.7)):
        make_run(tmp_path / f"one-seed{seed}", (accuracy,), seed=seed)
    table = compare.compare([compare.Entry("one", "one.py")], tmp_path, seeds=2, separately=True)
    assert "| one | 60.00 | 14.14 |" in table
    groups = [[read_run(tmp_path / f"one-seed{seed}") for seed in range(2)]]
    seconds, accuracies = compare.curves(groups[0], "test")
    np.testing.assert_allclose(seconds, [100.0])
    np.testing.assert_allclose(accuracies, [[0.5], [0.7]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["configs/cifar10.py", "configs/cifar10.py"], "two configs are called cifar10"),
        (["configs/cifar10.py", "configs/nothing.py"], "configs/nothing.py is not a file"),
        (["configs/cifar10.py", "--seeds=0"], "the number of seeds is 0; it must be at least 1"),
    ],
)
def test_what_cannot_be_compared_is_told_before_anything_is_trained(
    arguments, message, capsys, monkeypatch
):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(launch, "train", lambda *_: pytest.fail("trained"))
    assert program("alexnet_jax.cli", "compare").main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_request_to_stop_is_passed_on_to_the_run(monkeypatch, tmp_path):
    """Once: a second one would end it before it has saved."""
    script = tmp_path / "waits.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "count = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: count.append(1))\n"
        "os.kill(os.getppid(), signal.SIGINT)\n"
        "while not count: time.sleep(0.01)\n"
        "time.sleep(0.5)\n"
        "sys.exit(74 + len(count))\n"
    )
    popen = subprocess.Popen
    started = []

    def start(command, **options):
        started.append(command)
        return popen([sys.executable, str(script)], **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    entries = [compare.Entry("one", "one.py"), compare.Entry("two", "two.py")]
    assert compare.train(entries, tmp_path, 1) == 75
    assert len(started) == 1
    script.write_text(script.read_text().replace("74 + len(count)", "0"))
    assert compare.train(entries, tmp_path, 1) == 75
    assert len(started) == 2  # that run is finished, the next one is not to begin


def test_no_run_is_left_behind_unseen(monkeypatch):
    """A second Ctrl-C ends the program before it has passed the first one on."""
    signals = []

    class Process:
        poll = staticmethod(lambda: None)
        send_signal = staticmethod(signals.append)

        def wait(self, timeout):
            raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: Process())
    with pytest.raises(KeyboardInterrupt):
        launch.train([], lambda: False)
    assert signals == [signal.SIGTERM]
