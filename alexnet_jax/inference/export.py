"""A trained network as one file, or folder, that other runtimes run without this library.

What is exported is a whole function, from uint8 images to probabilities: normalising and softmax
are part of it. It computes in float32 with XLA's own operations, whatever the run computed with.
Each format is written by the exporter that is kept best, read again by its own runtime, and
compared with the network; one that disagrees does not stay.
"""

import importlib
import io
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from alexnet_jax.errors import InputError
from alexnet_jax.inference.predictor import Network
from alexnet_jax.ops import PLAIN
from alexnet_jax.run.directory import write_json
from alexnet_jax.steps import predict_step

log = logging.getLogger(__name__)

CLASS_NAMES = "class_names.json"
INPUT, OUTPUT = "images", "probabilities"

# How far an artefact's probabilities may be off; and, so that certain answers are compared, too,
# their logarithms, of what is more probable than the floor.
TOLERANCE, LOG_TOLERANCE, LOG_FLOOR = 1e-4, 1e-2, 1e-12
BATCH_SIZES = (1, 7)

Function = Callable[[Array], Array]  # uint8[B, S, S, 3] -> float32[B, classes]
Runner = Callable[[np.ndarray], np.ndarray]


class Exported(NamedTuple):
    """What an export has left.

    Attributes:
        folder: With the artefact and ``class_names.json``.
        artefact: The file, or the folder of a SavedModel.
        difference: The largest one between its probabilities and the network's.
    """

    folder: Path
    artefact: Path
    difference: float


def inference_function(network: Network) -> Function:
    """Returns the function that is exported: uint8[B, S, S, 3] to float32[B, classes].

    It holds the weights that `network` answers with.
    """
    module = network.module.clone(ops=PLAIN._replace(max_pool=_max_pool), dtype="float32")
    state = jax.device_get(network.answering)

    def probabilities(images: Array) -> Array:
        logits = predict_step(state, images, model=module, normalize=network.normalize)
        return jax.nn.softmax(logits)

    return probabilities


def _max_pool(images: Array, window: tuple[int, int], strides: tuple[int, int]) -> Array:
    # By their names, as jax2onnx wants it, which would make a pooling over four dimensions of the
    # primitive, and ONNX Runtime has none.
    return nn.max_pool(images, window_shape=window, strides=strides)


def write_stablehlo(function: Function, size: int, path: Path) -> None:
    """Serialises by `jax.export`, for CPU, CUDA, ROCm and TPU at once, with any batch size."""
    from jax import export

    platforms = ("cpu", "cuda", "rocm", "tpu")
    exported = export.export(jax.jit(function), platforms=platforms)(_any_batch(size))
    path.write_bytes(exported.serialize())


def _any_batch(size: int) -> jax.ShapeDtypeStruct:
    from jax import export

    return jax.ShapeDtypeStruct(export.symbolic_shape(f"batch, {size}, {size}, 3"), np.uint8)


def run_stablehlo(path: Path) -> Runner:
    """Opens an artefact of `write_stablehlo`."""
    from jax import export

    exported = export.deserialize(bytearray(path.read_bytes()))
    return lambda images: np.asarray(exported.call(images))


def write_onnx(function: Function, size: int, path: Path) -> None:
    """Converts by jax2onnx, to operator set 21, which ONNX Runtime 1.20 and later run."""
    with _quiet("jax2onnx", "onnx_ir"):
        model = _needs("jax2onnx").to_onnx(
            function,
            inputs=[_any_batch(size)],
            model_name="alexnet_jax",
            opset=21,
            input_names=[INPUT],
            output_names=[OUTPUT],
        )
        # The shapes of what is between are noted as if channels were last, and ONNX has them first.
        del model.graph.value_info[:]
        _needs("onnx").checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())


