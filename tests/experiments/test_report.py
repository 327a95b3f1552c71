"""What a person looks at when a run has ended, made from run folders that nobody trained."""

import json
import re
import shutil
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
from PIL import Image

from alexnet_jax.cli import report as program
from alexnet_jax.config import default_config, flatten
from alexnet_jax.errors import InputError
from alexnet_jax.experiments.report import class_table, epoch_curves, inputs, statistics
from alexnet_jax.experiments.report.page import compact, plot_curves, write_report
from alexnet_jax.run import files


def record(split, epoch, loss, images=None):
    """A record as metrics.jsonl has it; the accuracy follows the loss."""
    found = {"step": 1, "epoch": epoch, "split": split, "loss": loss, "accuracy": 1 - loss / 10}
    return found if images is None else found | {"images": images}


TRAIN = [
    record("train", 0.5, 4.0, images=300),
    record("train", 1.0, 2.0, images=100),
    record("train", 1.25, 1.0, images=64),
    record("train", 2.0, 1.0, images=64),
]
# Binary fractions of an epoch add up to a hair more than a whole one.
HAIR = [record("train", 1.0 + 2**-50, 1.0, images=1), record("train", 2.0, 3.0, images=1)]
ALL = [
    *TRAIN,
    record("validation", 1.0, 3.0),
    record("validation_ema", 1.0, 2.5),
    record("validation", 2.0, 2.0),
    record("validation_ema", 2.0, 1.5),
    record("test", 2.0, 2.2),
    record("test_ema", 2.0, 1.7),
]
# Rows are true classes: a cat is seen in 3 of 4, an emu never occurs, an ox is always an emu.
CONFUSION = np.array([[3, 0, 1], [0, 0, 0], [0, 2, 0]])
NAMES = ("cat", "emu", "ox")


def test_training_curve_weighs_by_images_and_stands_at_the_end_of_the_epoch():
    assert epoch_curves(TRAIN, "loss") == {"train": ([1, 2], [3.5, 1.0])}
    assert epoch_curves(TRAIN, "accuracy")["train"][1] == pytest.approx([0.65, 0.9])


def test_rounding_moves_no_record_into_the_next_epoch():
    assert epoch_curves(HAIR, "loss")["train"] == ([1, 2], [1.0, 3.0])


def test_measured_curves_stand_where_they_were_measured():
    curves = epoch_curves(ALL, "loss")
    assert list(curves) == ["train", "validation", "validation_ema", "test", "test_ema"]
    assert curves["validation"] == ([1.0, 2.0], [3.0, 2.0])
    assert curves["test"] == ([2.0], [2.2])
    assert epoch_curves([], "loss") == {}


def test_class_table_by_hand():
    assert class_table(CONFUSION, NAMES).split("\n") == [
        "class  accuracy  images  most often predicted as",
        "cat       75.0%       4  ox (1)",
        "emu           -       0  -",
        "ox         0.0%       2  emu (2)",
    ]


def test_class_table_leaves_room_for_long_names_and_large_counts():
    table = class_table(np.diag([12345, 1]), ("a rather long name", "b"))
    assert table.split("\n") == [
        "class               accuracy  images  most often predicted as",
        "a rather long name    100.0%  12,345  -",
        "b                     100.0%       1  -",
    ]


def test_scores_of_the_classes():
    """By hand, and as scikit-learn has them of single images."""
    found = statistics.class_scores(CONFUSION)
    np.testing.assert_array_equal(found.precision, [1, 0, 0])
    np.testing.assert_array_equal(found.recall, [0.75, np.nan, 0])
    np.testing.assert_allclose(found.f1, [6 / 7, 0, 0])
    np.testing.assert_array_equal(found.images, [4, 0, 2])
    assert found.macro == pytest.approx((1 / 2, 3 / 8, 3 / 7))
    rng = np.random.default_rng(0)
    true, predicted = rng.integers(0, 5, (2, 300))
    found = statistics.class_scores(sklearn.metrics.confusion_matrix(true, predicted))
    named = {"precision": found.precision, "recall": found.recall, "f1": found.f1}
    for name, values in named.items():
        score = getattr(sklearn.metrics, f"{name}_score")
        np.testing.assert_allclose(values, score(true, predicted, average=None))


def test_the_most_frequent_mistakes():
    assert statistics.confused_pairs(CONFUSION, 5) == [(2, 1, 2, 1.0), (0, 2, 1, 0.25)]
    assert statistics.confused_pairs(CONFUSION, 1) == [(2, 1, 2, 1.0)]


