"""AlexNet in Flax linen, trained with Optax on TFDS data.

`load` opens the network of a finished or running training run:

    network = alexnet_jax.load("runs/digits")
    print(network.predict("three.png").top(3))
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alexnet_jax.inference.predictor import Network

__all__ = ["load"]


def load(
    run: str | os.PathLike[str],
    *,
    checkpoint: str | int = "newest",
    ema: bool = True,
    seed: int | None = None,
) -> "Network":
    """Opens the network of a run, from its folder alone; the data set is not needed.

    Args:
        run: The run folder.
        checkpoint: "newest" (which ``results.json`` of a finished run is about), "best" by the
            accuracy on the validation images, or the step of a checkpoint.
        ema: Whether to use the exponential moving average of the weights, where the run keeps it.
        seed: Whose network, of a run of many seeds; None is the first.

    Returns:
        The network; `alexnet_jax.inference.predictor.Network` says what it can do.

    Raises:
        InputError: The folder holds no such network, or a damaged one.
    """
    from alexnet_jax.inference import predictor  # imports JAX, which takes seconds

    return predictor.load(run, checkpoint=checkpoint, ema=ema, seed=seed)
