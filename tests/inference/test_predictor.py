"""A trained network opened, asked and measured: right weights, right pixels, right numbers."""

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from made_up_run import ACCURACIES, SIZE, make_run
from PIL import Image

import alexnet_jax
from alexnet_jax.data import augment
from alexnet_jax.data.source import load_source
from alexnet_jax.distributed import sharding
from alexnet_jax.errors import InputError
from alexnet_jax.inference import contact_sheet, predictor, saliency
from alexnet_jax.inference.evaluate import evaluate_network

pytestmark = [
    # Orbax and TensorStore leave their event loops to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

MAKE_MESH = sharding.make_mesh


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda: MAKE_MESH(jax.devices()[:1]))
        # The programs' own cache would be the user's.
        patch.setattr("alexnet_jax.environment.prepare", list)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "tiny", tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(made):
    return made[0]


@pytest.fixture(scope="module")
def network(run):
    return alexnet_jax.load(run)


@pytest.fixture(scope="module")
def test_set(network):
    return load_source(network.config.data, "test").read_all()


def everything(folder):
    """Returns each file of a folder with its time and content."""
    return {
        path: (path.stat().st_mtime_ns, path.is_file() and hashlib.md5(path.read_bytes()).digest())
        for path in folder.rglob("*")
    }


# --- the weights --------------------------------------------------------------------------------


def test_the_newest_and_the_best_checkpoint_and_any_other_can_be_had(made):
    run, states = made
    for which, step in (("newest", 30), ("best", 10), (20, 20)):
        for ema in (True, False):
            found = alexnet_jax.load(run, checkpoint=which, ema=ema)
            assert (found.step, found.ema) == (step, ema)
            assert found.accuracy == ACCURACIES[step]
            right = states[step].averaged() if ema else states[step]
            for array, wanted in zip(
                jax.tree.leaves(found.eval_state.variables),
                jax.tree.leaves(right.variables),
                strict=True,
            ):
                np.testing.assert_array_equal(array, wanted)


