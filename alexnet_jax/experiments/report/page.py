"""Writes ``report.html`` and its figures from the files of a run folder alone."""

import base64
import datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure

from alexnet_jax.config import default_config, flatten
from alexnet_jax.errors import InputError
from alexnet_jax.experiments.report import statistics
from alexnet_jax.metrics import format_accuracy
from alexnet_jax.plots import classes, curves, images, style
from alexnet_jax.run import directory, files
from alexnet_jax.run.writers import duration, read_metrics

NOTHING = "\N{EN DASH}"  # for a value that does not exist
_MAX_PAIRS = 10  # of classes that are confused
_MAX_CLASSES = 20  # in the open table; another one, folded, has all
# Of arrays in the report.npz of earlier versions.
_OLD_NAMES = {"mistake_index": "misclassified_index", "mistake_pictures": "misclassified_images"}


class ReportRun:
    """The files of a run folder; empty where one does not exist (yet)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder = folder.expanduser().absolute()
        self.config: dict[str, Any] = directory.read_options(folder) or {}
        if not {"model.name", "data.name"} <= self.config.keys():
            raise InputError(
                f"{folder} is not a run folder: it has no {directory.CONFIG} of a run; name the "
                "--workdir of one."
            )
        self.dataset = files.read_json(folder / directory.DATASET) or {}
        self.records = read_metrics(folder / directory.METRICS)
        self.results = files.read_json(folder / directory.RESULTS) or {}
        self.split = statistics.reported_split(self.results) if self.results else ""
        self.environment = files.read_json(folder / directory.ENVIRONMENT) or {}
        model = folder / directory.MODEL
        self.model = model.read_text(errors="replace") if model.exists() else ""
        self.predictions = files.read_npz(folder / directory.PREDICTIONS)
        arrays = files.read_npz(folder / directory.REPORT_DATA)
        self.arrays = {_OLD_NAMES.get(name, name): values for name, values in arrays.items()}
        self.throughput = statistics.step_curve(self.records, "images_per_second")


def plot_curves(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draws loss and accuracy over the epochs, side by side, into a PNG file."""
    runs = {metric: [statistics.epoch_curves(records, metric)] for metric in ("loss", "accuracy")}
    files.write_bytes(path, style.png(curves.metric_curves(runs, title)))


def write_report(folder: Path, page: Path | None = None) -> Path:
    """Writes the report of a run, finished or not, and returns its path.

    That is `page`; or ``report.html`` in the run folder, with the figures as PNG files beside it.

    Raises:
        InputError: It is not a run folder, or a file in it is damaged.
        SaveFailed: A file cannot be written.
    """
    run = ReportRun(folder)
    context = _context(run)
    if page is None:
        pngs = {name: style.png(figure) for name, figure in context["figures"].items()}
        for name, grid in context["grids"].items():
            pngs[name] = style.image_png(images.enlarge(grid))
        for name, content in pngs.items():
            files.write_bytes(run.folder / directory.FIGURES / f"{name}.png", content)
        for path in (run.folder / directory.FIGURES).glob("*.png"):
            if path.stem not in pngs:  # of an earlier report
                path.unlink(missing_ok=True)
        page = run.folder / directory.REPORT
    _write_page(page, "report.html.jinja", context)
    return page


def write_comparison(folders: list[Path], page: Path) -> Path:
    """Writes a page that compares several runs.

    Raises:
        InputError: One is not a run folder, or a file in it is damaged.
        SaveFailed: The page cannot be written.
    """
    found = map(ReportRun, folders)
    # Numbered, as folders in different places may have the same name.
    runs = {f"{i}. {run.folder.name}": run for i, run in enumerate(found, start=1)}
    figures = {}
    for metric in ("loss", "accuracy"):
        by_run = {name: statistics.epoch_curves(r.records, metric) for name, r in runs.items()}
        figures[metric] = curves.compare_runs(by_run, metric)
    differences = statistics.differences([run.config for run in runs.values()])
    context = {"runs": runs, "differences": differences, "figures": figures}
    _write_page(page, "comparison.html.jinja", context)
    return page


def _context(run: ReportRun) -> dict[str, Any]:
    """Computes and draws what the template shows, as far as there are data for it."""
    figures: dict[str, Figure] = {}
    if any(record["split"] == "train" for record in run.records):
        for metric in ("loss", "accuracy"):
            found = statistics.epoch_curves(run.records, metric)
            figures[metric] = curves.metric_curves({metric: [found]})
        rates = statistics.step_curve(run.records, "learning_rate")
        figures["learning_rate"] = curves.learning_rate(*rates)
    if len(run.throughput[0]):
        figures["throughput"] = curves.throughput(*run.throughput)
    draw = {"samples": images.tile, "filters": images.filter_grid}
    context = {
        "run": run,
        "figures": figures,
        "names": run.dataset.get("class_names", []),
        "made": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "splits": curves.SPLITS,
        "evaluated": run.split.removesuffix("_ema"),  # "test", or "validation" without a test
        "grids": {name: draw[name](run.arrays[name]) for name in draw if name in run.arrays},
        "defaults": _defaults(run.config["model.name"]),
        "model": _model_table(run.model),
    }
    if run.results and context["names"]:
        context |= _classes(run, context["names"], figures)
        if run.predictions:
            context |= _predictions(run, context["names"], figures)
    return context


