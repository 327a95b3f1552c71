"""Puts a report together, from the files of a run folder alone: ``report.html`` and its figures."""

import datetime
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from alexnet_jax.config import default_config, flatten
from alexnet_jax.distributed.replicas import show_accuracy
from alexnet_jax.errors import InputError
from alexnet_jax.experiments.report import figures, inputs, statistics
from alexnet_jax.run import directory
from alexnet_jax.run.directory import SPLITS, write_whole
from alexnet_jax.run.writers import duration, read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

NOTHING = "\N{EN DASH}"  # where there is no figure
_MOST_PAIRS = 10  # of classes that are taken for each other
_SHOWN_CLASSES = 20  # in a table that is open; all are in one that can be opened


class Run(NamedTuple):
    """What a run folder holds for a report; empty where a file is not there (yet)."""

    folder: Path
    config: dict[str, Any]
    dataset: dict[str, Any]
    records: list[dict[str, Any]]
    results: dict[str, Any]
    environment: dict[str, Any]
    model: str
    predictions: inputs.Arrays
    data: inputs.Arrays

    @property
    def name(self) -> str:
        """How the run is called among others."""
        return self.folder.name

    @property
    def title(self) -> str:
        """What was trained on what."""
        return f"{self.config['model.name']} on {self.config['data.name']}"


def read_run(folder: Path) -> Run:
    """Reads the files of a run folder.

    Raises:
        InputError: It is none, or a file in it is damaged.
    """
    folder = folder.expanduser().absolute()
    config = directory.read_json(folder / directory.CONFIG)
    if config is None:
        raise InputError(
            f"{folder} is no run folder: it holds no {directory.CONFIG}; name the --workdir of a "
            "run."
        )
    missing = [key for key in ("model.name", "data.name") if key not in config]
    if missing:
        raise InputError(
            f"{folder / directory.CONFIG} is damaged (it lacks {missing[0]}); put back a copy."
        )
    model = folder / directory.MODEL
    return Run(
        folder,
        config,
        directory.read_json(folder / directory.DATASET) or {},
        read_metrics(folder / directory.METRICS),
        directory.read_json(folder / directory.RESULTS) or {},
        directory.read_json(folder / directory.ENVIRONMENT) or {},
        model.read_text(errors="replace") if model.exists() else "",
        inputs.read_arrays(folder / directory.PREDICTIONS),
        inputs.read_arrays(folder / directory.REPORT_DATA),
    )


