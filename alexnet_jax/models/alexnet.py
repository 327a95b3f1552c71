"""AlexNet (Krizhevsky, Sutskever, Hinton, 2012): one class with options for what varies."""

import functools
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.initializers import Initializer, ones, zeros
from jax import Array
from jaxtyping import Float, Float32

from alexnet_jax.errors import InputError, show
from alexnet_jax.models import layers
from alexnet_jax.models.network import Network, fraction, size
from alexnet_jax.models.whitening import NAME, Whitening
from alexnet_jax.options import option

Activation = Literal["relu", "gelu", "silu"]
DropoutOf = Literal["inputs", "outputs"]
KernelInit = Literal["he_normal", "lecun_normal", "dirac", "normal"]

_KERNEL_INITS: dict[KernelInit, Initializer] = {
    "he_normal": nn.initializers.he_normal(),
    "lecun_normal": nn.initializers.lecun_normal(),
    "dirac": layers.dirac,
    "normal": nn.initializers.normal(0.01),
}
_ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "relu": nn.relu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "silu": nn.silu,
}
_MAY_BE_EMPTY = ("paddings", "groups", "response_norms")


class AlexNet(Network):
    """Five convolutions with ReLU, max pooling after some, then fully connected layers.

    The defaults are the network for 32x32 images: the channels of the one-GPU AlexNet
    (Krizhevsky, 2014, "One weird trick for parallelizing convolutional neural networks") with
    3x3 kernels and without the stride-4 stem, which would leave nothing of so small an image.
    `AlexNet2012` and `AlexNetOWT` are the published networks: this class with other defaults.

    Local response normalization is that of the paper. Batch normalization (Ioffe and Szegedy,
    2015) is between convolution and activation; from airbench (Jordan, 2024) are pooling before
    both, which leaves them fewer pixels, normalization without a scale, whitening
    (`alexnet_jax.models.whitening`), and a logit scale of 1/9. GELU is of Hendrycks and Gimpel
    (2016), SiLU of Elfwing et al. (2018), dropout of Hinton et al. (2012).
    """

    features: tuple[int, ...] = size(
        (64, 192, 384, 256, 256), "Output channels of each convolution."
    )
    kernels: tuple[int, ...] = size((3, 3, 3, 3, 3), "Side of each square kernel, in pixels.")
    strides: tuple[int, ...] = size((1, 1, 1, 1, 1), "Stride of each convolution.")
    paddings: tuple[int, ...] = size(
        (), "Zeros at each edge of each convolution; () is half of each kernel.", at_least=0
    )
    groups: tuple[int, ...] = size(
        (), "Groups that the channels of each convolution are split into; () is 1 everywhere."
    )
    response_norms: tuple[bool, ...] = option(
        (), "Whether local response normalization follows each convolution's ReLU; () is none."
    )
    pools: tuple[bool, ...] = option(
        (True, True, False, False, True), "Whether max pooling follows each convolution."
    )
    pool_window: int = size(2, "Side of the pooling window, in pixels.")
    pool_stride: int = size(2, "Stride of the pooling; the paper's is smaller than the window.")
    pool_to: int = size(
        0,
        "Side, in pixels, that adaptive average pooling reduces the last feature map to, for "
        "images of any size; 0 is off.",
        at_least=0,
    )
    hidden: tuple[int, ...] = size((4096, 4096), "Widths of the fully connected hidden layers.")
    norm: Literal["none", "batch"] = option("none", "Normalization after each convolution.")
    norm_momentum: float = fraction(0.9, "Share of the old running statistics kept at each step.")
    norm_scale: bool = option(True, "Whether batch normalization has a trained scale.")
    activation: Activation = option("relu", "After each convolution and hidden layer.")
    pool_first: bool = option(False, "Pool right after the convolution.")
    whitening: int = option(
        0,
        "Side, in pixels, of the patches that a frozen first convolution whitens; 0 is off.",
        at_least=0,
        at_most=7,  # of larger ones the moments take too long to measure
    )
    whitening_bias: bool = option(
        True, "Whether the whitening has a trained bias; if not, no gradient is computed for it."
    )
    dropout: float = fraction(0.5, "Probability to drop a unit of a hidden layer.")
    dropout_of: DropoutOf = option("inputs", "Side of the hidden layers with dropout.")
    kernel_init: KernelInit = option(
        "he_normal",
        'Initializer; "dirac" is the identity where possible, else "he_normal"; "normal" is '
        "N(0, 0.01) as in the paper.",
    )
    bias_ones: tuple[str, ...] = option((), "Layers whose bias is initialized to 1, not 0.")
    logit_scale: float = option(1.0, "Factor of the logits.", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self)

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool
    ) -> Float32[Array, "batch {self.num_classes}"]:
        """Computes logits of normalized images; too small ones raise an InputError.

        In training, dropout needs the rng "dropout", and the norm "batch" uses the statistics of
        the batch and updates the collection "batch_stats", which must be mutable.
        """
        x = images.astype(self.dtype)
        if self.whitening:
            whiten = Whitening(self.whitening, self.whitening_bias, self.dtype, self.ops, name=NAME)
            x = _ACTIVATIONS[self.activation](whiten(x))
        for i in range(len(self.features)):
            x = self._convolve(x, i, images.shape[1:3], train)
        if self.pool_to:
            x = layers.adaptive_average_pool(x, self.pool_to)
        return self._classify(x.reshape(x.shape[0], -1), train) * self.logit_scale

    def _convolve(self, x: Array, i: int, image_size: tuple[int, ...], train: bool) -> Array:
        """Applies convolution i and what follows it, in the order of the options."""
        name, kernel, stride = f"conv{i + 1}", self.kernels[i], self.strides[i]
        padding = self.paddings[i] if self.paddings else kernel // 2
        groups = self.groups[i] if self.groups else 1
        response_norm = bool(self.response_norms) and self.response_norms[i]
        pool = (self.pool_window, self.pool_stride) if self.pools[i] else None
        left = [(side + 2 * padding - kernel) // stride + 1 for side in x.shape[1:3]]
        _check_size(image_size, left, name, pool)
        init, bias_init = _KERNEL_INITS[self.kernel_init], self._bias_init(name)
        plain = self.norm == "none" and self.activation == "relu" and not response_norm
        if plain and groups == 1 and padding == kernel // 2:  # pooling in whatever order
            return layers.ConvReluPool(
                self.features[i], kernel, stride, pool, init, self.ops, bias_init, name=name
            )(x)
        if self.kernel_init == "dirac":
            init = functools.partial(layers.dirac, groups=groups)
        x = nn.Conv(
            self.features[i],
            (kernel, kernel),
            (stride, stride),
            padding=padding,
            feature_group_count=groups,
            use_bias=self.norm == "none",  # batch normalization has its own
            kernel_init=init,
            bias_init=bias_init,
            dtype=self.dtype,
            conv_general_dilated=self.ops.conv_general_dilated,
            name=name,
        )(x)
        if pool and self.pool_first:
            x = self.ops.max_pool(x, pool[:1] * 2, pool[1:] * 2)
        if self.norm == "batch":
            x = nn.BatchNorm(
                use_running_average=not train,
                momentum=self.norm_momentum,
                dtype=self.dtype,
                use_scale=self.norm_scale,
                axis_name=self.axis_name,
                name=f"norm{i + 1}",
            )(x)
        x = _ACTIVATIONS[self.activation](x)
        if response_norm:
            x = layers.local_response_norm(x)
        if pool and not self.pool_first:
            x = self.ops.max_pool(x, pool[:1] * 2, pool[1:] * 2)
        return x

    def _classify(self, x: Array, train: bool) -> Array:
        """Applies the fully connected layers."""
        init, activate = _KERNEL_INITS[self.kernel_init], _ACTIVATIONS[self.activation]
        dense = functools.partial(
            nn.Dense,
            dtype=self.dtype,
            promote_dtype=self.ops.promote_dtype,
            dot_general=self.ops.dot_general,
        )
        for i, width in enumerate(self.hidden, start=1):
            dropout = nn.Dropout(self.dropout, deterministic=not train)
            if self.dropout_of == "inputs":
                x = dropout(x)
            bias_init = self._bias_init(f"fc{i}")
            x = activate(dense(width, kernel_init=init, bias_init=bias_init, name=f"fc{i}")(x))
            if self.dropout_of == "outputs":
                x = dropout(x)
        # No activation follows this one, which the other initializers are for.
        logits_init = init if self.kernel_init == "normal" else nn.initializers.lecun_normal()
        x = dense(self.num_classes, kernel_init=logits_init, name="logits")(x)
        return x.astype(jnp.float32)

    def _bias_init(self, layer: str) -> Initializer:
        return ones if layer in self.bias_ones else zeros


class AlexNet2012(AlexNet):
    """The network of Krizhevsky, Sutskever and Hinton (2012), for 227x227 pixels.

    Feature maps of 55, 27, 13, 13, 13 and 6 pixels, 60,965,224 parameters for 1,000 classes.
    Images on the scale 0..255 minus their mean (config.data.normalization "subtract_mean") suit
    the small initial kernels and the constants of the response normalization.
    """

    features: tuple[int, ...] = (96, 256, 384, 384, 256)
    kernels: tuple[int, ...] = (11, 5, 3, 3, 3)
    strides: tuple[int, ...] = (4, 1, 1, 1, 1)
    paddings: tuple[int, ...] = (0, 2, 1, 1, 1)
    groups: tuple[int, ...] = (1, 2, 1, 2, 2)
    response_norms: tuple[bool, ...] = (True, True, False, False, False)
    pool_window: int = 3
    dropout_of: DropoutOf = "outputs"
    kernel_init: KernelInit = "normal"
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


# No methods, as linen would count their calls as the network's.


def _check_size(
    images: tuple[int, ...], left: list[int], layer: str, pool: tuple[int, int] | None
) -> None:
    """Rejects images of which too little is left for a convolution, or the pooling after it."""
    if min(left) < (pool[0] if pool else 1):
        where = f"after convolution {layer.removeprefix('conv')}"
        if pool:
            where = f"before the pooling {where}, whose window is {pool[0]}"
        raise InputError(
            f"images of {images[0]}x{images[1]} pixels are too small for this network: "
            f"{max(0, left[0])}x{max(0, left[1])} are left {where}."
        )


def _check(model: AlexNet) -> None:
    """Rejects options that are valid alone and not together."""

    def reject(name: str, right: str) -> None:
        raise InputError(f"config.model.{name} is {show(getattr(model, name))}; {right}.")

    count = len(model.features)
    if not count:
        raise InputError("config.model.features is empty; it needs at least one convolution.")
    for name in ("kernels", "strides", "pools", *_MAY_BE_EMPTY):
        optional = name in _MAY_BE_EMPTY
        if len(getattr(model, name)) != count and (getattr(model, name) or not optional):
            right = f"it must have one entry per convolution, {count} as config.model.features has"
            reject(name, right + ", or none" * optional)
    for i, groups in enumerate(model.groups):
        channels = model.features[i - 1] if i else 3 * max(1, 2 * model.whitening**2)
        if channels % groups or model.features[i] % groups:
            right = f"{groups} groups cannot equally share the channels of convolution {i + 1}"
            reject("groups", f"{right}, {channels} in and {model.features[i]} out")
    known = [f"conv{i + 1}" for i in range(count) if model.norm == "none"]
    known += [f"fc{i + 1}" for i in range(len(model.hidden))]
    if not set(model.bias_ones) <= set(known):
        reject("bias_ones", f"the layers with a bias are {', '.join(known)}")
