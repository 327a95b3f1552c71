"""ResNet (He, Zhang, Ren, Sun, 2016, "Deep Residual Learning") with the stem for small images."""

import functools

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jaxtyping import Float, Float32

from alexnet_jax.models.network import Network, fraction, size


class ResNet(Network):
    """Stages of basic blocks, each stage after the first at half the side and twice the width.

    The defaults are ResNet-18 with a 3x3 convolution of stride 1 in place of the 7x7 of stride 2
    and the pooling, as is usual for 32x32 pixels: 11,173,962 parameters for 10 classes. Where a
    block changes the shape, a 1x1 convolution with batch normalization is its shortcut (option B).
    """

    blocks: tuple[int, ...] = size((2, 2, 2, 2), "Blocks in each stage.")
    width: int = size(64, "Channels of the first stage.")
    norm_momentum: float = fraction(0.9, "Share of the old running statistics kept at each step.")

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool
    ) -> Float32[Array, "batch {self.num_classes}"]:
        """Computes logits of normalized images."""
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
