"""torchvision's AlexNet and `AlexNetOWT`: the same numbers under other names, in another order.

`from_torchvision` and `to_torchvision` convert trees of arrays, `import_run` and the rest files.

A state dict has OIHW kernels, transposed matrices, and a first matrix whose rows count channels
before pixels; nothing is computed on the way, so that both directions are exact.
"""

import hashlib
import io
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
from ml_collections import ConfigDict

from alexnet_jax.checkpoint.manager import Checkpoints
from alexnet_jax.config import default_config, validate
from alexnet_jax.errors import InputError, show
from alexnet_jax.optim.optimizers import create_optimizer, create_schedule
from alexnet_jax.run import directory
from alexnet_jax.state import TrainState

Arrays = Mapping[str, np.ndarray]

_CONVOLUTIONS = {
    "conv1": ("features.0", 11),
    "conv2": ("features.3", 5),
    "conv3": ("features.6", 3),
    "conv4": ("features.8", 3),
    "conv5": ("features.10", 3),
}
_CONNECTED = {"fc1": "classifier.1", "fc2": "classifier.4", "logits": "classifier.6"}
_SIDE = 6  # pixels of the feature map that the first matrix takes
SAFETENSORS = ".safetensors"

# Options of a network that an answer does not depend on, given the parameters; beyond rounding.
_WITHOUT_EFFECT = (
    *("name", "features", "hidden", "dropout", "dropout_of", "kernel_init", "dtype"),
    *("bias_ones", "norm_momentum"),
)

