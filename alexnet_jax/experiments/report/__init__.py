"""What a person looks at when a run has ended: ``report.html``, its figures, and class by class.

`inputs` is what a run leaves for it; `statistics` works out figures, `figures` draws them, `page`
puts them together. Nothing here needs the data set, and only drawing needs Matplotlib.
"""

from alexnet_jax.experiments.report.page import plot_curves, write_comparison, write_report
from alexnet_jax.experiments.report.statistics import (
    class_table,
    epoch_curves,
    per_class_accuracy,
    tested_split,
)

__all__ = [
    "class_table",
    "epoch_curves",
    "per_class_accuracy",
    "plot_curves",
    "tested_split",
    "write_comparison",
    "write_report",
]