def test_a_damaged_accuracy_makes_no_best(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    path = copy / "checkpoints/10/metrics/metrics"
    path.write_text(path.read_text().replace("0.9", "0.8"))
    assert alexnet_jax.load(copy, checkpoint="best").step == 30
    for path in copy.glob("checkpoints/*/metrics/metrics"):
        path.unlink()
    with pytest.raises(InputError, match="best is not known"):
        alexnet_jax.load(copy, checkpoint="best")


def test_nothing_in_the_run_folder_changes(run):
    before = everything(run)
    network = alexnet_jax.load(run, checkpoint="best")
    network.predict(np.zeros((SIZE, SIZE), np.uint8))
    evaluate_network(network, "validation")
    assert everything(run) == before


def test_wrong_values_are_noticed(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    saver = ocp.Checkpointer(ocp.StandardCheckpointHandler())
    item = copy / "checkpoints" / "30" / "params"
    params = saver.restore(item)
    params["fc1"]["bias"] = params["fc1"]["bias"].at[3].add(1e-6)
    saver.save(item, args=ocp.args.StandardSave(params), force=True)
    assert alexnet_jax.load(run).step == 30
    with pytest.raises(InputError, match=r"30 .*damaged \(params/fc1/bias .* another: 20, 10\."):
        alexnet_jax.load(copy)
    assert alexnet_jax.load(copy, checkpoint=20).step == 20


def test_what_cannot_be_used_is_said_in_a_sentence(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    for path in (copy / "checkpoints/30/rest").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=r"checkpoint 30 .* is damaged .* another: 20, 10\."):
        alexnet_jax.load(copy)
    with pytest.raises(InputError, match=r"'worst' is not in .* one of 30, 20, 10\."):
        alexnet_jax.load(copy, checkpoint="worst")
    with pytest.raises(InputError, match="does not exist"):
        alexnet_jax.load(tmp_path / "nothing")
    with pytest.raises(InputError, match="is not a run folder"):
        alexnet_jax.load(tmp_path)

    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model.hidden": [17]}))
    with pytest.raises(
        InputError, match=r"another network or optimizer: .*fc1.*float32\[.*16\].*float32\[.*17\]"
    ):
        alexnet_jax.load(copy, checkpoint=20)
    (copy / "config.json").write_text(json.dumps(config | {"model.wings": 2}))
    with pytest.raises(InputError, match=r"unknown option config\.model\.wings"):
        alexnet_jax.load(copy)
    (copy / "config.json").write_text(json.dumps(config | {"model.dropout": "much"}))
    with pytest.raises(InputError, match=r"config\.json cannot be used here"):
        alexnet_jax.load(copy)
    (copy / "config.json").write_text(json.dumps(config))
    info = json.loads((copy / "dataset.json").read_text())
    for damage in ({"deviation": [0, 1, 1]}, {"mean": [0.5]}, {"class_names": ["a", "a"]}):
        (copy / "dataset.json").write_text(json.dumps(info | damage))
        with pytest.raises(InputError, match=r"dataset\.json is damaged"):
            alexnet_jax.load(copy)
    (copy / "dataset.json").write_text(json.dumps(info))
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(InputError, match="holds no checkpoint"):
        alexnet_jax.load(copy)


def test_an_option_that_is_newer_than_the_run_has_its_default(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    del config["optimizer.nesterov"]
    (copy / "config.json").write_text(json.dumps(config))
    assert alexnet_jax.load(copy).config.optimizer.nesterov is True


def test_importing_the_package_imports_neither_jax_nor_tensorflow():
    program = (
        "import sys, alexnet_jax; print(sorted({'jax', 'numpy', 'tensorflow'} & {*sys.modules}))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


# --- the pixels ---------------------------------------------------------------------------------

DRAW = np.random.default_rng(0)
GREY = DRAW.integers(0, 256, (SIZE, SIZE), np.uint8)
RGB = DRAW.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
ALPHA = DRAW.integers(0, 256, (SIZE, SIZE, 1), np.uint8)
DEEP = DRAW.integers(0, 65536, (SIZE, SIZE), np.uint16)
ON_WHITE = RGB * (ALPHA / 255) + 255 * (1 - ALPHA / 255)


def three(grey):
    return np.repeat(grey[:, :, None], 3, axis=2)


def palette():
    image = Image.frombytes("P", (SIZE, SIZE), (GREY % 4).tobytes())
    image.putpalette([0, 10, 20, 250, 120, 3, 90, 91, 92, 255, 255, 255])
    return image


COLOURS = np.array([[0, 10, 20], [250, 120, 3], [90, 91, 92], [255, 255, 255]])
CMYK = DRAW.integers(0, 256, (SIZE, SIZE, 4), np.uint8)
FROM_CMYK = (255.0 - CMYK[:, :, :3]) * (255.0 - CMYK[:, :, 3:]) / 255


def rotated():
    image = Image.fromarray(RGB)
    exif = image.getexif()
    exif[0x0112] = 6  # what was on the left is to be on top
    return image, exif


CASES = {
    "L": (Image.fromarray(GREY), three(GREY), 0),
    "RGB": (Image.fromarray(RGB), RGB, 0),
    "RGBA": (Image.fromarray(np.concatenate([RGB, ALPHA], axis=2)), ON_WHITE, 1),
    "P": (palette(), COLOURS[GREY % 4], 0),
    "1": (Image.fromarray(GREY > 127), three((GREY > 127) * 255), 0),
    "I;16": (Image.fromarray(DEEP), three(np.round(DEEP / 257)), 0),
    "1x1": (Image.new("RGB", (1, 1), (9, 8, 7)), np.full((SIZE, SIZE, 3), [9, 8, 7]), 0),
}


@pytest.mark.parametrize("mode", CASES)
def test_a_file_and_an_image_of_any_mode_are_what_they_show(network, tmp_path, mode):
    image, right, tolerance = CASES[mode]
    image.save(tmp_path / "image.png")
    for given in (image, tmp_path / "image.png", str(tmp_path / "image.png")):
        found = network.prepare(given)
        assert found.shape == (SIZE, SIZE, 3)
        assert found.dtype == np.uint8
        assert np.abs(found - right.astype(float)).max() <= tolerance


def test_cmyk_is_turned_into_light(network, tmp_path):
    Image.frombytes("CMYK", (SIZE, SIZE), CMYK.tobytes()).save(tmp_path / "image.tiff")
    found = network.prepare(tmp_path / "image.tiff")
    assert np.abs(found - FROM_CMYK).max() <= 2


def test_exif_turns_an_image_upright(network, tmp_path):
    image, exif = rotated()
    image.save(tmp_path / "image.png", exif=exif)
    with Image.open(tmp_path / "image.png") as opened:
        for given in (tmp_path / "image.png", opened):
            np.testing.assert_array_equal(network.prepare(given), np.rot90(RGB, k=-1))


def test_the_middle_of_a_long_image_is_seen(network, tmp_path):
    strip = np.zeros((2, 4000, 3), np.uint8)
    strip[:, 2000:] = 255
    Image.fromarray(strip).save(tmp_path / "strip.png")
    for given in (strip, tmp_path / "strip.png"):
        found = network.prepare(given).astype(int)
        assert found[:, :2].max() < 60
        assert found[:, -2:].min() > 195
    assert network.prepare(strip.transpose(1, 0, 2)).shape == (SIZE, SIZE, 3)


@pytest.mark.parametrize(
    ("pixels", "right"),
    [
        (GREY, three(GREY)),
        (GREY[:, :, None], three(GREY)),
        (RGB, RGB),
        (DEEP, three(np.round(DEEP / 257))),
        (np.concatenate([RGB, np.full_like(ALPHA, 255)], axis=2), RGB),
        (np.concatenate([RGB, np.zeros_like(ALPHA)], axis=2), np.full_like(RGB, 255)),
    ],
    ids=["grey", "one channel", "rgb", "16 bits", "opaque", "transparent"],
)
def test_arrays_are_images_too(network, pixels, right):
    np.testing.assert_array_equal(network.prepare(pixels), right)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((4, 4), np.float32), "dtype is float32; it must be uint8"),
        (np.zeros((5, 4, 6), np.uint8), r"shape is \[5, 4, 6\]"),
        (np.zeros((0, 4, 3), np.uint8), r"shape is \[0, 4, 3\]"),
        (3, "is 3, of type int; it must be a path"),
        ([None], "is None, of type NoneType"),
        ("nowhere.png", "nowhere.png cannot be read .no such file"),
        ("/dev/zero", "/dev/zero cannot be read"),
        (__file__, "is in none of the formats"),
        (Image.new("F", (4, 4)), "32-bit floats"),
    ],
)
def test_what_is_no_image_is_said_in_a_sentence(network, given, message):
    with pytest.raises(InputError, match=message):
        network.predict(given)


def test_bombs_are_refused_from_their_head(network, tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    with pytest.raises(InputError, match=r"bomb.png has more than 100 megapixels"):
        network.predict(tmp_path / "bomb.png")


# --- the answers --------------------------------------------------------------------------------


def probabilities_by_numpy(network, state, images):
    """As the network is defined, but for the module itself."""
    mean, deviation = np.array(network.info["mean"]), np.array(network.info["deviation"])
    scaled = jnp.float32((images / 255 - mean) / deviation)
    logits = np.asarray(network.module.apply(state.variables, scaled, train=False), np.float64)
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def test_it_answers_with_the_probabilities_of_its_module(network, made, test_set):
    images = test_set[0][:100]
    predictions = network.predict(images)
    right = probabilities_by_numpy(network, made[1][30].averaged(), images)
    assert predictions.probabilities.dtype == np.float32
    np.testing.assert_allclose(predictions.probabilities, right, atol=1e-5)
    assert len({*predictions.labels}) > 1
    assert predictions.labels == [network.class_names[i] for i in right.argmax(axis=1)]


def test_the_company_of_an_image_does_not_change_its_answer(network, test_set):
    images = test_set[0][:70]  # two batches, the second filled up
    together = network.predict(images).probabilities
    for number in (0, 63, 64, 69):
        alone = network.predict(images[number]).probabilities
        np.testing.assert_allclose(alone[0], together[number], atol=1e-6)
    listed = network.predict([images[0], Image.fromarray(images[1])]).probabilities
    np.testing.assert_allclose(listed, together[:2], atol=1e-6)
    assert len(network.predict([])) == 0


def test_few_programs_do_for_all_numbers_of_images(run):
    network, compiled = alexnet_jax.load(run), []

    def normalize(images):  # called where a program is traced
        compiled.append(len(images))
        return network.normalize(images)

    counting = dataclasses.replace(network, normalize=normalize)
    for count in range(1, 10):
        counting.logits(np.zeros((count, SIZE, SIZE, 3), np.uint8))
    assert compiled == [1, 2, 4, 8, 16]


def test_top_by_hand():
    shares = np.array([[0.1, 0.6, 0.3], [0.25, 0.25, 0.5]], np.float32)
    predictions = predictor.Predictions(shares, ("a", "b", "c"))
    assert predictions.labels == ["b", "c"]
    ranked = [[name for name, _ in row] for row in predictions.top(2)]
    assert ranked == [["b", "c"], ["c", "a"]]
    assert predictions.top(9)[1] == [("c", 0.5), ("a", 0.25), ("b", 0.25)]


def test_half_precision_is_used_where_the_run_does(network, run, tmp_path, test_set):
    copy = shutil.copytree(run, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model.dtype": "bfloat16"}))
    half = alexnet_jax.load(copy)
    one, other = (n.logits(test_set[0][:8]) for n in (network, half))
    assert 1e-4 < np.abs(one - other).max() < 0.2 * np.abs(one).max()


# --- the measurements ---------------------------------------------------------------------------


def test_loss_accuracy_and_confusion_are_those_of_the_answers(network, made, test_set):
    images, labels = test_set
    found = evaluate_network(network)
    assert (found.data, found.split, found.images) == ("digits", "test", 360)
    state = made[1][30]
    for name, right in (("test", state), ("test_ema", state.averaged())):
        shares = probabilities_by_numpy(network, right, images)
        loss = -np.log(shares[np.arange(360), labels]).mean()
        confusion = np.zeros((10, 10), int)
        np.add.at(confusion, (labels, shares.argmax(axis=1)), 1)
        assert found.results[name]["loss"] == pytest.approx(loss, rel=1e-4)
        assert found.results[name]["confusion"].tolist() == confusion.tolist()
        assert found.results[name]["accuracy"] == pytest.approx(np.trace(confusion) / 360)


def test_parts_of_splits_and_streams_can_be_measured(network):
    half = evaluate_network(network, "test[:50%]")
    assert half.images == 180 == half.results["test[:50%]"]["confusion"].sum()
    data = dataclasses.replace(network.config.data, in_memory="off", workers=0)
    streamed = evaluate_network(network, "train", data)
    assert streamed.images == 1295 == streamed.results["train"]["confusion"].sum()
    resident = evaluate_network(network, "train")
    np.testing.assert_array_equal(
        streamed.results["train"]["confusion"], resident.results["train"]["confusion"]
    )


def changed(network, **changes):
    """Returns the network as if its run had been on other data."""
    return dataclasses.replace(network, info=network.info | changes)


def test_other_data_are_measured_only_where_they_fit(network):
    other = changed(network, class_names=[*network.class_names[:9], "ten"])
    with pytest.raises(InputError, match="number 9 is '9' there and 'ten' here"):
        evaluate_network(other)
    other = changed(network, class_names=["0", "1"])
    with pytest.raises(InputError, match="it has 10 and the network 2"):
        evaluate_network(other)
    other = changed(network, checksums={"train": "others", "test": "others"})
    for split in ("test", "validation", "test[:10]"):
        with pytest.raises(InputError, match=r"have changed since the run .* they were others"):
            evaluate_network(other, split)
    data = dataclasses.replace(network.config.data, image_size=9)
    with pytest.raises(InputError, match=r"image_size is 9; the network was trained with 8"):
        evaluate_network(network, data=data)
    renamed = changed(other, name="another")
    assert evaluate_network(renamed, "test[:10]").images == 10
    for too_small in (0.0, 0.003):
        data = dataclasses.replace(network.config.data, validation_fraction=too_small)
        with pytest.raises(InputError, match="has no validation images"):
            evaluate_network(network, "validation", data)


# --- where it looks -----------------------------------------------------------------------------


class Linear(nn.Module):
    """Whose gradient is known: the weights."""

    @nn.compact
    def __call__(self, images, *, train):
        return nn.Dense(3)(images.reshape(images.shape[0], -1))


def test_the_saliency_of_a_linear_network_is_its_weights(network):
    module = Linear()
    variables = module.init(jax.random.key(0), np.zeros((1, 4, 4, 3)), train=False)
    state = network.state.replace(params=variables["params"], model_state={}, ema={})
    linear = dataclasses.replace(network, module=module, state=state, ema=False)
    images = DRAW.integers(0, 256, (2, 4, 4, 3), np.uint8)
    found = saliency.smooth_grad(linear, images, np.array([2, 0]), samples=4)
    kernel = np.asarray(variables["params"]["Dense_0"]["kernel"]).reshape(4, 4, 3, 3)
    right = np.abs(kernel).max(axis=2)
    np.testing.assert_allclose(found, [right[..., 2], right[..., 0]], rtol=1e-5)
    # Of a larger image the network sees the middle alone.
    middle = augment.create_normalize((0.5,) * 3, (0.25,) * 3, crop_size=4)
    cropping = dataclasses.replace(linear, normalize=middle)
    larger = DRAW.integers(0, 256, (1, 7, 6, 3), np.uint8)
    (around,) = saliency.smooth_grad(cropping, larger, np.array([2]), samples=4)
    assert around.shape == (7, 6)
    np.testing.assert_allclose(around[1:5, 1:5], right[..., 2], rtol=1e-5)
    assert np.count_nonzero(around) == 16


def test_long_names_are_cut_in_their_middle():
    font = contact_sheet.font(12)
    cut = contact_sheet.shorten("a_very_long_name_of_a_picture_0001.png", font, 100)
    assert font.getlength(cut) <= 100
    assert cut.startswith("a_ve")
    assert cut.endswith(".png")
    assert contact_sheet.shorten("short", font, 100) == "short"
