"""AlexNet (Krizhevsky, Sutskever, Hinton, 2012), as one linen class with fields for what varies."""

import functools

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from alexnet_jax.errors import InputError
from alexnet_jax.models.layers import ConvReluPool, dirac
from alexnet_jax.models.whitening import NAME, Whitening
from alexnet_jax.ops import PLAIN, Ops

_KERNEL_INITS = {
    "he_normal": nn.initializers.he_normal(),
    "lecun_normal": nn.initializers.lecun_normal(),
    "dirac": dirac,
}
_NORMS = ("none", "batch")
_ACTIVATIONS = {
    "relu": nn.relu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "silu": nn.silu,
}
_MOST = 2**16  # Of channels, units and pixels: beyond, sizes overflow before they are compared.
_MOST_WHITENED = 7  # pixels: of larger patches the moments take too long to measure
_DTYPES = ("float32", "bfloat16")


class AlexNet(nn.Module):
    """Five convolutions with ReLU, max pooling after some, then fully connected layers.

    The defaults are the network for 32x32 images: the channels of the one-GPU AlexNet
    (Krizhevsky, 2014, "One weird trick for parallelizing convolutional neural networks") with
    3x3 kernels and without the stride-4 stem, which would leave nothing of so small an image.
    Dropout stands before each hidden layer, as there.

    Attributes:
        num_classes: Length of the logits.
        features: Output channels of each convolution.
        kernels: Side of each square kernel, in pixels.
        strides: Stride of each convolution.
        pools: Whether a max pooling follows each convolution.
        pool_window: Side of the pooling window, in pixels.
        pool_stride: Stride of the pooling; smaller than the window in the paper ("overlapping").
        hidden: Widths of the fully connected layers before the last.
        norm: "none", or "batch" for batch normalisation (Ioffe and Szegedy, 2015) between
            convolution and ReLU.
        norm_momentum: Share of the old running statistics kept at each step.
        norm_scale: Whether batch normalisation has a trained scale beside its bias; airbench
            (Jordan, 2024) has none.
        activation: "relu", "gelu" (Hendrycks and Gimpel, 2016) or "silu" (Elfwing et al., 2018),
            after each convolution and hidden layer.
        pool_first: Pool right after the convolution, before normalisation and activation, which
            then have fewer pixels to do (airbench).
        whitening: Side in pixels of the patches that a frozen first convolution whitens, beside
            those of `features`; 0 is none. See `alexnet_jax.models.whitening`.
        whitening_bias: Whether it has a trained bias. Without, nothing is differentiated that far
            back.
        dropout: Probability to drop an input of a hidden layer (Hinton et al., 2012).
        kernel_init: "he_normal" (He et al., 2015, for ReLU), "lecun_normal", or "dirac"
            (Zagoruyko and Komodakis, 2017): convolutions begin as the identity where they can, and
            all else as with "he_normal".
        logit_scale: What the last layer's results are multiplied by; airbench has 1/9.
        dtype: "float32" or "bfloat16", of the arithmetic; parameters and logits are float32.
        axis_name: Mapped device axis to average batch statistics over, if any.
        ops: What to convolve, pool and multiply with; no choice changes parameters or, beyond
            rounding, results.
    """

    num_classes: int
    features: tuple[int, ...] = (64, 192, 384, 256, 256)
    kernels: tuple[int, ...] = (3, 3, 3, 3, 3)
    strides: tuple[int, ...] = (1, 1, 1, 1, 1)
    pools: tuple[bool, ...] = (True, True, False, False, True)
    pool_window: int = 2
    pool_stride: int = 2
    hidden: tuple[int, ...] = (4096, 4096)
    norm: str = "none"
    norm_momentum: float = 0.9
    norm_scale: bool = True
    activation: str = "relu"
    pool_first: bool = False
    whitening: int = 0
    whitening_bias: bool = True
    dropout: float = 0.5
    kernel_init: str = "he_normal"
    logit_scale: float = 1.0
    dtype: str = "float32"
    axis_name: str | None = None
    ops: Ops = PLAIN

    def __post_init__(self) -> None:
        _check(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        """Computes logits.

        Args:
            images: float[B, H, W, C], normalised.
            train: Whether to drop units and to use and update batch statistics; needs the rng
                "dropout", and "batch_stats" mutable if `norm` is "batch".

        Returns:
            float32[B, num_classes], unnormalised log probabilities.

        Raises:
            InputError: The images are so small that a pooling would leave nothing.
        """
        init, activate = _KERNEL_INITS[self.kernel_init], _ACTIVATIONS[self.activation]
        x = images.astype(self.dtype)
        if self.whitening:
            whiten = Whitening(self.whitening, self.whitening_bias, self.dtype, self.ops, name=NAME)
            x = activate(whiten(x))
        layers = zip(self.features, self.kernels, self.strides, self.pools, strict=True)
        for i, (features, kernel, stride, pool) in enumerate(layers, start=1):
            left = [(side + 2 * (kernel // 2) - kernel) // stride + 1 for side in x.shape[1:3]]
            if pool and min(left) < self.pool_window:
                raise InputError(
                    f"images of {images.shape[1]}x{images.shape[2]} pixels are too small for "
                    f"this network: {left[0]}x{left[1]} are left before the pooling "
                    f"after convolution {i}, whose window is {self.pool_window}."
                )
            window = (self.pool_window, self.pool_stride) if pool else None
            if self.norm == "none" and self.activation == "relu":  # in whatever order
                layer = ConvReluPool(
                    features, kernel, stride, window, init, self.ops, name=f"conv{i}"
                )
                x = layer(x)
                continue
            x = nn.Conv(
                features,
                (kernel, kernel),
                (stride, stride),
                padding=kernel // 2,
                use_bias=self.norm == "none",  # batch normalisation brings its own
                kernel_init=init,
                dtype=self.dtype,
                conv_general_dilated=self.ops.conv_general_dilated,
                name=f"conv{i}",
            )(x)
            if window and self.pool_first:
                x = self.ops.max_pool(x, window[:1] * 2, window[1:] * 2)
            if self.norm == "batch":
                x = nn.BatchNorm(
                    use_running_average=not train,
                    momentum=self.norm_momentum,
                    dtype=self.dtype,
                    use_scale=self.norm_scale,
                    axis_name=self.axis_name,
                    name=f"norm{i}",
                )(x)
            x = activate(x)
            if window and not self.pool_first:
                x = self.ops.max_pool(x, window[:1] * 2, window[1:] * 2)
        dense = functools.partial(
            nn.Dense,
            dtype=self.dtype,
            promote_dtype=self.ops.promote_dtype,
            dot_general=self.ops.dot_general,
        )
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.hidden, start=1):
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
            x = dense(width, kernel_init=init, name=f"fc{i}")(x)
            x = activate(x)
        x = dense(self.num_classes, name="logits")(x)
        return x.astype(jnp.float32) * self.logit_scale


def _check(model: AlexNet) -> None:
    """Refuses impossible fields; no method, for linen would count its call as the network's."""
    for name in ("kernels", "strides", "pools"):
        values = getattr(model, name)
        if len(values) != len(model.features):
            raise InputError(
                f"config.model.{name} is {tuple(values)}; it must have one entry per "
                f"convolution, {len(model.features)} as config.model.features has."
            )
    for name in ("features", "kernels", "strides", "hidden", "pool_window", "pool_stride"):
        values = getattr(model, name)
        for value in values if isinstance(values, (tuple, list)) else (values,):
            if not 1 <= value <= _MOST:
                raise InputError(
                    f"config.model.{name} is {values}; it must be between 1 and {_MOST}."
                )
    if not model.features:
        raise InputError("config.model.features is empty; it needs at least one convolution.")
    for name, right in (
        ("norm", _NORMS),
        ("activation", _ACTIVATIONS),
        ("kernel_init", _KERNEL_INITS),
        ("dtype", _DTYPES),
    ):
        if getattr(model, name) not in right:
            raise InputError(
                f"config.model.{name} is {getattr(model, name)!r}; "
                f"it must be one of {', '.join(right)}."
            )
    if not 0 <= model.whitening <= _MOST_WHITENED:
        raise InputError(
            f"config.model.whitening is {model.whitening}; "
            f"it must be between 0, which is none, and {_MOST_WHITENED}."
        )
    if not model.logit_scale > 0:
        raise InputError(
            f"config.model.logit_scale is {model.logit_scale}; it must be greater than 0."
        )
    for name in ("dropout", "norm_momentum"):
        if not 0 <= getattr(model, name) < 1:
            raise InputError(
                f"config.model.{name} is {getattr(model, name)}; "
                "it must be at least 0 and less than 1."
            )
