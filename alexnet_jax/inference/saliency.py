"""Where a network looks: which pixels its answer depends on."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from alexnet_jax.data.augment import Normalize
from alexnet_jax.inference.predictor import Network
from alexnet_jax.state import TrainState

SAMPLES = 32
NOISE = 0.15  # Standard deviation, as a share of the range of the image's values.


def smooth_grad(
    network: Network,
    prepared: np.ndarray,
    classes: np.ndarray,
    *,
    samples: int = SAMPLES,
    noise: float = NOISE,
    seed: int = 0,
) -> np.ndarray:
    """Works out how much each pixel moves the logit of a class.

    SmoothGrad (Smilkov et al., 2017, "SmoothGrad: removing noise by adding noise"): the gradient of
    the logit by the input, averaged over copies of the image with noise added; of the channels the
    largest magnitude counts (Simonyan et al., 2013). It suits any network here, and small images:
    a class-activation map (Grad-CAM) has the resolution of AlexNet's last convolution, which on
    32x32 images is 4x4, and its dense layers leave no map in which classes have a place.

    Args:
        network: Of `alexnet_jax.load`.
        prepared: uint8[N, S, S, 3], as `Network.prepare` makes them.
        classes: int[N], the class whose logit counts, for each image.
        samples: Noisy copies of each image.
        noise: Standard deviation of the noise, as a share of the range of the image's values.
        seed: Of the noise, which is the same for all images.

    Returns:
        float32[N, S, S], at least 0.
    """
    key = jax.random.key(seed)
    found = np.zeros(prepared.shape[:3], np.float32)
    for i, (image, wanted) in enumerate(zip(prepared, classes, strict=True)):
        gradient = _mean_gradient(
            network.answering,
            image,
            np.int32(wanted),
            np.float32(noise),
            key,
            samples=samples,
            module=network.module,
            normalize=network.normalize,
        )
        found[i] = np.abs(gradient).max(axis=-1)
    return found


@functools.partial(jax.jit, static_argnames=("samples", "module", "normalize"))
def _mean_gradient(
    state: TrainState,
    image: Array,
    wanted: Array,
    noise: Array,
    key: Array,
    *,
    samples: int,
    module: nn.Module,
    normalize: Normalize,
) -> Array:
    clean = normalize(image[None])
    spread = noise * (clean.max() - clean.min())
    copies = clean + spread * jax.random.normal(key, (samples, *clean.shape[1:]))

    def logit(copies: Array) -> Array:
        logits: Any = module.apply(state.variables, copies, train=False)
        return logits[:, wanted].sum()

    gradient = jax.grad(logit)(copies).mean(axis=0)
    # Of an image larger than what the network sees, the middle (`data.augment.centre`); 0 around.
    margins = [
        whole - seen for whole, seen in zip(image.shape[:2], gradient.shape[:2], strict=True)
    ]
    around = [(margin // 2, margin - margin // 2) for margin in margins]
    return jnp.pad(gradient, [*around, (0, 0)])
