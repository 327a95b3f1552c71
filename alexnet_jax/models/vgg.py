"""VGG (Simonyan and Zisserman, 2015) with batch normalisation (Ioffe and Szegedy, 2015)."""

import functools

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from alexnet_jax.errors import InputError
from alexnet_jax.models.layers import check_choice, check_counts, check_fraction
from alexnet_jax.ops import PLAIN, Ops


class VGG(nn.Module):
    """Stages of 3x3 convolutions, each stage followed by a 2x2 max pooling.

    The defaults are configuration A, with 8 convolutions, and one matrix behind them, as is usual
    for 32x32 pixels (vgg11_bn): 9,231,114 parameters for 10 classes. The paper's two hidden layers
    are hidden=(4096, 4096), with which 224x224 pixels and 1,000 classes make the 132,868,840
    parameters of torchvision. The convolutions keep their biases, as there, beside those of batch
    normalisation.

    Attributes:
        num_classes: Length of the logits.
        stages: Convolutions in each stage.
        features: Channels of each stage.
        hidden: Widths of the fully connected layers before the last.
        dropout: Probability to drop an output of these.
        norm_momentum: Share of the old running statistics kept at each step.
        dtype: "float32" or "bfloat16", of the arithmetic; parameters and logits are float32.
        axis_name: Mapped device axis to average batch statistics over, if any.
        ops: What to convolve, pool and multiply with.
    """

    num_classes: int
    stages: tuple[int, ...] = (1, 1, 2, 2, 2)
    features: tuple[int, ...] = (64, 128, 256, 512, 512)
    hidden: tuple[int, ...] = ()
    dropout: float = 0.5
    norm_momentum: float = 0.9
    dtype: str = "float32"
    axis_name: str | None = None
    ops: Ops = PLAIN

    def __post_init__(self) -> None:
        check_counts(stages=self.stages, features=self.features, hidden=self.hidden)
        check_fraction(dropout=self.dropout, norm_momentum=self.norm_momentum)
        check_choice(dtype=(self.dtype, ("float32", "bfloat16")))
        if len(self.stages) != len(self.features):
            raise InputError(
                f"config.model.features is {self.features}; it must have one entry per stage, "
                f"{len(self.stages)} as config.model.stages has."
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        """Computes logits, float32[B, num_classes], of float[B, H, W, C], normalised.

        Raises:
            InputError: The images are so small that a pooling would leave nothing.
        """
        x = images.astype(self.dtype)
        for i, (count, features) in enumerate(zip(self.stages, self.features, strict=True)):
            if min(x.shape[1:3]) < 2:
                raise InputError(
                    f"images of {images.shape[1]}x{images.shape[2]} pixels are too small for "
                    f"this network; it halves them {len(self.stages)} times."
                )
            for j in range(count):
                x = nn.Conv(
                    features,
                    (3, 3),
                    padding=1,
                    kernel_init=nn.initializers.variance_scaling(2, "fan_out", "normal"),
                    dtype=self.dtype,
                    conv_general_dilated=self.ops.conv_general_dilated,
                    name=f"conv{i + 1}_{j + 1}",
                )(x)
                x = nn.BatchNorm(
                    use_running_average=not train,
                    momentum=self.norm_momentum,
                    dtype=self.dtype,
                    axis_name=self.axis_name,
                    name=f"norm{i + 1}_{j + 1}",
                )(x)
                x = nn.relu(x)
            x = self.ops.max_pool(x, (2, 2), (2, 2))
        dense = functools.partial(
            nn.Dense,
            kernel_init=nn.initializers.normal(0.01),
            dtype=self.dtype,
            promote_dtype=self.ops.promote_dtype,
            dot_general=self.ops.dot_general,
        )
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.hidden, start=1):
            x = nn.relu(dense(width, name=f"fc{i}")(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return dense(self.num_classes, name="logits")(x).astype(jnp.float32)