def test_calibration_error_as_the_paper_defines_it():
    """Against sums over each bin (Guo et al., 2017, equation 3), written once more."""
    rng = np.random.default_rng(0)
    confidence = rng.beta(5, 2, 2000).astype(np.float32)
    confidence[:3] = 1.0, 0.2, np.nextafter(np.float32(0.2), 1)
    correct = rng.random(2000) < confidence**2
    found = statistics.calibration(confidence, correct)
    total = 0.0
    for m in range(15):
        inside = [i for i, p in enumerate(confidence) if m / 15 < float(p) <= (m + 1) / 15]
        assert found.counts[m] == len(inside)
        if inside:
            accuracy = sum(correct[i] for i in inside) / len(inside)
            mean = sum(float(confidence[i]) for i in inside) / len(inside)
            assert found.accuracy[m] == pytest.approx(accuracy)
            assert found.confidence[m] == pytest.approx(mean)
            total += len(inside) / 2000 * abs(accuracy - mean)
    assert found.ece == pytest.approx(total)
    assert 0.1 < found.ece < 0.3


def test_calibration_of_certainty():
    sure = statistics.calibration(np.ones(8), np.array([True] * 6 + [False] * 2))
    assert sure.ece == 0.25
    assert sure.counts.tolist() == [0] * 14 + [8]
    assert statistics.calibration(np.ones(8), np.ones(8, bool)).ece == 0


def test_differences_of_configs():
    one, other = {"a": 1, "b": [2], "c": 3}, {"a": 1, "b": [3], "d": 4}
    assert statistics.differences([one, other]) == [
        ("b", [[2], [3]]),
        ("c", [3, None]),
        ("d", [None, 4]),
    ]


@pytest.mark.parametrize("records", [TRAIN[:2], TRAIN, ALL, []], ids=["one", "train", "all", "no"])
def test_plot_curves_writes_a_picture(tmp_path, records):
    path = tmp_path / "curves.png"
    plot_curves(records, path, "alexnet on cifar10: $run")
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size == (1200, 480)
        colours = {colour for _, colour in image.convert("RGB").getcolors(image.width * 480)}
    blue, orange, red = (tuple(bytes.fromhex(c[1:])) for c in ("#0969da", "#bc4c00", "#cf222e"))
    assert (blue in colours) == bool(records)
    assert (orange in colours) == (red in colours) == (records is ALL)


def judged(rng, rows, masked=0):
    """What `steps.judge_step` may return of a batch of 4x4 images and 3 classes."""
    probabilities = rng.dirichlet(np.ones(3), rows).astype(np.float32)
    classes = np.argsort(-probabilities, axis=1).astype(np.int32)
    label = rng.integers(0, 3, rows).astype(np.int32)
    mask = np.arange(rows) < rows - masked
    images = rng.integers(0, 256, (rows, 4, 4, 3), np.uint8)
    mistaken = mask & (classes[:, 0] != label)
    best = np.argsort(-np.where(mistaken, probabilities.max(axis=1), -1), kind="stable")[:36]
    return {
        "label": label,
        "mask": mask,
        "classes": classes,
        "probabilities": np.take_along_axis(probabilities, classes, axis=1),
        "label_probability": probabilities[np.arange(rows), label],
        "mistakes": best,
        "pictures": images[best],
    }, images


def test_answers_are_in_the_order_of_the_test_set_and_mistakes_in_that_of_confidence():
    rng = np.random.default_rng(0)
    batches = [judged(rng, 40), judged(rng, 40, masked=7)]
    collected = inputs.Predictions()
    for batch, _ in batches:
        collected.add(batch)
    predictions, errors = collected.arrays(), collected.misclassified()
    masks = [batch["mask"] for batch, _ in batches]
    for name, values in predictions.items():
        whole = [batch[name][mask] for (batch, _), mask in zip(batches, masks, strict=True)]
        np.testing.assert_array_equal(values, np.concatenate(whole))
    images = np.concatenate([im[mask] for (_, im), mask in zip(batches, masks, strict=True)])
    wrong = np.flatnonzero(predictions["classes"][:, 0] != predictions["label"])
    surest = wrong[np.argsort(-predictions["probabilities"][wrong, 0], kind="stable")][:36]
    assert 36 == len(surest) < len(wrong)
    np.testing.assert_array_equal(errors["misclassified_index"], surest)
    np.testing.assert_array_equal(errors["misclassified_images"], images[surest])


def test_a_network_without_mistakes_has_none():
    batch, _ = judged(np.random.default_rng(0), 8)
    batch["label"] = batch["classes"][:, 0]
    collected = inputs.Predictions()
    collected.add(batch)
    assert list(collected.misclassified()) == ["misclassified_index"]
    assert len(collected.misclassified()["misclassified_index"]) == 0