def plot_curves(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draws loss and accuracy over the epochs, side by side, into a PNG file."""
    write_whole(path, figures.png(figures.curves([records], title)))


def write_report(folder: Path, page: Path | None = None) -> Path:
    """Makes the report of a run, finished or not: its figures, and then the page.

    Args:
        folder: The run folder.
        page: Where the page goes, by default ``report.html`` in the run folder; elsewhere it goes
            alone, without the figures as files.

    Returns:
        Where the page lies.

    Raises:
        InputError: It is no run folder, or a file in it is damaged.
        SaveFailed: A file cannot be written.
    """
    run = read_run(folder)
    drawings = _Drawings(None if page else run.folder / directory.FIGURES)
    content = _render("report.html.jinja", _context(run, drawings))
    drawings.clear_others()
    page = page or run.folder / directory.REPORT
    write_whole(page, content)
    return page


def write_comparison(folders: list[Path], page: Path) -> Path:
    """Makes a page that compares several runs.

    Args:
        folders: Run folders.
        page: Where it goes.

    Raises:
        InputError: One is no run folder, or a file in it is damaged.
        SaveFailed: The page cannot be written.
    """
    runs = [read_run(folder) for folder in folders]
    # Numbered, as folders of the same name may lie in different places.
    names = [f"{i}. {run.name}" for i, run in enumerate(runs, start=1)]
    records = list(zip(names, (run.records for run in runs), strict=True))
    context = {
        "title": f"{len(runs)} run{'s' * (len(runs) > 1)} compared",
        "names": names,
        "folders": [str(run.folder) for run in runs],
        "curves": [
            figures.svg(figures.comparison(records, name), name, f"{name} of each run by epoch")
            for name in ("loss", "accuracy")
        ],
        "rows": _compared(runs),
        "differences": [
            (key, [show(value) for value in values])
            for key, values in statistics.differences([run.config for run in runs])
        ],
    }
    write_whole(page, _render("comparison.html.jinja", context))
    return page


class _Drawings:
    """Figures on their way into the page, each left as a PNG file, too, if there is a folder."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.written: list[Path] = []

    def clear_others(self) -> None:
        """Removes what an earlier report had and this one has not, which would only mislead."""
        if self.folder:
            for old in set(self.folder.glob("*.png")) - set(self.written):
                old.unlink(missing_ok=True)

    def figure(self, name: str, figure: "Figure", says: str) -> str:
        self._write(name, figures.png(figure))
        return figures.svg(figure, name.replace("_", "-"), says)

    def picture(self, name: str, picture: np.ndarray) -> str:
        self._write(name, figures.picture_png(figures.enlarged(picture)))
        return figures.data_uri(figures.picture_png(picture))

    def png_only(self, name: str, figure: "Figure") -> None:
        self._write(name, figures.png(figure))

    def _write(self, name: str, content: bytes) -> None:
        if self.folder is None:
            return
        directory.make_folder(self.folder)
        path = self.folder / f"{name}.png"
        write_whole(path, content)
        self.written.append(path)


def show(value: Any) -> str:
    """Writes the value of an option as a person would on a command line."""
    if value is None:
        return NOTHING
    if isinstance(value, list):
        return f"({', '.join(map(show, value))})"
    return repr(value) if value == "" else str(value)


def percent(share: float) -> str:
    """Writes a share, "97.5%"; a dash for NaN."""
    return NOTHING if np.isnan(share) else f"{share:.1%}"


def compact(count: int) -> str:
    """Writes a count in few letters, "61.1 M"."""
    for power, unit in ((9, "G"), (6, "M"), (3, "k")):
        if count >= 0.9995 * 10**power:  # 999,700 rounds to 1 M, not to 1000 k
            return f"{count / 10**power:.3g} {unit}"
    return str(count)


def _context(run: Run, drawings: _Drawings) -> dict[str, Any]:
    """Draws everything, and gathers what the template shows."""
    context: dict[str, Any] = {
        "title": run.title,
        "run": run.name,
        "finished": bool(run.results),
        "made": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "splits": [
            (label, run.results[split]["loss"], show_accuracy(run.results[split]))
            for split, label in SPLITS.items()
            if split in run.results
        ],
        "options": _options(run.config),
        "environment": run.environment,
        "model": _model_table(run.model),
        "dataset": run.dataset,
        "results": run.results,
        "judged": _judged(run.results) if run.results else "",
        "duration": duration,
        "percent": percent,
    }
    if any(record["split"] == "train" for record in run.records):
        context |= _training(run, drawings)
    names = run.dataset.get("class_names", [])
    if run.results and names:
        context |= _classes(run, names, drawings)
        if run.predictions:
            context |= _answers(run, names, drawings)
    for name in ("samples", "filters"):
        if name in run.data:
            picture = (
                figures.tiled(run.data[name])
                if name == "samples"
                else figures.filter_sheet(run.data[name])
            )
            context[name] = {
                "image": drawings.picture(name, picture),
                "width": picture.shape[1],
                "height": picture.shape[0],
                "shape": run.data[name].shape,
            }
    context["tiles"] = _tiles(run, context)
    return context


def _training(run: Run, drawings: _Drawings) -> dict[str, Any]:
    _, pace = statistics.step_curve(run.records, "images_per_second")
    found: dict[str, Any] = {
        "curves": [
            drawings.figure(
                name, figures.curve(run.records, name), f"{name} of each split by epoch"
            )
            for name in ("loss", "accuracy")
        ],
        "rate": drawings.figure(
            "learning_rate", figures.learning_rate(run.records), "Learning rate by epoch"
        ),
    }
    if len(pace):
        found["pace"] = float(np.median(pace))
        found["throughput"] = drawings.figure(
            "throughput", figures.throughput(run.records), "Images per second by epoch"
        )
    return found


def _classes(run: Run, names: list[str], drawings: _Drawings) -> dict[str, Any]:
    confusion = np.array(run.results[statistics.tested_split(run.results)]["confusion"])
    scores = statistics.class_scores(confusion)
    mistakes = confusion - np.diag(np.diag(confusion))
    rows = []
    for i, name in enumerate(names):
        worst = int(mistakes[i].argmax())
        rows.append(
            {
                "name": name,
                "precision": scores.precision[i],
                "recall": scores.recall[i],
                "f1": scores.f1[i],
                "images": int(scores.images[i]),
                "taken": names[worst] if mistakes[i, worst] else "",
                "times": int(mistakes[i, worst]),
            }
        )
    worst_first = sorted(rows, key=lambda row: (not row["images"], row["f1"]))
    pairs = statistics.confused_pairs(confusion, _MOST_PAIRS)
    return {
        "confusion": drawings.figure(
            "confusion",
            figures.confusion(confusion, names),
            "Confusion matrix: rows are true classes, columns predicted ones; the table of "
            "classes has its figures",
        ),
        "scores": drawings.figure(
            "scores", figures.scores(scores, names), "Precision, recall and F1 of each class"
        ),
        "classes": rows,
        "worst_classes": worst_first[:_SHOWN_CLASSES] if len(rows) > _SHOWN_CLASSES else [],
        "macro": scores.macro,
        "pairs": [(names[p.true], names[p.predicted], p.images, p.share) for p in pairs],
    }


def _answers(run: Run, names: list[str], drawings: _Drawings) -> dict[str, Any]:
    label, classes, probabilities = (
        run.predictions[name] for name in ("label", "classes", "probabilities")
    )
    calibration = statistics.calibration(probabilities[:, 0], classes[:, 0] == label)
    found: dict[str, Any] = {
        "calibration": drawings.figure(
            "calibration",
            figures.calibration(calibration),
            f"Reliability diagram; the expected calibration error is {calibration.ece:.1%}",
        ),
        "ece": calibration.ece,
        "bins": len(calibration.counts),
        "mean_confidence": float(probabilities[:, 0].mean()),
        "mistakes": [],
        "wrong": int((classes[:, 0] != label).sum()),
    }
    if len(names) > classes.shape[1] > 1:
        found["top"] = classes.shape[1]
        found["top_accuracy"] = float((classes == label[:, None]).any(axis=1).mean())
    index = run.data.get("mistake_index", np.zeros(0, int))
    if len(index):
        pictures = run.data["mistake_pictures"]
        found["mistakes"] = [
            {
                "image": figures.data_uri(figures.picture_png(picture)),
                "index": int(i),
                "true": names[label[i]],
                "predicted": names[classes[i, 0]],
                "confidence": float(probabilities[i, 0]),
                "true_confidence": float(run.predictions["label_probability"][i]),
            }
            for i, picture in zip(index, pictures, strict=True)
        ]
        captions = [
            f"{figures.short(m['predicted'])} {m['confidence']:.0%}\nis {figures.short(m['true'])}"
            for m in found["mistakes"]
        ]
        drawings.png_only("mistakes", figures.mistakes(pictures, captions))
    return found


def _judged(results: dict[str, Any]) -> str:
    """Names the images that the report looks at: "test", or "validation" if the run saw no test."""
    return statistics.tested_split(results).removesuffix("_ema")


def _tiles(run: Run, context: dict[str, Any]) -> list[tuple[str, str]]:
    """The few figures that stand at the top, as (value, what it is)."""
    results, tiles = run.results, []
    if results:
        tested = statistics.tested_split(results)
        tiles.append((f"{results[tested]['accuracy']:.2%}", f"accuracy, {SPLITS[tested]}"))
        if "top_accuracy" in context:
            label = f"top-{context['top']} accuracy, {_judged(results)}"
            tiles.append((f"{context['top_accuracy']:.2%}", label))
        validated = tested.replace("test", "validation")
        if validated in results and validated != tested:
            accuracy = results[validated]["accuracy"]
            tiles.append((f"{accuracy:.2%}", f"accuracy, {SPLITS[validated]}"))
        if "ece" in context:
            tiles.append((f"{context['ece']:.1%}", "expected calibration error"))
        tiles.append((compact(results["parameters"]), "parameters"))
        tiles.append((duration(results["train_seconds"]), "of training"))
    if "pace" in context:
        tiles.append((f"{context['pace']:,.0f}", "images per second"))
    return tiles


def _options(config: dict[str, Any]) -> list[dict[str, str]]:
    """Lists the options of a config, with the defaults of those that have another value."""
    try:
        defaults = dict(flatten(default_config(config["model.name"])))
    except InputError:  # a network that this version does not have
        defaults = {}
    rows = []
    for key, value in config.items():
        default = defaults.get(key, value)
        default = list(default) if isinstance(default, tuple) else default
        changed = default != value
        rows.append({"key": key, "value": show(value), "default": show(default) if changed else ""})
    return rows


def _model_table(text: str) -> dict[str, Any]:
    """Takes the table of parameters apart that `models.describe` lays out."""
    lines = text.strip().splitlines()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("|")
    ]
    notes = [line for line in lines if not line.startswith(("|", "+"))]
    return {"head": rows[0] if rows else [], "rows": rows[1:], "notes": notes}


