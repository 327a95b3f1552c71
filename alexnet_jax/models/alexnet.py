"""AlexNet (Krizhevsky, Sutskever, Hinton, 2012), as one linen class with fields for what varies."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.initializers import Initializer, ones, zeros
from jax import Array

from alexnet_jax.errors import InputError, show
from alexnet_jax.models.layers import (
    ConvReluPool,
    adaptive_average_pool,
    check_choice,
    check_counts,
    check_fraction,
    dirac,
    local_response_norm,
)
from alexnet_jax.models.whitening import NAME, Whitening
from alexnet_jax.ops import PLAIN, Ops

_KERNEL_INITS: dict[str, Initializer] = {
    "he_normal": nn.initializers.he_normal(),
    "lecun_normal": nn.initializers.lecun_normal(),
    "dirac": dirac,
    "normal": nn.initializers.normal(0.01),
}
_NORMS = ("none", "batch")
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": nn.relu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "silu": nn.silu,
}
_DROPOUT_OF = ("inputs", "outputs")
_MAY_BE_EMPTY = ("paddings", "groups", "response_norms")
_MOST_WHITENED = 7  # pixels: of larger patches the moments take too long to measure
_DTYPES = ("float32", "bfloat16")


class AlexNet(nn.Module):
    """Five convolutions with ReLU, max pooling after some, then fully connected layers.

    The defaults are the network for 32x32 images: the channels of the one-GPU AlexNet
    (Krizhevsky, 2014, "One weird trick for parallelizing convolutional neural networks") with
    3x3 kernels and without the stride-4 stem, which would leave nothing of so small an image.
    Dropout stands before each hidden layer, as there. `AlexNet2012` and `AlexNetOWT` are the
    published networks: this class with other defaults.

    Attributes:
        num_classes: Length of the logits.
        features: Output channels of each convolution.
        kernels: Side of each square kernel, in pixels.
        strides: Stride of each convolution.
        paddings: Zeros at each edge of each convolution's input; () is half of each kernel.
        groups: In how many groups the channels of each convolution are split; () is 1 everywhere.
        response_norms: After which convolutions' ReLU the local response normalisation of the
            paper stands, before the pooling unless `pool_first`; () is none.
        pools: Whether a max pooling follows each convolution.
        pool_window: Side of the pooling window, in pixels.
        pool_stride: Stride of the pooling; smaller than the window in the paper ("overlapping").
        pool_to: Side, in pixels, that averages over equal parts bring the last feature map to, so
            that the network takes images of any size; 0 leaves it as it is.
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
        dropout: Probability to drop a unit around a hidden layer (Hinton et al., 2012).
        dropout_of: "inputs" or "outputs" of the hidden layers.
        kernel_init: "he_normal" (He et al., 2015, for ReLU), "lecun_normal", "dirac" (Zagoruyko
            and Komodakis, 2017): convolutions begin as the identity where they can, and all else
            as with "he_normal"; or "normal" with a deviation of 0.01, as in the paper.
        bias_ones: Names of the layers whose bias starts at 1 and not at 0.
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
    paddings: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    response_norms: tuple[bool, ...] = ()
    pools: tuple[bool, ...] = (True, True, False, False, True)
    pool_window: int = 2
    pool_stride: int = 2
    pool_to: int = 0
    hidden: tuple[int, ...] = (4096, 4096)
    norm: str = "none"
    norm_momentum: float = 0.9
    norm_scale: bool = True
    activation: str = "relu"
    pool_first: bool = False
    whitening: int = 0
    whitening_bias: bool = True
    dropout: float = 0.5
    dropout_of: str = "inputs"
    kernel_init: str = "he_normal"
    bias_ones: tuple[str, ...] = ()
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
        biases = dict.fromkeys(self.bias_ones, ones)
        x = images.astype(self.dtype)
        if self.whitening:
            whiten = Whitening(self.whitening, self.whitening_bias, self.dtype, self.ops, name=NAME)
            x = activate(whiten(x))
        layers = zip(
            self.features,
            self.kernels,
            self.strides,
            self.paddings or [kernel // 2 for kernel in self.kernels],
            self.groups or [1] * len(self.features),
            self.response_norms or [False] * len(self.features),
            self.pools,
            strict=True,
        )
        for i, (features, kernel, stride, padding, groups, response_norm, pool) in enumerate(
            layers, start=1
        ):
            left = [(side + 2 * padding - kernel) // stride + 1 for side in x.shape[1:3]]
            if min(left) < (self.pool_window if pool else 1):
                raise InputError(
                    f"images of {images.shape[1]}x{images.shape[2]} pixels are too small for "
                    f"this network: {max(0, left[0])}x{max(0, left[1])} are left "
                    + (
                        f"before the pooling after convolution {i}, whose window is "
                        f"{self.pool_window}."
                        if pool
                        else f"after convolution {i}."
                    )
                )
            window = (self.pool_window, self.pool_stride) if pool else None
            bias_init = biases.get(f"conv{i}", zeros)
            ordinary = self.norm == "none" and self.activation == "relu" and not response_norm
            if ordinary and groups == 1 and padding == kernel // 2:  # pooling in whatever order
                layer = ConvReluPool(
                    features, kernel, stride, window, init, self.ops, bias_init, name=f"conv{i}"
                )
                x = layer(x)
                continue
            by_group = functools.partial(dirac, groups=groups)
            x = nn.Conv(
                features,
                (kernel, kernel),
                (stride, stride),
                padding=padding,
                feature_group_count=groups,
                use_bias=self.norm == "none",  # batch normalisation brings its own
                kernel_init=by_group if init is dirac else init,
                bias_init=bias_init,
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
            if response_norm:
                x = local_response_norm(x)
            if window and not self.pool_first:
                x = self.ops.max_pool(x, window[:1] * 2, window[1:] * 2)
        if self.pool_to:
            x = adaptive_average_pool(x, self.pool_to)
        dense = functools.partial(
            nn.Dense,
            dtype=self.dtype,
            promote_dtype=self.ops.promote_dtype,
            dot_general=self.ops.dot_general,
        )
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.hidden, start=1):
            if self.dropout_of == "inputs":
                x = nn.Dropout(self.dropout, deterministic=not train)(x)
            bias_init = biases.get(f"fc{i}", zeros)
            x = dense(width, kernel_init=init, bias_init=bias_init, name=f"fc{i}")(x)
            x = activate(x)
            if self.dropout_of == "outputs":
                x = nn.Dropout(self.dropout, deterministic=not train)(x)
        # No activation follows this one, for which the other ways to initialise are.
        logits_init = init if self.kernel_init == "normal" else nn.initializers.lecun_normal()
        x = dense(self.num_classes, kernel_init=logits_init, name="logits")(x)
        return x.astype(jnp.float32) * self.logit_scale


class AlexNet2012(AlexNet):
    """The network of Krizhevsky, Sutskever and Hinton (2012), for 227x227 pixels.

    Feature maps of 55, 27, 13, 13, 13 and 6 pixels, 60,965,224 parameters for 1,000 classes.
    Images on the scale 0..255 minus their mean (config.data.normalization "subtract_mean") suit
    the small initial kernels and the constants of the response normalisation.
    """

    features: tuple[int, ...] = (96, 256, 384, 384, 256)
    kernels: tuple[int, ...] = (11, 5, 3, 3, 3)
    strides: tuple[int, ...] = (4, 1, 1, 1, 1)
    paddings: tuple[int, ...] = (0, 2, 1, 1, 1)
    groups: tuple[int, ...] = (1, 2, 1, 2, 2)
    response_norms: tuple[bool, ...] = (True, True, False, False, False)
    pool_window: int = 3
    dropout_of: str = "outputs"
    kernel_init: str = "normal"
    bias_ones: tuple[str, ...] = ("conv2", "conv4", "conv5", "fc1", "fc2")


class AlexNetOWT(AlexNet):
    """The network of Krizhevsky (2014), "One weird trick", as torchvision has it: for 224x224.

    61,100,840 parameters for 1,000 classes, whatever the size of the images, from 63x63 on.
    """

    kernels: tuple[int, ...] = (11, 5, 3, 3, 3)
    strides: tuple[int, ...] = (4, 1, 1, 1, 1)
    paddings: tuple[int, ...] = (2, 2, 1, 1, 1)
    pool_window: int = 3
    pool_to: int = 6


def _check(model: AlexNet) -> None:
    """Refuses impossible fields; no method, for linen would count its call as the network's."""
    for name in ("kernels", "strides", "pools", *_MAY_BE_EMPTY):
        values = getattr(model, name)
        if len(values) != len(model.features) and not (name in _MAY_BE_EMPTY and not values):
            raise InputError(
                f"config.model.{name} is {show(tuple(values))}; it must have one entry per "
                f"convolution, {len(model.features)} as config.model.features has"
                f"{', or none' * (name in _MAY_BE_EMPTY)}."
            )
        kind = bool if name in ("pools", "response_norms") else int
        if any(type(value) is not kind for value in values):
            raise InputError(
                f"config.model.{name} is {show(tuple(values))}; its entries must be "
                f"{'True or False' if kind is bool else 'integers'}."
            )
    counts = ("features", "kernels", "strides", "groups", "hidden", "pool_window", "pool_stride")
    check_counts(**{name: getattr(model, name) for name in counts})
    check_counts(0, paddings=model.paddings, pool_to=model.pool_to)
    if not model.features:
        raise InputError("config.model.features is empty; it needs at least one convolution.")
    check_choice(
        norm=(model.norm, _NORMS),
        activation=(model.activation, _ACTIVATIONS),
        dropout_of=(model.dropout_of, _DROPOUT_OF),
        kernel_init=(model.kernel_init, _KERNEL_INITS),
        dtype=(model.dtype, _DTYPES),
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
    check_fraction(dropout=model.dropout, norm_momentum=model.norm_momentum)
    for i, groups in enumerate(model.groups):
        channels = model.features[i - 1] if i else 3 * max(1, 2 * model.whitening**2)
        if channels % groups or model.features[i] % groups:
            raise InputError(
                f"config.model.groups is {show(tuple(model.groups))}; {groups} groups cannot "
                f"equally share the channels of convolution {i + 1}, {channels} in and "
                f"{model.features[i]} out."
            )
    known = [f"conv{i + 1}" for i in range(len(model.features)) if model.norm == "none"]
    known += [f"fc{i + 1}" for i in range(len(model.hidden))]
    for layer in model.bias_ones:
        if layer not in known:
            raise InputError(
                f"config.model.bias_ones is {show(tuple(model.bias_ones))}; the layers with a "
                f"bias, which it may name, are {', '.join(known)}."
            )