def test_samples_histograms_and_filters():
    images = np.zeros((3, 300, 200, 3), np.uint8)

    def brighter(keys, epoch, images, labels):
        return images + 1, labels

    found = inputs.augmented(images, brighter, seed=0)["samples"]
    assert found.shape == (4, 3, 128, 85, 3)
    assert (found[0] == 0).all()
    assert (found[1:] == 1).all()
    rng = np.random.default_rng(0)
    params = {"conv": {"kernel": jnp.asarray(rng.normal(size=(3, 3, 3, 300)))}, "bias": jnp.ones(4)}
    histograms = inputs.histograms(params)
    assert list(histograms) == ["histograms/bias", "histograms/conv/kernel"]
    assert histograms["histograms/conv/kernel"][:, 2].sum() == 8100
    filters = inputs.first_filters(params, 3)["filters"]
    np.testing.assert_array_equal(filters[7], params["conv"]["kernel"][..., 7])
    assert filters.shape == (256, 3, 3, 3)
    assert inputs.first_filters(params, 1) == {}


def test_arrays_come_back_or_a_sentence(tmp_path):
    path = tmp_path / "a.npz"
    arrays = {"one/two": np.arange(3), "b": np.zeros((0, 2), np.uint8)}
    assert files.read_npz(path) == {}
    files.write_npz(path, arrays)
    before = path.read_bytes()
    found = files.read_npz(path)
    for name, values in arrays.items():
        np.testing.assert_array_equal(found[name], values)
        assert found[name].dtype == values.dtype
    files.write_npz(path, arrays)
    assert path.read_bytes() == before
    path.write_bytes(before[:-9])
    with pytest.raises(
        InputError, match=r"a\.npz is damaged .*; restore it from a copy, or delete it"
    ):
        files.read_npz(path)


# Whole pages

NASTY = [
    "<script>alert(1)</script>",
    "$x^{",
    "a & b",
    '"quoted" #0969da',
    "a very long name of a class",
]


