"""Converts between torchvision's AlexNet and `AlexNetOWT`: the same numbers, in another order.

`from_torchvision` and `to_torchvision` convert trees of arrays, `import_run` and the rest files.

A state dict of PyTorch has OIHW kernels and transposed matrices, and the rows of the first matrix
are ordered by channel before pixel. Nothing is computed, so that both directions are exact.
"""

import hashlib
import re
import zipfile
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from alexnet_jax.checkpoint.manager import Checkpoints
from alexnet_jax.config import ModelConfig, default_config, validate
from alexnet_jax.errors import InputError, show
from alexnet_jax.optim.optimizers import create_optimizer
from alexnet_jax.optim.schedules import create_schedule
from alexnet_jax.run import files
from alexnet_jax.run.directory import RunDirectory
from alexnet_jax.state import TrainState

Arrays = Mapping[str, np.ndarray]  # by their names in torchvision, such as "features.0.weight"

# Our layers by name: torchvision's name, and the size of a kernel.
LAYERS = {
    "conv1": ("features.0", 11),
    "conv2": ("features.3", 5),
    "conv3": ("features.6", 3),
    "conv4": ("features.8", 3),
    "conv5": ("features.10", 3),
    "fc1": ("classifier.1", None),
    "fc2": ("classifier.4", None),
    "logits": ("classifier.6", None),
}
_SIDE = 6  # pixels of the feature map that fc1 takes

# Options of a network on which predictions do not depend, given the parameters.
_WITHOUT_EFFECT = (
    *("name", "features", "hidden", "dropout", "dropout_of", "kernel_init", "dtype"),
    *("bias_ones", "norm_momentum"),
)

# Mean and standard deviation by which torchvision normalizes, on the scale 0..1.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def widths(state_dict: Arrays) -> dict[str, tuple[int, ...]]:
    """Checks that a state dict is that of torchvision's AlexNet, of any width.

    Returns:
        `features` and `hidden` as `AlexNet` has them, and `classes`, of one entry.

    Raises:
        InputError: Names an array that is missing, unknown, or of another shape or dtype.
    """
    expected = [f"{name}.{kind}" for name, _ in LAYERS.values() for kind in ("weight", "bias")]
    missing = [key for key in expected if key not in state_dict]
    unknown = [key for key in state_dict if key not in expected]
    if missing or unknown:
        parts = [f"it lacks {_listed(missing)}"] if missing else []
        parts += [f"it has {_listed(unknown)}, which torchvision's has not"] if unknown else []
        raise InputError(f"this is not an AlexNet of torchvision: {' and '.join(parts)}.")
    inputs, outputs = 3, []
    for layer, (name, kernel) in LAYERS.items():
        weight = state_dict[f"{name}.weight"]
        outputs.append(weight.shape[0] if weight.ndim else 0)
        inputs *= _SIDE * _SIDE if layer == "fc1" else 1
        shape = (outputs[-1], inputs, *((kernel, kernel) if kernel else ()))
        inputs = outputs[-1]
        for key, right in ((f"{name}.weight", shape), (f"{name}.bias", shape[:1])):
            array = state_dict[key]
            if array.shape != right or not array.size:
                raise InputError(
                    f"{key} has the shape {list(array.shape)}; after the layers before it, "
                    f"torchvision's AlexNet has {list(right)} there."
                )
            if array.dtype != np.float32:
                raise InputError(f"{key} is {array.dtype}; it must be float32.")
    sizes = tuple(outputs)
    return {"features": sizes[:5], "hidden": sizes[5:-1], "classes": sizes[-1:]}


