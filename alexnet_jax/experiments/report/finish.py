"""What a run shows at its end: curves, the report, and the results in the log."""

import logging
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_jax.errors import InputError, SaveFailed
from alexnet_jax.experiments.report.statistics import class_table, reported_split
from alexnet_jax.metrics import format_accuracy
from alexnet_jax.run import directory, files
from alexnet_jax.run.writers import METRICS, duration, read_metrics

log = logging.getLogger(__name__)


def plot_curves(folder: Path) -> None:
    """Draws ``curves.png``, also of a run that is not finished."""
    from alexnet_jax.experiments.report import page  # 0.5 s of Matplotlib

    config = files.read_json(folder / directory.CONFIG)
    title = f"{config['model.name']} on {config['data.name']}: {folder.name}"
    page.plot_curves(read_metrics(folder / METRICS), folder / "curves.png", title)


def make_report(folder: Path) -> None:
    """Makes the report of a finished run that has none; the results are safe whatever happens."""
    if (folder / directory.REPORT).exists():
        return
    log.info("Making the report.")
    try:
        from alexnet_jax.experiments.report import page  # 0.5 s of Matplotlib

        page.write_report(folder)
    except (InputError, SaveFailed):
        raise
    except Exception as error:
        log.warning(
            "The report could not be made (%s: %s); the results are safe, and "
            "`alexnet-jax report %s` tries again.",
            type(error).__name__,
            error,
            shlex.quote(str(folder)),
        )


def log_results(folder: Path, results: dict[str, Any]) -> None:
    """Logs how good the network is, on what, and where everything is."""
    names = directory.read_dataset(folder)["class_names"]
    split = reported_split(results)
    table = class_table(np.array(results[split]["confusion"]), tuple(names))
    which = "Test" if split.startswith("test") else "Validation"
    log.info("\n%s set, class by class:\n%s\n", which, table)
    for split in directory.SPLITS:
        if split in results:
            accuracy = format_accuracy(results[split])
            log.info("%-18s loss %.4f  accuracy %s", split, results[split]["loss"], accuracy)
    log.info(
        "\n%s steps, %d epochs, %s of training. Everything is in %s:\n"
        "  report.html (open it in a browser), figures/, results.json, metrics.jsonl, checkpoints/",
        f"{results['step']:,}",
        results["epochs"],
        duration(results["train_seconds"]),
        folder,
    )