def run_onnx(path: Path) -> Runner:
    """Opens an artefact of `write_onnx` in ONNX Runtime."""
    session = _needs("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run([OUTPUT], {INPUT: images})[0]


def write_savedmodel(function: Function, size: int, path: Path) -> None:
    """Converts by jax2tf, as a graph around XLA's program, for CPU, GPU and TPU."""
    with _quiet("absl", "tensorflow"):
        tf = _tensorflow()
        module = tf.Module()
        module.predict = _tensorflow_function(tf, function, size)
        tf.saved_model.save(module, str(path), signatures={"serving_default": module.predict})


def run_savedmodel(path: Path) -> Runner:
    """Opens an artefact of `write_savedmodel` in TensorFlow."""
    with _quiet("absl", "tensorflow"):
        tf = _tensorflow()
        signature = tf.saved_model.load(str(path)).signatures["serving_default"]
    return lambda images: signature(**{INPUT: tf.constant(images)})[OUTPUT].numpy()


def write_tflite(function: Function, size: int, path: Path) -> None:
    """Converts by jax2tf and TensorFlow's converter, to operations that LiteRT has itself."""
    with _quiet("absl", "tensorflow"):
        tf = _tensorflow()
        module = tf.Module()
        concrete = _tensorflow_function(tf, function, size).get_concrete_function()
        converter = tf.lite.TFLiteConverter.from_concrete_functions([concrete], module)
        path.write_bytes(converter.convert())


def run_tflite(path: Path) -> Runner:
    """Opens an artefact of `write_tflite` in LiteRT."""
    interpreter = _needs("ai_edge_litert.interpreter").Interpreter(model_path=str(path))

    def run(images: np.ndarray) -> np.ndarray:
        (taken,), (given,) = interpreter.get_input_details(), interpreter.get_output_details()
        interpreter.resize_tensor_input(taken["index"], images.shape)
        with _quiet():
            interpreter.allocate_tensors()
        interpreter.set_tensor(taken["index"], images)
        interpreter.invoke()
        return interpreter.get_tensor(given["index"])

    return run


class Format(NamedTuple):
    """How a format is written, and opened in its own runtime.

    Attributes:
        artefact: Name of the file or folder.
        write: Takes the function, the image size, and where to write.
        run: Opens what was written.
        runtime: Its name, for a person.
    """

    artefact: str
    write: Callable[[Function, int, Path], None]
    run: Callable[[Path], Runner]
    runtime: str


FORMATS = {
    "stablehlo": Format("network.stablehlo", write_stablehlo, run_stablehlo, "JAX"),
    "onnx": Format("network.onnx", write_onnx, run_onnx, "ONNX Runtime"),
    "savedmodel": Format("saved_model", write_savedmodel, run_savedmodel, "TensorFlow"),
    "tflite": Format("network.tflite", write_tflite, run_tflite, "LiteRT"),
}


def export(
    network: Network,
    kind: str,
    output: str | os.PathLike[str],
    *,
    card: Callable[[float], str] | None = None,
    overwrite: bool = False,
) -> Exported:
    """Writes a network in a format, and makes sure that it answers as the network does.

    The folder appears whole or not at all.

    Args:
        network: Of `alexnet_jax.load`.
        kind: A key of `FORMATS`.
        output: The folder to make.
        card: Returns the text of ``MODEL_CARD.md``, given the largest difference found.
        overwrite: Whether a folder that an export has made may be replaced.

    Raises:
        InputError: The format is unknown, what it needs is missing, the folder is there already,
            or the artefact does not agree with the network.
    """
    if kind not in FORMATS:
        raise InputError(f"the format {kind!r} is unknown; choose one of {', '.join(FORMATS)}.")
    chosen = FORMATS[kind]
    folder = Path(output).expanduser().absolute()
    _check_output(folder, overwrite)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        artefact = unfinished / chosen.artefact
        function = inference_function(network)
        chosen.write(function, network.image_size, artefact)
        with _on_cpu():
            difference = check(chosen.run(artefact), jax.jit(function), network.image_size, kind)
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
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return Exported(folder, folder / chosen.artefact, difference)


def _on_cpu() -> AbstractContextManager[Any]:
    """Lets JAX compute on the CPU; a GPU multiplies float32 with the 10 bits of TF32."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        return nullcontext()


def _check_output(folder: Path, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / CLASS_NAMES).is_file():
        raise InputError(f"{folder} is there and is no export; name a new folder.")
    if not overwrite:
        raise InputError(f"{folder} is there already; --overwrite replaces it.")


def check(runner: Runner, function: Function, size: int, kind: str) -> float:
    """Compares what a runtime computes with what the network does, on made-up images.

    Args:
        runner: What is judged.
        function: What is right.
        size: Side of the images.
        kind: Its name, for the error.

    Returns:
        The largest difference between two probabilities.

    Raises:
        InputError: It is too large.
    """
    largest = 0.0
    for count in BATCH_SIZES:
        images = example_images(count, size)
        wanted, found = np.asarray(function(jnp.asarray(images))), runner(images)
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            raise InputError(
                f"the {kind} gives {found.dtype}{list(found.shape)} for {count} images, and the "
                f"network {wanted.dtype}{list(wanted.shape)}; it was not kept."
            )
        logs = [np.log(np.maximum(values, LOG_FLOOR)) for values in (wanted, found)]
        difference = float(np.abs(wanted - found).max())
        log_difference = float(np.abs(logs[0] - logs[1]).max())
        if not (difference <= TOLERANCE and log_difference <= LOG_TOLERANCE):
            raise InputError(
                f"the {kind} gives other probabilities than the network, by up to "
                f"{difference:.1g} (of their logarithms by {log_difference:.1g}); it was not kept."
            )
        largest = max(largest, difference)
    return largest


def example_images(count: int, size: int) -> np.ndarray:
    """Makes up images uint8[count, size, size, 3], from smooth patches of colour to noise."""
    draw = np.random.default_rng(0)
    images = np.empty((count, size, size, 3), np.uint8)
    for i in range(count):
        cells = min(size, 2 ** (i + 1))
        patches = draw.uniform(0, 255, (cells, cells, 3))
        rows = np.arange(size) * cells // size
        images[i] = patches[rows][:, rows] * draw.uniform(0.3, 1)
    return images


def _tensorflow_function(tf: Any, function: Function, size: int) -> Any:
    from jax.experimental import jax2tf

    convert = jax2tf.convert(
        function,
        polymorphic_shapes=[f"b, {size}, {size}, 3"],
        with_gradient=False,
        native_serialization_platforms=("cpu", "cuda", "tpu"),
    )

    def predict(images: Any) -> Any:
        return {OUTPUT: convert(images)}

    signature = [tf.TensorSpec([None, size, size, 3], tf.uint8, name=INPUT)]
    return tf.function(predict, input_signature=signature, autograph=False)


def _tensorflow() -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    jax.devices()  # JAX takes the GPU first, and TensorFlow none
    tf = _needs("tensorflow")
    tf.config.set_visible_devices([], "GPU")
    return tf


def _needs(module: str) -> Any:
    """Imports what only an export needs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"{module.partition('.')[0]} is not installed ({error}); exports need the extra "
            '"export": pip install "alexnet_jax[export]".'
        ) from None


@contextmanager
def _quiet(*loggers: str) -> Iterator[None]:
    """Keeps converters from the terminal; what goes wrong they raise, and the check finds.

    TensorFlow's libraries write to the process's standard error past Python.
    """
    before = [(logging.getLogger(name), logging.getLogger(name).level) for name in loggers]
    for logger, _ in before:
        logger.setLevel(logging.ERROR)
    sys.stderr.flush()
    terminal = os.dup(2)
    try:
        with (
            open(os.devnull, "w") as nowhere,
            warnings.catch_warnings(),
            redirect_stdout(io.StringIO()),
        ):
            os.dup2(nowhere.fileno(), 2)
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        for logger, level in before:
            logger.setLevel(level)