def _listed(names: list[str]) -> str:
    shown = ", ".join(show(name)[1:-1] for name in names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown


def from_torchvision(state_dict: Arrays) -> dict[str, dict[str, np.ndarray]]:
    """Converts a state dict, which `widths` checks, to the parameters of `AlexNetOWT`."""
    widths(state_dict)
    params = {}
    for layer, (name, kernel) in LAYERS.items():
        weight = state_dict[f"{name}.weight"]
        if layer == "fc1":
            by_channel = weight.reshape(len(weight), -1, _SIDE, _SIDE)
            weight = by_channel.transpose(0, 2, 3, 1).reshape(weight.shape)
        params[layer] = {
            "kernel": np.ascontiguousarray(weight.transpose(2, 3, 1, 0) if kernel else weight.T),
            "bias": np.ascontiguousarray(state_dict[f"{name}.bias"]),
        }
    return params


def to_torchvision(params: Any) -> dict[str, np.ndarray]:
    """Converts the parameters of `AlexNetOWT` to a state dict: `from_torchvision` backwards.

    Raises:
        InputError: They are of another network.
    """
    found = {f"{layer}/{name}" for layer, arrays in params.items() for name in arrays}
    expected = {f"{layer}/{kind}" for layer in LAYERS for kind in ("kernel", "bias")}
    if found != expected:
        raise InputError(
            "torchvision's AlexNet has other parameters than this network: only one of them has "
            f"{_listed(sorted(found ^ expected))}; export a run with config.model.name "
            "'alexnet_owt'."
        )
    state_dict = {}
    for layer, (name, kernel) in LAYERS.items():
        weight = np.asarray(params[layer]["kernel"])
        weight = weight.transpose(3, 2, 0, 1) if kernel else weight.T
        if layer == "fc1":
            channels = len(params["conv5"]["bias"])
            if weight.shape[1] != _SIDE * _SIDE * channels:
                raise InputError(
                    f"fc1 takes {weight.shape[1]} numbers, and torchvision's AlexNet "
                    f"{_SIDE}x{_SIDE}x{channels}; export a run with config.model.name "
                    "'alexnet_owt'."
                )
            by_pixel = weight.reshape(len(weight), _SIDE, _SIDE, channels)
            weight = by_pixel.transpose(0, 3, 1, 2).reshape(weight.shape)
        state_dict[f"{name}.weight"] = np.ascontiguousarray(weight)
        state_dict[f"{name}.bias"] = np.asarray(params[layer]["bias"])
    widths(state_dict)
    return state_dict


def check_model(config: ModelConfig) -> None:
    """Rejects a network that has torchvision's parameters and computes something else with them.

    Raises:
        InputError: Names an option of the section `config.model`, and its value in torchvision.
    """
    fields = {"name": config.name, **config.fields}
    for key, value in default_config("alexnet_owt").model.items():
        if key not in _WITHOUT_EFFECT and fields.get(key, "absent") != value:
            raise InputError(
                f"config.model.{key} of the run is {show(fields.get(key, 'absent'))}, and "
                f"{show(value)} in torchvision's AlexNet, which would predict otherwise with the "
                "same weights."
            )


def import_run(
    path: Path, workdir: Path, class_names: tuple[str, ...] = ()
) -> dict[str, tuple[int, ...]]:
    """Makes a run folder, at step 0, of weights of torchvision's AlexNet.

    Args:
        path: A file for `read_state_dict`.
        workdir: A folder that does not exist, or is empty.
        class_names: Names in the order of the labels; () stands for `default_class_names`.

    Returns:
        What `widths` returns.

    Raises:
        InputError: The file, the folder or the names cannot be used.
        SaveFailed: The folder cannot be written.
    """
    state_dict = read_state_dict(path)
    found = widths(state_dict)
    (classes,) = found["classes"]
    class_names = class_names or default_class_names(classes)
    if len(class_names) != classes or len(set(class_names)) != classes:
        raise InputError(
            f"{len(set(class_names)):,} different class names are given and the network has "
            f"{classes:,} classes; give one for each, in the order of its labels."
        )
    for name, array in state_dict.items():
        if not np.isfinite(array).all():
            raise InputError(f"{name} of {path} holds numbers that are not finite.")
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise InputError(f"{workdir} exists and is not an empty folder; name a new one.")
    config = default_config("alexnet_owt")
    config.model.features, config.model.hidden = found["features"], found["hidden"]
    config.data.name, config.data.test_split = "imagenet2012", "validation"
    config.data.image_size, config.data.crop_size = 256, 224
    config.augment.crop_padding = 0
    config.optimizer.name, config.optimizer.momentum = "sgd", 0.0  # which has no state
    config.optimizer.nesterov = False
    validate(config)
    info = {
        "name": config.data.name,
        "class_names": list(class_names),
        "image_shape": [config.data.image_size, config.data.image_size, 3],
        "mean": MEAN,
        "deviation": STD,
        "checksums": {},
        "images": {},
        "imported": path.name,
    }
    params = jax.tree.map(jnp.asarray, from_torchvision(state_dict))
    optimizer = create_optimizer(config.optimizer, create_schedule(config.optimizer, 1, 1))
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state={},
        opt_state=optimizer.init(params),
        ema={},
        key=jax.random.key(config.seed),
    )
    with RunDirectory.open(workdir, config) as run:
        run.check_dataset(info)
        with closing(Checkpoints(run.checkpoints)) as checkpoints:
            checkpoints.save(state, {"train_seconds": 0.0})
            checkpoints.finish()
    return found