def _compared(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """What is compared, row by row, with the value of each run."""

    def of_results(text: Callable[[dict[str, Any]], str]) -> list[str]:
        return [text(run.results) if run.results else "not finished" for run in runs]

    def measured(split: str, text: Callable[[dict[str, Any]], str]) -> list[str]:
        values = (run.results.get(f"{split}_ema", run.results.get(split)) for run in runs)
        return [text(value) if value else NOTHING for value in values]

    def accuracy(split: str) -> list[str]:
        return measured(split, lambda value: f"{value['accuracy']:.2%}")

    return [
        ("network", [run.config["model.name"] for run in runs]),
        ("data set", [run.config["data.name"] for run in runs]),
        ("test accuracy", accuracy("test")),
        ("validation accuracy", accuracy("validation")),
        ("test loss (nats)", measured("test", lambda value: f"{value['loss']:.4f}")),
        ("epochs", of_results(lambda results: f"{results['epochs']:,}")),
        ("steps", of_results(lambda results: f"{results['step']:,}")),
        ("parameters", of_results(lambda results: f"{results['parameters']:,}")),
        ("training time", of_results(lambda results: duration(results["train_seconds"]))),
        (
            "images per second (median)",
            [
                f"{np.median(pace):,.0f}" if len(pace) else NOTHING
                for pace in (statistics.step_curve(r.records, "images_per_second")[1] for r in runs)
            ],
        ),
        ("devices", of_results(lambda results: results["devices"])),
    ]


@functools.cache
def _templates() -> Any:
    import jinja2  # at the end of a run soon enough

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,  # names of classes come from anywhere
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _render(template: str, context: dict[str, Any]) -> bytes:
    rendered: str = _templates().get_template(template).render(context)
    return rendered.encode()
