"""The contract of a network: what every one in `MODELS` has in common."""

from typing import Any, Literal, TypeVar

from flax import linen as nn

from alexnet_jax.ops import PLAIN, Ops
from alexnet_jax.options import check_options, option

T = TypeVar("T")


class Network(nn.Module):
    """Base of the networks; fields of a subclass that are declared by `option` are its options.

    A subclass defines `__call__(images: float[B, H, W, 3], *, train: bool)`, which returns logits,
    float32[B, num_classes]. Parameters are float32. Batch statistics are in a collection of their
    own, averaged over `axis_name`. The last layer is named "logits"; fine-tuning reinitializes it.

    Attributes:
        num_classes: Number of logits.
        axis_name: Mapped device axis to average batch statistics over, if any.
        ops: What it computes with; no choice changes parameters or, beyond rounding, results.
    """

    num_classes: int
    dtype: Literal["float32", "bfloat16"] = option(
        "float32", "Precision of the arithmetic; parameters and logits are float32."
    )
    axis_name: str | None = None
    ops: Ops = PLAIN

    def __post_init__(self) -> None:
        check_options(self, "model")
        super().__post_init__()


def size(default: T, help: str, *, at_least: int = 1) -> T:
    """Declares an option that is a number of channels, units or pixels, or a tuple of such."""
    # Larger ones could overflow before they are compared.
    return option(default, help, at_least=at_least, at_most=2**16)


def fraction(default: float, help: str) -> Any:
    """Declares an option that is at least 0 and less than 1."""
    return option(default, help, at_least=0, below=1)
