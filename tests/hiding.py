"""Hides TensorFlow and TensorBoard from a process, as if they were not installed."""

import importlib.machinery
import importlib.util
import sys

FINDER = importlib.machinery.PathFinder


class Hiding:
    """Finds what Python finds, but for these."""

    find_distributions = FINDER.find_distributions
    invalidate_caches = staticmethod(lambda: None)

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in ("tensorflow", "tensorboard"):
            return None
        return FINDER.find_spec(name, path, target)


def hide_tensorflow():
    """Begins to; what is imported already stays."""
    sys.meta_path[sys.meta_path.index(FINDER)] = Hiding
    assert importlib.util.find_spec("tensorflow") is None
