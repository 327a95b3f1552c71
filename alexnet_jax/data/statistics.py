"""What is measured on the training images before training: channel and color statistics."""

import numpy as np

Triple = tuple[float, ...]


def channel_statistics(counts: np.ndarray) -> tuple[Triple, Triple]:
    """Returns mean and standard deviation of each channel, of values scaled to 0..1.

    Computed from int64[C, 256], how often each value occurs: without a float copy of the images,
    and exactly, so that all hosts of a run agree. A channel that never changes has std 1.
    """
    values = np.arange(256)
    means, stds = [], []
    for channel in counts:
        # Python's integers, for squares of sums over many images have more than 64 bits.
        count, total, squares = (int(channel @ values**power) for power in range(3))
        variance = (squares * count - total**2) / (255 * count) ** 2
        means.append(total / (255 * count))
        stds.append(variance**0.5 if variance else 1.0)
    return tuple(means), tuple(stds)


def principal_components(images: np.ndarray) -> tuple[Triple, ...]:
    """Returns the principal components of the pixels of uint8[N, H, W, 3].

    They are 3 colors on the scale 0..255: the eigenvectors of the pixels' covariance, the largest
    first, each as long as the standard deviation of the pixels along it.
    """
    sums, products, count = np.zeros(3), np.zeros((3, 3)), 0
    for start in range(0, len(images), 64):  # in float64, where sums of integers are exact
        pixels = images[start : start + 64].reshape(-1, 3).astype(np.float64)
        sums += pixels.sum(0)
        products += pixels.T @ pixels
        count += len(pixels)
    mean = sums / count
    values, vectors = np.linalg.eigh(products / count - np.outer(mean, mean))
    colors = (vectors * np.sqrt(np.maximum(values, 0))).T[::-1]
    colors *= np.where(colors.sum(axis=1, keepdims=True) < 0, -1, 1)  # eigh leaves the sign open
    return tuple(tuple(map(float, color)) for color in colors)
