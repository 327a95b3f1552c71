"""Saliency maps: how much each pixel matters for a prediction."""

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


def smooth_grad(
    network: Network,
    prepared: np.ndarray,
    classes: np.ndarray,
    *,
    samples: int = 32,
    noise: float = 0.15,
    seed: int = 0,
) -> np.ndarray:
    """Computes SmoothGrad (Smilkov et al., 2017, "SmoothGrad: removing noise by adding noise").

    That is the gradient of a class's logit by the input, averaged over noisy copies of the image;
    of the channels the largest magnitude counts (Simonyan et al., 2013). It suits all networks here
    and small images: Grad-CAM has the resolution of AlexNet's last convolution, which is 4x4 for
    images of 32x32, and the dense layers behind it leave no map per class.

    Args:
        network: From `alexnet_jax.load`.
        prepared: uint8[N, S, S, 3], from `Network.prepare`.
        classes: int[N], the class of each image whose logit counts.
        samples: Noisy copies of each image.
        noise: Standard deviation of the noise, as a fraction of the range of the image's values.
        seed: Seed of the noise, which is the same for all images.

    Returns:
        float32[N, S, S], at least 0.
    """
    gradient = functools.partial(
        _mean_gradient,
        network.eval_state,
        noise=np.float32(noise),
        key=jax.random.key(seed),
        samples=samples,
        module=network.module,
        normalize=network.normalize,
    )
    found = np.zeros(prepared.shape[:3], np.float32)
    for i, (image, label) in enumerate(zip(prepared, classes, strict=True)):
        found[i] = np.abs(gradient(image, np.int32(label))).max(axis=-1)
    return found


@functools.partial(jax.jit, static_argnames=("samples", "module", "normalize"))
def _mean_gradient(
    state: TrainState,
    image: Array,
    label: Array,
    *,
    noise: Array,
    key: Array,
    samples: int,
    module: nn.Module,
    normalize: Normalize,
) -> Array:
    clean = normalize(image[None])
    std = noise * (clean.max() - clean.min())
    copies = clean + std * jax.random.normal(key, (samples, *clean.shape[1:]))

    def logit(copies: Array) -> Array:
        logits: Any = module.apply(state.variables, copies, train=False)
        return logits[:, label].sum()

    gradient = jax.grad(logit)(copies).mean(axis=0)
    # `normalize` crops a larger image to its center; the gradient is 0 around it.
    margins = np.subtract(image.shape, gradient.shape)
    return jnp.pad(gradient, [(margin // 2, margin - margin // 2) for margin in margins])