def _classes(run: ReportRun, names: list[str], figures: dict[str, Figure]) -> dict[str, Any]:
    confusion = np.array(run.results[run.split]["confusion"])
    scores = statistics.class_scores(confusion)
    drawn = {"precision": scores.precision, "recall": scores.recall, "F1": scores.f1}
    figures["confusion"] = classes.confusion_matrix(confusion, names)
    figures["scores"] = classes.class_scores(drawn, names)
    rows = list(zip(names, *scores, statistics.most_confused(confusion), strict=True))
    return {
        "classes": rows,
        "worst_classes": sorted(rows, key=lambda row: (not row[4], row[3]))[:_MAX_CLASSES],
        "macro": scores.macro,
        "pairs": statistics.confused_pairs(confusion, _MAX_PAIRS),
    }


def _predictions(run: ReportRun, names: list[str], figures: dict[str, Figure]) -> dict[str, Any]:
    label, top, probabilities, label_probability = (
        run.predictions[name] for name in ("label", "classes", "probabilities", "label_probability")
    )
    confidence, correct = probabilities[:, 0], top[:, 0] == label
    calibration = statistics.calibration(confidence, correct)
    figures["calibration"] = classes.reliability_diagram(*calibration[:3])
    indices = run.arrays.get("misclassified_index", np.zeros(0, int))
    misclassified = [
        (i, image, names[label[i]], names[top[i, 0]], label_probability[i], confidence[i])
        for i, image in zip(indices, run.arrays.get("misclassified_images", ()), strict=True)
    ]
    if misclassified:
        captions = [
            f"{style.short(predicted)} {confidence:.0%}\nis {style.short(true)}"
            for _, _, true, predicted, _, confidence in misclassified
        ]
        shown = run.arrays["misclassified_images"]
        figures["misclassified"] = images.captioned_images(shown, captions)
    return {
        "calibration": calibration,
        "mean_confidence": confidence.mean(),
        "errors": int((~correct).sum()),
        "k": top.shape[1] if len(names) > top.shape[1] > 1 else None,
        "top_k_accuracy": (top == label[:, None]).any(axis=1).mean(),
        "misclassified": misclassified,
    }


def _defaults(model: str) -> dict[str, Any]:
    try:
        defaults = dict(flatten(default_config(model)))
    except InputError:  # a model that this version does not have
        return {}
    return {key: list(x) if isinstance(x, tuple) else x for key, x in defaults.items()}


def _model_table(text: str) -> dict[str, Any]:
    """Parses the table of parameters that `models.describe` writes."""
    lines = text.strip().splitlines()
    table = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    rows = [[cell.strip() for cell in row] for row in table]
    notes = [line for line in lines if not line.startswith(("|", "+"))]
    return {"head": rows[0] if rows else [], "rows": rows[1:], "notes": notes}


def show(value: Any) -> str:
    """Formats the value of an option as on a command line."""
    if value is None:
        return NOTHING
    if isinstance(value, list):
        return f"({', '.join(map(show, value))})"
    return repr(value) if value == "" else str(value)


def percent(share: float) -> str:
    """Formats a share, "97.5%"; a dash for NaN."""
    return NOTHING if np.isnan(share) else f"{share:.1%}"


def compact(count: int) -> str:
    """Formats a count with three digits and a unit, "61.1 M"."""
    for power, unit in ((9, "G"), (6, "M"), (3, "k")):
        if count >= 0.9995 * 10**power:  # 999,700 rounds to 1 M, not to 1000 k
            return f"{count / 10**power:.3g} {unit}"
    return str(count)


def data_uri(image: np.ndarray) -> str:
    """Returns an image uint8[H, W, 3 or 4] as a URI that holds it."""
    return f"data:image/png;base64,{base64.b64encode(style.image_png(image)).decode()}"


def _write_page(path: Path, template: str, context: dict[str, Any]) -> None:
    def svg(name: str, label: str) -> str:
        return style.svg(context["figures"][name], name.replace("_", "-"), label)

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,  # names of classes come from anywhere
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (compact, data_uri, duration, np.median, percent, show, format_accuracy):
        environment.filters[function.__name__] = function
    page = environment.get_template(template).render(context, svg=svg)
    files.write_text(path, page)