def make_run(
    folder, classes=3, *, names=None, finished=True, ema=True, validation=True, epochs=3, seeds=1
):
    """Writes what a run leaves, of a network that is right in most cases."""
    rng = np.random.default_rng(0)
    names = names or [f"class {i}" for i in range(classes)]
    classes = len(names)
    folder.mkdir(parents=True)
    config = default_config()
    config.train.epochs = epochs
    config.data.name = "things"
    splits = ["validation"] * validation + ["validation_ema"] * (validation and ema)
    records = []
    for epoch in range(1, epochs + 1):
        for part in range(1, 11):
            at = epoch - 1 + part / 10
            records.append(
                record("train", at, 2.5 / (1 + at), 128)
                | {"images_per_second": 900 + 100 * rng.random(), "learning_rate": 1e-3 / at}
            )
        records += [record(split, float(epoch), 2 / (1 + epoch)) for split in splits]
    tests = ["test"] + ["test_ema"] * ema
    if finished:
        records += [record(split, float(epochs), 2.1 / (1 + epochs)) for split in tests]
    (folder / "config.json").write_text(json.dumps(dict(flatten(config))))
    (folder / "dataset.json").write_text(
        json.dumps({"name": "things", "class_names": names, "image_shape": [8, 8, 3]})
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    inputs.write_environment(folder, "| Name | Size |\n| a/b | 12 |\nTotal: 12", "1 x cpu", 1)
    if not finished:
        return folder
    images = min(20 * classes, 4000)
    label = np.arange(images, dtype=np.int32) % max(1, classes - 1)  # the last class has none
    scores = rng.normal(size=(images, classes)).astype(np.float32)
    scores[np.arange(images), label] += 2
    every = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    likeliest = np.argsort(-every, axis=1)[:, : min(5, classes)].astype(np.int32)
    confusion = np.zeros((classes, classes), int)
    np.add.at(confusion, (label, likeliest[:, 0]), 1)
    wrong = np.flatnonzero(likeliest[:, 0] != label)[:36]
    results = {
        "step": 30,
        "epochs": epochs,
        "train_seconds": 12.5,
        "parameters": 1234567,
        "devices": "1 x cpu",
        "versions": {"jax": "1"},
    }
    for split in splits + tests:
        results[split] = {"loss": 0.5, "accuracy": 0.9, "confusion": confusion.tolist()}
        if seeds > 1:
            results[split] |= {"accuracy_deviation": 0.0123, "accuracy_each": [0.9] * seeds}
    if seeds > 1:
        results["seeds"] = list(range(seeds))
    (folder / "results.json").write_text(json.dumps(results))
    files.write_npz(
        folder / "predictions.npz",
        {
            "label": label,
            "classes": likeliest,
            "probabilities": np.take_along_axis(every, likeliest, axis=1),
            "label_probability": every[np.arange(images), label],
        },
    )
    pictures = rng.integers(0, 256, (len(wrong), 8, 8, 3), np.uint8)
    files.write_npz(
        folder / "report.npz",
        {
            "misclassified_index": wrong,
            "samples": rng.integers(0, 256, (4, 12, 8, 8, 3), np.uint8),
            "filters": rng.normal(size=(32, 3, 3, 3)).astype(np.float32),
        }
        | ({"misclassified_images": pictures} if len(wrong) else {}),
    )
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run whose classes have names that would break a page, and its report."""
    folder = make_run(tmp_path_factory.mktemp("runs") / "a <b> run", names=NASTY)
    return folder, write_report(folder).read_text()


FIGURES = ["accuracy", "calibration", "confusion", "filters", "learning_rate", "loss"]
FIGURES += ["misclassified", "samples", "scores", "throughput"]


def test_a_report_has_everything(whole):
    folder, page = whole
    assert sorted(path.stem for path in (folder / "figures").iterdir()) == FIGURES
    for path in (folder / "figures").iterdir():
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert image.width >= 480
    for heading in (
        *("Training", "Classes", "Calibration", "Most confident errors"),
        *("Images and filters", "Throughput", "Model", "Config", "Environment"),
    ):
        assert f"<h2>{heading}</h2>" in page
    command = json.loads((folder / "environment.json").read_text())["command"]
    assert f"<pre>{command}" in page.replace("&#39;", "'")
    assert "1.23 M" in page  # parameters
    assert "<td>a/b</td>" in page  # of the table of the network
    assert "<code>optimizer.nesterov</code>" in page
    assert page.count("<li><figure><img") == len(
        files.read_npz(folder / "report.npz")["misclassified_index"]
    )


def test_a_page_needs_nothing_but_itself(whole):
    _, page = whole
    outside = [
        address
        for address in re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", page)
        if not address.startswith(("data:", "#"))
    ]
    assert outside == []
    assert "<script" not in page
    assert "@import" not in page


def test_names_from_elsewhere_are_text(whole):
    _, page = whole
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "a &lt;b&gt; run" in page
    assert "$x^{" in page
    assert "#0969da</text>" in page  # no colour, but a name


def test_figures_follow_light_and_dark(whole):
    """Their colours are the page's variables, and each of their names is unlike all others."""
    _, page = whole
    drawings = re.findall(r"<svg .*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) == 7
    for drawing in drawings:
        assert "var(--ink)" in drawing or "var(--muted)" in drawing
        assert drawing.startswith('<svg role="img" aria-label="')
        assert not re.search(r"(fill|stroke): ?#(1f2328|0969da|d1d9e0)", drawing)
    names = re.findall(r'\bid="([^"]+)"', page)
    assert len(names) == len(set(names))
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", page))
    assert used <= set(names)
    variables = set(re.findall(r"var\((--[\w-]+)\)", page))
    for colours in re.findall(r":root \{(.*?)\}", page, flags=re.DOTALL)[:2]:
        assert variables <= set(re.findall(r"(--[\w-]+):", colours))


@pytest.mark.parametrize(
    "options",
    [
        {"classes": 2, "ema": False, "validation": False, "epochs": 1},
        {"classes": 1000},
        {"finished": False},
        {"seeds": 3},
    ],
    ids=["few", "many", "unfinished", "seeds"],
)
def test_reports_of_all_kinds(tmp_path, options):
    folder = make_run(tmp_path / "run", **options)
    page = write_report(folder).read_text()
    finished = options.get("finished", True)
    assert ("This run is not finished" in page) == (not finished)
    assert (folder / "figures" / "confusion.png").exists() == finished
    assert ("averaged weights" in page) == options.get("ema", True)
    both = finished and options.get("ema", True) and options.get("validation", True)
    assert ("accuracy, validation, averaged weights" in page) == both
    assert ("classes with the lowest F1" in page) == (options.get("classes") == 1000)
    seeds = options.get("seeds", 1)
    assert ("90.00% (std 1.23)" in page) == (seeds > 1)
    assert ("Means over the seeds 0, 1, 2" in page) == (seeds > 1)
    assert len(page) < 2_000_000


def test_a_run_of_an_earlier_version_shows_what_it_has(tmp_path):
    folder = make_run(tmp_path / "run")
    for name in ("predictions.npz", "report.npz", "environment.json", "model.txt"):
        (folder / name).unlink()
    (folder / "figures").mkdir()
    (folder / "figures" / "samples.png").write_bytes(b"of an earlier report")
    page = write_report(folder, tmp_path / "elsewhere.html").read_text()
    assert "<h2>Calibration</h2>" not in page
    assert "<h2>Classes</h2>" in page
    assert not (folder / "report.html").exists()
    old = folder / "figures" / "samples.png"
    assert list((folder / "figures").iterdir()) == [old]  # nothing in the run has changed
    write_report(folder)
    assert not old.exists()
    assert any((folder / "figures").iterdir())


def test_arrays_with_the_names_of_an_earlier_version_are_shown(tmp_path):
    folder = make_run(tmp_path / "run")
    arrays = files.read_npz(folder / "report.npz")
    images = arrays.pop("misclassified_images")
    old = {"mistake_index": arrays.pop("misclassified_index"), "mistake_pictures": images}
    files.write_npz(folder / "report.npz", arrays | old)
    assert write_report(folder).read_text().count("<li><figure><img") == len(images) > 0


@pytest.fixture(scope="module")
def comparison(whole, tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    other = make_run(folder / "a <b> run", classes=2, epochs=2, finished=False)
    page = folder / "both.html"
    assert program.main([str(whole[0]), str(other), f"--output={page}"]) == 0
    return page


def test_counts_have_three_digits_and_the_unit_they_round_to():
    counts = (7, 999, 1_234, 999_499, 999_700, 61_100_840, 999_800_000)
    assert list(map(compact, counts)) == [*("7", "999", "1.23 k", "999 k", "1 M", "61.1 M", "1 G")]


def test_runs_are_compared(comparison):
    page = comparison.read_text()
    for cell in ("1. a &lt;b&gt; run", "2. a &lt;b&gt; run", "90.00%", "not finished"):
        assert cell in page
    (row,) = re.findall(r"<tr>(?:(?!<tr>).)*train\.epochs.*?</tr>", page, flags=re.DOTALL)
    assert re.findall(r"<td><code>(.*?)</code>", row) == ["3", "2"]
    assert "optimizer.name" not in page


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{tmp}"], "it has no config.json of a run; name the --workdir of one"),
        (["{run}", "--output=page.txt"], "--output=page.txt must end in .html"),
        (["{run}", "--output={tmp}/no/page.html"], "is in no folder; create"),
    ],
)
def test_what_cannot_be_made_is_a_sentence(whole, tmp_path, capsys, arguments, says):
    given = [text.format(tmp=tmp_path, run=whole[0]) for text in arguments]
    assert program.main(given) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert says in said


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
# Looks at what the browser made of the page; the page itself allows no script.
LOOK = """<script>
addEventListener("load", () => {
  const wide = [...document.querySelectorAll("body *")].filter(
    (e) => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".scroll, svg"));
  const found = {
    images: [...document.images].map((i) => i.complete && i.naturalWidth > 0),
    drawings: [...document.querySelectorAll("svg")].map((s) => s.getBoundingClientRect().height),
    resources: performance.getEntriesByType("resource").map((r) => r.name)
      .filter((name) => !name.startsWith("data:")),
    wide: wide.map((e) => e.outerHTML.slice(0, 80)),
    ink: getComputedStyle(document.body).color,
  };
  document.body.textContent = "FOUND" + JSON.stringify(found) + "END";
});
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("narrow", [False, True], ids=["wide", "narrow"])
def test_a_browser_shows_it(whole, comparison, tmp_path, narrow):
    """No error, nothing asked of a network, every picture there, nothing beyond the window."""
    for page in [whole[1]] + [comparison.read_text()] * narrow:
        policy = re.search(r"<meta http-equiv=.Content-Security-Policy.*?>", page)[0]
        path = tmp_path / "page.html"
        path.write_text(page.replace(policy, "").replace("</body>", LOOK + "</body>"))
        done = subprocess.run(
            [
                *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
                *("--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"),
                f"--window-size={'500' if narrow else '1280'},900",
                path.as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert "CONSOLE" not in done.stderr
        found = json.loads(re.search(r"FOUND(\{.*\})END", done.stdout)[1])
        assert all(found["images"])
        assert len(found["images"]) == page.count("<img ")
        assert all(height > 100 for height in found["drawings"])
        assert found["resources"] == []
        assert found["wide"] == []
