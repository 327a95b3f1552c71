"""``report.html`` and its figures, from the files of a run folder alone.

`inputs` are what a run saves for it; `statistics` are computed from them; `page` shows them.
"""

from alexnet_jax.experiments.report.statistics import class_table, epoch_curves, reported_split

__all__ = ["class_table", "epoch_curves", "reported_split"]
