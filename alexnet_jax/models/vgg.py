"""VGG (Simonyan and Zisserman, 2015) with batch normalisation (Ioffe and Szegedy, 2015)."""

import functools

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jaxtyping import Float, Float32

from alexnet_jax.errors import InputError
from alexnet_jax.models.network import Network, fraction, size


class VGG(Network):
    """Stages of 3x3 convolutions, each stage followed by a 2x2 max pooling.

    The defaults are configuration A, with 8 convolutions, and one matrix after them, as is usual
    for 32x32 pixels (vgg11_bn): 9,231,114 parameters for 10 classes. The paper's two hidden layers
    are hidden=(4096, 4096), with which 224x224 pixels and 1,000 classes make the 132,868,840
    parameters of torchvision. As there, the convolutions have biases beside batch normalization.
    """

    stages: tuple[int, ...] = size((1, 1, 2, 2, 2), "Convolutions in each stage.")
    features: tuple[int, ...] = size((64, 128, 256, 512, 512), "Channels of each stage.")
    hidden: tuple[int, ...] = size((), "Widths of the fully connected hidden layers.")
    dropout: float = fraction(0.5, "Probability to drop an output of a hidden layer.")
    norm_momentum: float = fraction(0.9, "Share of the old running statistics kept at each step.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.stages) != len(self.features):
            raise InputError(
                f"config.model.features is {self.features}; it must have one entry per stage, "
                f"{len(self.stages)} as config.model.stages has."
            )

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool
    ) -> Float32[Array, "batch {self.num_classes}"]:
        """Computes logits of normalized images; too small ones raise an InputError."""
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
