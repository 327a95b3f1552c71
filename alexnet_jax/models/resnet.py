"""ResNet (He, Zhang, Ren, Sun, 2016, "Deep Residual Learning") with the stem for small images."""

import functools

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from alexnet_jax.models.layers import check_choice, check_counts, check_fraction
from alexnet_jax.ops import PLAIN, Ops


class ResNet(nn.Module):
    """Stages of basic blocks, each stage after the first at half the side and twice the width.

    The defaults are ResNet-18 with a 3x3 convolution of stride 1 in place of the 7x7 of stride 2
    and the pooling, as is usual for 32x32 pixels: 11,173,962 parameters for 10 classes. Where a
    block changes the shape, a 1x1 convolution with batch normalisation is its shortcut (option B).

    Attributes:
        num_classes: Length of the logits.
        blocks: Blocks in each stage.
        width: Channels of the first stage.
        norm_momentum: Share of the old running statistics kept at each step.
        dtype: "float32" or "bfloat16", of the arithmetic; parameters and logits are float32.
        axis_name: Mapped device axis to average batch statistics over, if any.
        ops: What to convolve with.
    """

    num_classes: int
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 64
    norm_momentum: float = 0.9
    dtype: str = "float32"
    axis_name: str | None = None
    ops: Ops = PLAIN

    def __post_init__(self) -> None:
        check_counts(blocks=self.blocks, width=self.width)
        check_fraction(norm_momentum=self.norm_momentum)
        check_choice(dtype=(self.dtype, ("float32", "bfloat16")))
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        """Computes logits, float32[B, num_classes], of float[B, H, W, C], normalised."""
        conv = functools.partial(
            nn.Conv,
            use_bias=False,
            kernel_init=nn.initializers.variance_scaling(2, "fan_out", "normal"),
            dtype=self.dtype,
            conv_general_dilated=self.ops.conv_general_dilated,
        )
        norm = functools.partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=self.norm_momentum,
            dtype=self.dtype,
            axis_name=self.axis_name,
        )
        x = conv(self.width, (3, 3), padding=1, name="conv1")(images.astype(self.dtype))
        x = nn.relu(norm(name="norm1")(x))
        for i, count in enumerate(self.blocks):
            for j in range(count):
                stride = 2 if i and not j else 1
                features, block = self.width * 2**i, f"stage{i + 1}_{j + 1}"
                y = conv(features, (3, 3), stride, padding=1, name=f"{block}_conv1")(x)
                y = nn.relu(norm(name=f"{block}_norm1")(y))
                y = conv(features, (3, 3), padding=1, name=f"{block}_conv2")(y)
                y = norm(name=f"{block}_norm2")(y)
                if x.shape != y.shape:
                    x = conv(features, (1, 1), stride, name=f"{block}_shortcut")(x)
                    x = norm(name=f"{block}_shortcut_norm")(x)
                x = nn.relu(x + y)
        x = x.mean(axis=(1, 2))
        x = nn.Dense(self.num_classes, dtype=self.dtype, name="logits")(x)
        return x.astype(jnp.float32)