# What torchvision normalises by, on the scale 0..1.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def widths(state_dict: Arrays) -> dict[str, tuple[int, ...]]:
    """Checks that a state dict is an AlexNet's of torchvision, of any width.

    Args:
        state_dict: Arrays by their names in torchvision, "features.0.weight" and so on.

    Returns:
        `features` and `hidden` as `AlexNet` has them, and `classes`, of one entry.

    Raises:
        InputError: Names the array that is missing, too many, or of another shape or dtype.
    """
    names = [name for name, _ in _CONVOLUTIONS.values()] + list(_CONNECTED.values())
    wanted = [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
    missing = [key for key in wanted if key not in state_dict]
    unknown = [key for key in state_dict if key not in wanted]
    if missing or unknown:
        parts = [f"it lacks {_listed(missing)}"] if missing else []
        parts += [f"it has {_listed(unknown)}, which torchvision's has not"] if unknown else []
        raise InputError(f"this is no AlexNet of torchvision: {' and '.join(parts)}.")
    outputs = {
        name: state_dict[f"{name}.weight"].shape[0] if state_dict[f"{name}.weight"].ndim else 0
        for name in names
    }
    inputs = 3
    shapes: dict[str, tuple[int, ...]] = {}
    for name, kernel in _CONVOLUTIONS.values():
        shapes[name] = (outputs[name], inputs, kernel, kernel)
        inputs = outputs[name]
    inputs *= _SIDE * _SIDE
    for name in _CONNECTED.values():
        shapes[name] = (outputs[name], inputs)
        inputs = outputs[name]
    for name, shape in shapes.items():
        for key, right in ((f"{name}.weight", shape), (f"{name}.bias", shape[:1])):
            array = state_dict[key]
            if array.shape != right or not array.size:
                raise InputError(
                    f"{key} has the shape {list(array.shape)}; after the layers before it, "
                    f"torchvision's AlexNet has {list(right)} there."
                )
            if array.dtype != np.float32:
                raise InputError(f"{key} is {array.dtype}; it must be float32.")
    sizes = tuple(outputs.values())
    count = len(_CONVOLUTIONS)
    return {"features": sizes[:count], "hidden": sizes[count:-1], "classes": sizes[-1:]}


def _listed(names: list[str]) -> str:
    shown = ", ".join(show(name)[1:-1] for name in names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown


def from_torchvision(state_dict: Arrays) -> dict[str, dict[str, np.ndarray]]:
    """Returns a state dict as the parameters of `AlexNetOWT`.

    Args:
        state_dict: float32 arrays by their names in torchvision.

    Raises:
        InputError: As `widths`.
    """
    widths(state_dict)
    params = {}
    for layer, (name, _) in _CONVOLUTIONS.items():
        params[layer] = {"kernel": state_dict[f"{name}.weight"].transpose(2, 3, 1, 0)}
    for layer, name in _CONNECTED.items():
        params[layer] = {"kernel": state_dict[f"{name}.weight"].T}
    first = params["fc1"]["kernel"]  # rows (c, h, w) there, (h, w, c) here
    by_pixel = first.reshape(-1, _SIDE, _SIDE, first.shape[1]).transpose(1, 2, 0, 3)
    params["fc1"]["kernel"] = by_pixel.reshape(first.shape)
    for layer, name in _names().items():
        params[layer] = {
            "kernel": np.ascontiguousarray(params[layer]["kernel"]),
            "bias": np.ascontiguousarray(state_dict[f"{name}.bias"]),
        }
    return params


def to_torchvision(params: Any) -> dict[str, np.ndarray]:
    """Returns the parameters of `AlexNetOWT` as a state dict: `from_torchvision` backwards.

    Raises:
        InputError: They are of another network.
    """
    found = {
        f"{layer}/{name}": np.shape(array)
        for layer in params
        for name, array in params[layer].items()
    }
    wanted = {f"{layer}/{kind}" for layer in _names() for kind in ("kernel", "bias")}
    if found.keys() != wanted:
        differing = sorted(found.keys() ^ wanted)
        raise InputError(
            f"torchvision's AlexNet has other parameters than this network: {_listed(differing)} "
            "only one of them has; export a run with config.model.name 'alexnet_owt'."
        )
    state_dict = {}
    for layer, name in _names().items():
        kernel = np.asarray(params[layer]["kernel"])
        if layer == "fc1":
            channels = found["conv5/bias"][0]
            if len(kernel) != _SIDE * _SIDE * channels:
                raise InputError(
                    f"fc1 takes {len(kernel)} numbers, and torchvision's AlexNet "
                    f"{_SIDE}x{_SIDE}x{channels}; export a run with config.model.name "
                    "'alexnet_owt'."
                )
            by_channel = kernel.reshape(_SIDE, _SIDE, channels, -1).transpose(2, 0, 1, 3)
            kernel = by_channel.reshape(kernel.shape)
        axes = (3, 2, 0, 1) if kernel.ndim == 4 else (1, 0)
        state_dict[f"{name}.weight"] = np.ascontiguousarray(kernel.transpose(axes))
        state_dict[f"{name}.bias"] = np.asarray(params[layer]["bias"])
    widths(state_dict)
    return state_dict


def check_model(config: ConfigDict) -> None:
    """Refuses a network that has torchvision's parameters and computes something else with them.

    Args:
        config: The section `config.model` of a run.

    Raises:
        InputError: Names the option, and what torchvision has.
    """
    theirs = default_config("alexnet_owt").model
    for key, value in theirs.items():
        mine = config.get(key, "absent")
        if key not in _WITHOUT_EFFECT and mine != value:
            raise InputError(
                f"config.model.{key} of the run is {show(mine)}; torchvision's AlexNet is "
                f"{show(value)} there, and would answer otherwise with the same weights."
            )


def _names() -> dict[str, str]:
    return {layer: name for layer, (name, _) in _CONVOLUTIONS.items()} | _CONNECTED


def import_run(
    path: Path, workdir: Path, class_names: tuple[str, ...] = ()
) -> dict[str, tuple[int, ...]]:
    """Makes a run folder, at step 0, of weights of torchvision's AlexNet.

    Args:
        path: As `read_state_dict` takes it.
        workdir: A folder that does not exist, or is empty.
        class_names: By label; () takes the synsets of ImageNet where there are 1,000 classes, and
            else class_0, class_1, and so on.

    Returns:
        What `widths` does.

    Raises:
        InputError: Something given cannot be used.
        SaveFailed: The folder cannot be written.
    """
    state_dict = read_state_dict(path)
    found = widths(state_dict)
    (classes,) = found["classes"]
    class_names = class_names or _class_names(classes)
    if len(class_names) != classes or len(set(class_names)) != classes:
        raise InputError(
            f"{len(set(class_names)):,} different class names are given and the network has "
            f"{classes:,} classes; give one for each, in the order of its labels."
        )
    config = default_config("alexnet_owt")
    config.model.update({name: found[name] for name in ("features", "hidden")})
    config.data.update({"name": "imagenet2012", "test_split": "validation"})
    config.data.update({"image_size": 256, "crop_size": 224})
    config.augment.crop_padding = 0
    config.optimizer.update({"name": "sgd", "momentum": 0.0, "nesterov": False})  # without arrays
    validate(config)
    for name, array in state_dict.items():
        if not np.isfinite(array).all():
            raise InputError(f"{name} of {path} holds numbers that are not finite.")
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise InputError(f"{workdir} exists and is no empty folder; name a new one.")
    with directory.open_run_folder(workdir, config) as folder:
        directory.check_dataset(
            folder,
            {
                "name": config.data.name,
                "class_names": list(class_names),
                "image_shape": [config.data.image_size, config.data.image_size, 3],
                "mean": MEAN,
                "deviation": DEVIATION,
                "checksums": {},
                "images": {},
                "imported": path.name,
            },
        )
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
        with closing(Checkpoints(folder / "checkpoints")) as checkpoints:
            checkpoints.save(state, {"train_seconds": 0.0})
            checkpoints.finish()
    return found


def _class_names(classes: int) -> tuple[str, ...]:
    """Returns the synsets of ImageNet in the order of torchvision, or numbers."""
    if classes != 1000:
        return tuple(f"class_{label}" for label in range(classes))
    from tensorflow_datasets.core.utils.resource_utils import tfds_path  # takes half a second

    # TFDS has them in another order for this set; torchvision sorts them, as a tree of folders.
    labels = tfds_path("image_classification/imagenet_resized_labels.txt")
    return tuple(sorted(labels.read_text().split()))


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """Reads a state dict from a file of PyTorch or of safetensors; nothing in it is run.

    Args:
        path: ``.safetensors``, or any other name for PyTorch's format. Where the name ends as
            those that torchvision publishes, in the first digits of the file's SHA-256, these
            are compared.

    Raises:
        InputError: It is damaged, holds anything but arrays, or PyTorch is not installed.
    """
    try:
        size = path.stat().st_size
        _check_name(path)
        if path.suffix == SAFETENSORS:
            found: Any = safetensors.numpy.load_file(path)
        else:
            found = _load_torch(path)
    except InputError:
        raise
    except Exception as error:  # PyTorch's readers raise nearly every kind on bad bytes.
        reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[0]
        raise InputError(
            f"{path} is no file of weights ({_short(reason)}); give a state dict saved by "
            "torch.save, or safetensors."
        ) from None
    if sum(array.nbytes for array in found.values()) > size:  # the same bytes many times over
        raise InputError(f"{path} describes more numbers than it holds; give another copy.")
    return found


def _short(reason: str) -> str:
    return reason if len(reason) <= 120 else f"{reason[:117]}..."


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
            "digits are no checksum."
        )


def _load_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise InputError(
            f"{path} is a file of PyTorch, which is not installed; pip install torch, or give "
            "the weights as safetensors."
        ) from None
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type for member in archive.infolist()):
                raise ValueError("it is compressed, as torch.save never does")
    found = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]  # as training scripts save it, beside their own things
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, and no dictionary of arrays")
    arrays = {}
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"{show(key)} is a {type(value).__name__}, and no array")
        # DataParallel puts a word before each name.
        arrays[key.removeprefix("module.")] = value.detach().numpy()
    return arrays


def write_state_dict(state_dict: Arrays, path: Path) -> None:
    """Writes a state dict as safetensors if the name ends so, else as PyTorch does.

    Raises:
        InputError: There is such a file, or PyTorch is not installed.
        SaveFailed: It cannot be written.
    """
    if path.exists():
        raise InputError(f"{path} is there already; name another file, or remove it.")
    if path.suffix == SAFETENSORS:
        directory.write_whole(path, safetensors.numpy.save(dict(state_dict)))
        return
    try:
        import torch
    except ImportError:
        raise InputError(
            f"{path} would be a file of PyTorch, which is not installed; pip install torch, or "
            f"let the name end in {SAFETENSORS}."
        ) from None
    buffer = io.BytesIO()
    torch.save({key: torch.tensor(array) for key, array in state_dict.items()}, buffer)
    directory.write_whole(path, buffer.getvalue())
