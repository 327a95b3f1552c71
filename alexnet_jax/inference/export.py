"""Exports a trained network to a file, or folder, that other runtimes run without this library.

The exported function takes uint8 images and returns probabilities: normalization and softmax are
part of it. It computes in float32 with XLA's own operations, whatever the run computed in. Each
format is written by the exporter that is maintained best, read again by its own runtime, and
compared with the network; an artifact that disagrees is not kept.
"""

import importlib
import io
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jax import export as jax_export

from alexnet_jax.errors import InputError
from alexnet_jax.inference.predictor import Network
from alexnet_jax.ops import PLAIN
from alexnet_jax.run.files import write_json
from alexnet_jax.steps import predict_step

CLASS_NAMES = "class_names.json"
INPUT, OUTPUT = "images", "probabilities"

# How far the probabilities of an artifact may be off; and their logarithms, of what is more
# probable than the floor, so that confident predictions are compared, too.
TOLERANCE, LOG_TOLERANCE, LOG_FLOOR = 1e-4, 1e-2, 1e-12
BATCH_SIZES = (1, 7)

Function = Callable[[Array], Array]  # uint8[B, S, S, 3] -> float32[B, classes]
Runner = Callable[[np.ndarray], np.ndarray]


class Exported(NamedTuple):
    """An artifact, and the largest difference between its probabilities and the network's."""

    artifact: Path
    difference: float


def inference_function(network: Network) -> Function:
    """Returns the function that is exported, with the network's weights."""
    module = network.module.clone(ops=PLAIN._replace(max_pool=_max_pool), dtype="float32")
    state = jax.device_get(network.eval_state)

    def probabilities(images: Array) -> Array:
        logits = predict_step(state, images, model=module, normalize=network.normalize)
        return jax.nn.softmax(logits)

    return probabilities


def _max_pool(images: Array, window: tuple[int, int], strides: tuple[int, int]) -> Array:
    # With these keywords, as jax2onnx looks for them. Else it would convert the primitive, which
    # pools over four dimensions, and ONNX Runtime has no such pooling.
    return nn.max_pool(images, window_shape=window, strides=strides)


def to_stablehlo(function: Function, size: int, path: Path) -> Runner:
    """Serializes with `jax.export`, for CPU, CUDA, ROCm and TPU, with any batch size."""
    platforms = ("cpu", "cuda", "rocm", "tpu")
    exported = jax_export.export(jax.jit(function), platforms=platforms)(_any_batch(size))
    path.write_bytes(exported.serialize())
    read = jax_export.deserialize(bytearray(path.read_bytes()))
    return lambda images: np.asarray(read.call(images))


def _any_batch(size: int) -> jax.ShapeDtypeStruct:
    shape = jax_export.symbolic_shape(f"batch, {size}, {size}, 3")
    return jax.ShapeDtypeStruct(shape, np.uint8)


def to_onnx(function: Function, size: int, path: Path) -> Runner:
    """Converts with jax2onnx, to operator set 21, which ONNX Runtime 1.20 and later run."""
    with _quiet("jax2onnx", "onnx_ir"):
        model = _import("jax2onnx").to_onnx(
            function,
            inputs=[_any_batch(size)],
            model_name="alexnet_jax",
            opset=21,
            input_names=[INPUT],
            output_names=[OUTPUT],
        )
        # The noted shapes of intermediate values have channels last, and ONNX has them first.
        del model.graph.value_info[:]
        _import("onnx").checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())
    session = _import("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run([OUTPUT], {INPUT: images})[0]


def to_savedmodel(function: Function, size: int, path: Path) -> Runner:
    """Converts with jax2tf, to a graph around XLA's program, for CPU, GPU and TPU."""
    with _quiet("absl", "tensorflow"):
        tf, module = _tensorflow_module(function, size)
        tf.saved_model.save(module, str(path), signatures={"serving_default": module.predict})
        predict = tf.saved_model.load(str(path)).signatures["serving_default"]
    return lambda images: predict(**{INPUT: tf.constant(images)})[OUTPUT].numpy()


def to_tflite(function: Function, size: int, path: Path) -> Runner:
    """Converts with jax2tf and TensorFlow's converter, to operations that LiteRT has itself."""
    with _quiet("absl", "tensorflow"):
        tf, module = _tensorflow_module(function, size)
        concrete = module.predict.get_concrete_function()
        converter = tf.lite.TFLiteConverter.from_concrete_functions([concrete], module)
        path.write_bytes(converter.convert())
    interpreter = _import("ai_edge_litert.interpreter").Interpreter(model_path=str(path))

    def run(images: np.ndarray) -> np.ndarray:
        index = interpreter.get_input_details()[0]["index"]
        interpreter.resize_tensor_input(index, images.shape)
        with _quiet():
            interpreter.allocate_tensors()
        interpreter.set_tensor(index, images)
        interpreter.invoke()
        return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])

    return run


def _tensorflow_module(function: Function, size: int) -> tuple[Any, Any]:
    """Returns TensorFlow, and its module whose function `predict` is the given one."""
    from jax.experimental import jax2tf

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    jax.devices()  # JAX takes the GPU first, and TensorFlow none
    tf = _import("tensorflow")
    tf.config.set_visible_devices([], "GPU")
    converted = jax2tf.convert(
        function,
        polymorphic_shapes=[f"b, {size}, {size}, 3"],
        with_gradient=False,
        native_serialization_platforms=("cpu", "cuda", "tpu"),
    )
    module = tf.Module()
    module.predict = tf.function(
        lambda images: {OUTPUT: converted(images)},
        input_signature=[tf.TensorSpec([None, size, size, 3], tf.uint8, name=INPUT)],
        autograph=False,
    )
    return tf, module