def default_class_names(classes: int) -> tuple[str, ...]:
    """Returns the synsets of ImageNet in the order of torchvision, or class_0, class_1, ..."""
    if classes != 1000:
        return tuple(f"class_{label}" for label in range(classes))
    from tensorflow_datasets.core.utils.resource_utils import tfds_path  # takes half a second

    # TFDS has them in another order for this set; torchvision sorts them, as a tree of folders.
    labels = tfds_path("image_classification/imagenet_resized_labels.txt")
    return tuple(sorted(labels.read_text().split()))


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """Reads a state dict from a file of PyTorch or of safetensors; no code in it is run.

    Args:
        path: ``.safetensors``, or any other name for PyTorch's format. A name that ends in the
            first digits of the file's SHA-256, as torchvision publishes them, is checked.

    Raises:
        InputError: It is damaged, holds anything but arrays, or PyTorch is not installed.
    """
    try:
        size = path.stat().st_size
        _check_name(path)
        is_safetensors = path.suffix == ".safetensors"
        found = safetensors.numpy.load_file(path) if is_safetensors else _load_torch(path)
    except InputError:
        raise
    except Exception as error:  # PyTorch's readers raise nearly every kind on bad bytes
        reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[0]
        reason = reason if len(reason) <= 120 else f"{reason[:117]}..."
        raise InputError(
            f"{path} is not a file of weights ({reason}); give a state dict saved by torch.save, "
            "or safetensors."
        ) from None
    if sum(array.nbytes for array in found.values()) > size:  # the same bytes many times over
        raise InputError(f"{path} describes more numbers than it holds; give another copy.")
    return found


def _check_name(path: Path) -> None:
    digits = re.search(r"-([0-9a-f]{8,})$", path.stem)
    if digits is None:
        return
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(digits[1]):
        raise InputError(
            f"{path} may be damaged: by its name its SHA-256 would begin with {digits[1]}, and it "
            f"begins with {digest[: len(digits[1])]}; download it again, or rename it if these "
            "digits are not a checksum."
        )


def _import_torch(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise InputError(
            f"{path} is a file of PyTorch, which is not installed; pip install torch, or use a "
            "file that ends in .safetensors."
        ) from None
    return torch


def _load_torch(path: Path) -> dict[str, np.ndarray]:
    torch = _import_torch(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type for member in archive.infolist()):
                raise ValueError("it is compressed, as torch.save never does")
    found = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]  # of a training script's checkpoint
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, not a dictionary of arrays")
    arrays = {}
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"{show(key)} is a {type(value).__name__}, not an array")
        arrays[key.removeprefix("module.")] = value.detach().numpy()  # prefixed by DataParallel
    return arrays


def write_state_dict(state_dict: Arrays, path: Path) -> None:
    """Writes a state dict as safetensors if the name ends so, else as PyTorch does.

    Raises:
        InputError: The file exists, or PyTorch is not installed.
        SaveFailed: It cannot be written.
    """
    if path.exists():
        raise InputError(f"{path} exists; name another file, or remove it.")
    if path.suffix == ".safetensors":
        files.write_bytes(path, safetensors.numpy.save(dict(state_dict)))
        return
    torch = _import_torch(path)
    with files.replacing(path) as file:
        torch.save({key: torch.tensor(array) for key, array in state_dict.items()}, file)
