"""Train a network, or resume its training.

The same as ``python -m alexnet_jax.main``.
"""

from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Runs the command."""
    from alexnet_jax import main

    return main.run(arguments)
