"""A trained network, opened from its run folder, and its predictions."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from PIL import Image

from alexnet_jax import steps
from alexnet_jax.checkpoint.reader import read_network
from alexnet_jax.config import Config
from alexnet_jax.data import augment, decode
from alexnet_jax.errors import InputError, show
from alexnet_jax.state import TrainState

# One image, or an array of many: a path, a Pillow image, or uint8 or uint16 pixels.
ImageLike: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray

# Images computed at once. Fewer are padded to a power of two, so that 7 programs are enough.
LARGEST_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The predictions for N images.

    Attributes:
        probabilities: float32[N, classes]; each row adds up to 1.
        class_names: Names of the columns.
    """

    probabilities: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.probabilities)

    @property
    def labels(self) -> list[str]:
        """The most probable class of each image."""
        return [self.class_names[best] for best in self.probabilities.argmax(axis=1)]

    def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """Returns (class name, probability) of the top k classes of each image, or of all."""
        ranked = np.argsort(-self.probabilities, axis=1, kind="stable")[:, :k]
        return [
            [(self.class_names[i], float(row[i])) for i in best]
            for row, best in zip(self.probabilities, ranked, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class Network:
    """A trained network; `load` opens it.

    Attributes:
        folder: The run folder.
        config: The config of the run.
        info: Content of the run's ``dataset.json``: what the network was trained on.
        module: The linen network, with XLA's own operations.
        normalize: Converts uint8 images to the module's input.
        state: The weights of the last step and, where the run keeps it, their exponential moving
            average (EMA); without the state of the optimizer.
        ema: Whether predictions use the EMA.
        accuracy: Validation accuracy of this checkpoint, from 0 to 1; None if unknown, and for a
            run of many seeds, whose checkpoints have a mean.
        replica: Index of the network's seed among the run's seeds.
    """

    folder: Path
    config: Config
    info: dict[str, Any]
    module: nn.Module
    normalize: augment.Normalize
    state: TrainState
    ema: bool
    accuracy: float | None
    replica: int

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names in the order of the labels."""
        return tuple(self.info["class_names"])

    @property
    def image_size(self) -> int:
        """Side of prepared images in pixels; `normalize` may crop them to their center."""
        return int(self.info["image_shape"][0])

    @property
    def step(self) -> int:
        """Training step of the weights."""
        return int(self.state.step)

    @functools.cached_property
    def eval_state(self) -> TrainState:
        """The state whose `variables` predictions use."""
        return (self.state.averaged() if self.ema else self.state).replace(ema={})

    def prepare(self, image: ImageLike) -> np.ndarray:
        """Converts one image, with the code that prepares training images.

        It is turned upright by its EXIF orientation, composed on white where it is transparent,
        made 8-bit RGB, scaled by its short side, and center-cropped.

        Args:
            image: A path, a Pillow image, or an array, uint8 or uint16, [H, W], [H, W, 1],
                [H, W, 3] or [H, W, 4].

        Returns:
            uint8[S, S, 3], S being `image_size`.

        Raises:
            InputError: It cannot be read or decoded, or is none of these.
        """
        if isinstance(image, str | os.PathLike):
            return decode.read_image(Path(image), self.image_size)
        try:
            if isinstance(image, np.ndarray):
                image = decode.image_from_array(image)
            if isinstance(image, Image.Image):
                return decode.resize_and_crop(image, self.image_size)
        except Exception as error:  # Pillow raises nearly every kind where a file is damaged
            raise InputError(f"An image cannot be used: {error}.") from error
        raise InputError(
            f"An image is {show(image)}, of type {type(image).__name__}; it must be a path, a "
            "Pillow image, or a NumPy array of uint8 or uint16."
        )

    def predict(self, images: ImageLike | Iterable[ImageLike]) -> Predictions:
        """Predicts the probability of each class for each image.

        Only `LARGEST_BATCH` images are in memory at a time. The predictions for an image do not
        depend, but for rounding, on the images beside it.

        Args:
            images: One image as `prepare` takes it, several in an iterable, or an array of
                several: uint8[N, H, W, C].

        Raises:
            InputError: An image cannot be used.
        """
        many: Any = images
        if (
            isinstance(images, str | os.PathLike)
            or (isinstance(images, np.ndarray) and images.ndim < 4)
            or not hasattr(images, "__iter__")
        ):
            many = [images]
        prepared = map(self.prepare, many)
        found = [np.zeros((0, len(self.class_names)), np.float32)]
        while chunk := list(islice(prepared, LARGEST_BATCH)):
            found.append(np.asarray(jax.nn.softmax(jnp.asarray(self.logits(np.stack(chunk))))))
        return Predictions(np.concatenate(found), self.class_names)

    def logits(self, prepared: np.ndarray) -> np.ndarray:
        """Computes the logits float32[N, classes].

        Args:
            prepared: uint8[N, S, S, 3], from `prepare`.

        Raises:
            ValueError: The images are of another shape or dtype.
        """
        shape = (self.image_size, self.image_size, 3)
        if prepared.shape[1:] != shape or prepared.dtype != np.uint8:
            raise ValueError(
                f"images are {prepared.dtype}{list(prepared.shape)}; they must be uint8[N, S, S, 3]"
                f" with S = {self.image_size}"
            )
        found = [np.zeros((0, len(self.class_names)), np.float32)]
        for start in range(0, len(prepared), LARGEST_BATCH):
            batch = prepared[start : start + LARGEST_BATCH]
            size = 1 << (len(batch) - 1).bit_length()
            padded = np.pad(batch, [(0, size - len(batch)), (0, 0), (0, 0), (0, 0)])
            found.append(np.asarray(self._compiled(self.eval_state, padded))[: len(batch)])
        return np.concatenate(found)

    @functools.cached_property
    def _compiled(self) -> Callable[[TrainState, np.ndarray], Array]:
        return jax.jit(
            functools.partial(steps.predict_step, model=self.module, normalize=self.normalize)
        )


def load(
    run: str | os.PathLike[str],
    *,
    checkpoint: str | int = "newest",
    ema: bool = True,
    seed: int | None = None,
) -> Network:
    """Opens the network of a run; see `alexnet_jax.load`."""
    saved = read_network(run, checkpoint, seed)
    info, config = saved.info, saved.config
    return Network(
        **saved._asdict(),
        normalize=augment.create_normalize(
            tuple(info["mean"]), tuple(info["deviation"]), config.data.crop_size
        ),
        ema=ema and config.train.ema_decay > 0,
    )