class Format(NamedTuple):
    """A format: what its artifact is called, how it is written, and what runs it."""

    artifact: str
    write: Callable[[Function, int, Path], Runner]  # takes the image size; opens what it wrote
    runtime: str


FORMATS = {
    "stablehlo": Format("network.stablehlo", to_stablehlo, "JAX"),
    "onnx": Format("network.onnx", to_onnx, "ONNX Runtime"),
    "savedmodel": Format("saved_model", to_savedmodel, "TensorFlow"),
    "tflite": Format("network.tflite", to_tflite, "LiteRT"),
}


def export(
    network: Network,
    kind: str,
    output: str | os.PathLike[str],
    *,
    card: Callable[[float], str] | None = None,
    overwrite: bool = False,
) -> Exported:
    """Exports a network, and checks that the artifact predicts the same.

    The folder holds the artifact and ``class_names.json``. It is written whole or not at all.

    Args:
        network: From `alexnet_jax.load`.
        kind: A key of `FORMATS`.
        output: The folder to write.
        card: Returns the text of ``MODEL_CARD.md``, given the largest difference found.
        overwrite: Whether to replace the folder of an earlier export.

    Raises:
        InputError: The format is unknown, a package that it requires is not installed, the folder
            exists or cannot be written, or the artifact disagrees with the network.
    """
    if kind not in FORMATS:
        raise InputError(f"the format {kind!r} is unknown; choose one of {', '.join(FORMATS)}.")
    name, write, _ = FORMATS[kind]
    folder = Path(output).expanduser().absolute()
    _check_output(folder, overwrite)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as parent:
            unfinished = Path(parent, folder.name)
            unfinished.mkdir()
            function = inference_function(network)
            runner = write(function, network.image_size, unfinished / name)
            difference = check(runner, function, network.image_size, kind)
            write_json(unfinished / CLASS_NAMES, list(network.class_names))
            if card is not None:
                (unfinished / "MODEL_CARD.md").write_text(card(difference), encoding="utf-8")
            if folder.exists():
                shutil.rmtree(folder)
            unfinished.rename(folder)
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error.strerror or error}); name another --output."
        ) from error
    return Exported(folder / name, difference)


def _check_output(folder: Path, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / CLASS_NAMES).is_file():
        raise InputError(f"{folder} exists and is not an export; name a new folder.")
    if not overwrite:
        raise InputError(f"{folder} exists; --overwrite replaces it.")


def check(runner: Runner, function: Function, size: int, kind: str) -> float:
    """Returns the largest difference between the probabilities of an artifact and of the network.

    Both are given synthetic images of so many pixels a side; `kind` is the format, for the message.

    Raises:
        InputError: A difference is too large.
    """
    largest = 0.0
    for count in BATCH_SIZES:
        images = example_images(count, size)
        with ExitStack() as stack:
            with suppress(RuntimeError):  # JAX_PLATFORMS leaves the CPU out
                # A GPU multiplies float32 with the 10 bits of TF32.
                cpu = jax.local_devices(backend="cpu")[0]
                stack.enter_context(jax.default_device(cpu))
            expected, found = np.asarray(jax.jit(function)(jnp.asarray(images))), runner(images)
        if found.shape != expected.shape or found.dtype != expected.dtype:
            raise InputError(
                f"the {kind} gives {found.dtype}{list(found.shape)} for {count} images, and the "
                f"network {expected.dtype}{list(expected.shape)}; it was not kept."
            )
        logs = [np.log(np.maximum(values, LOG_FLOOR)) for values in (expected, found)]
        difference = float(np.abs(expected - found).max())
        log_difference = float(np.abs(logs[0] - logs[1]).max())
        if not (difference <= TOLERANCE and log_difference <= LOG_TOLERANCE):  # also NaN
            raise InputError(
                f"the {kind} gives other probabilities than the network, by up to "
                f"{difference:.1g} (of their logarithms by {log_difference:.1g}); it was not kept."
            )
        largest = max(largest, difference)
    return largest


def example_images(count: int, size: int) -> np.ndarray:
    """Makes images uint8[count, size, size, 3], from smooth patches of color to noise."""
    rng = np.random.default_rng(0)
    images = np.empty((count, size, size, 3), np.uint8)
    for i in range(count):
        cells = min(size, 2 ** (i + 1))
        patches = rng.uniform(0, 255, (cells, cells, 3))
        rows = np.arange(size) * cells // size
        images[i] = patches[rows][:, rows] * rng.uniform(0.3, 1)
    return images


def _import(module: str) -> Any:
    """Imports a package that only exports require."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"{module.partition('.')[0]} is not installed ({error}); exports require the extra "
            '"export": pip install "alexnet_jax[export]".'
        ) from None


@contextmanager
def _quiet(*loggers: str) -> Iterator[None]:
    """Silences converters; they raise what goes wrong, or the check finds it.

    TensorFlow's libraries write to the standard error of the process, past Python.
    """
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in loggers}
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with (
            open(os.devnull, "w") as nowhere,
            warnings.catch_warnings(action="ignore"),
            redirect_stdout(io.StringIO()),
        ):
            os.dup2(nowhere.fileno(), 2)
            for logger in levels:
                logger.setLevel(logging.ERROR)
            yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        for logger, level in levels.items():
            logger.setLevel(level)
