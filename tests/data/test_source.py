"""Opening data sets by name: digits, prepared folders, TFDS's own, and what can go wrong."""

import http.server
import importlib.util
import io
import json
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from alexnet_jax import environment
from alexnet_jax.data import source
from alexnet_jax.data.prepare import downloads, prepare
from alexnet_jax.data.source import load_source
from alexnet_jax.errors import InputError

ROOT = Path(__file__).parents[2]


def config(data_dir, name="digits", image_size=8):
    return ConfigDict(
        {
            "name": name,
            "data_dir": str(data_dir),
            "image_size": image_size,
            "train_split": "train",
            "test_split": "test",
            "validation_fraction": 0.1,
        }
    )


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("tfds")
    load_source(config(data_dir), "train")
    return data_dir


@pytest.fixture
def stripes_dir(tmp_path):
    """A prepared set of 12 images 20 x 10, grey but for a red left edge."""
    image = Image.new("RGB", (20, 10), (90, 90, 90))
    image.paste((255, 0, 0), (0, 0, 2, 10))
    for name in ("a", "b"):
        (tmp_path / "stripes" / name).mkdir(parents=True)
        for index in range(6):
            image.save(tmp_path / "stripes" / name / f"{index}.png")
    prepare.prepare_path(tmp_path / "stripes", data_dir=str(tmp_path / "tfds"), test_fraction=0.5)
    return tmp_path / "tfds"


def masked_crc32c(data):
    """Written out bit by bit, to check the library's."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def to_tfrecord(folder):
    """Rewrites a prepared set as TFDS would have prepared it by default."""
    from array_record.python.array_record_module import ArrayRecordReader

    for path in folder.glob("*.array_record-*"):
        reader = ArrayRecordReader(str(path))
        records = reader.read_all()
        reader.close()
        framed = b"".join(
            part + masked_crc32c(part)
            for item in records
            for part in (struct.pack("<Q", len(item)), item)
        )
        path.with_name(path.name.replace("array_record", "tfrecord")).write_bytes(framed)
        path.unlink()
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (folder / "dataset_info.json").write_text(json.dumps(info))


# --- reading ------------------------------------------------------------------------------------


def test_digits_prepare_themselves(digits_dir):
    from sklearn.datasets import load_digits

    train, test = (load_source(config(digits_dir), split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1437, 360)
    assert train.class_names == tuple("0123456789")
    assert train.image_shape == (8, 8, 3)
    pixels, labels = (
        np.concatenate(pair) for pair in zip(train.read_all(), test.read_all(), strict=True)
    )
    assert (pixels.dtype, labels.dtype) == (np.uint8, np.int32)
    assert np.array_equal(pixels[..., 0], pixels[..., 2])  # Grey, three times.
    digits = load_digits()
    expected = np.round(digits.images * (255 / 16)).astype(np.uint8)
    found = sorted(
        (label, image.tobytes()) for image, label in zip(pixels[..., 0], labels, strict=True)
    )
    assert found == sorted(
        (label, image.tobytes()) for image, label in zip(expected, digits.target, strict=True)
    )
    counts = np.bincount(test.read_all()[1])
    assert np.abs(counts - 0.2 * np.bincount(digits.target)).max() <= 1  # Stratified.


def test_the_digits_are_the_same_everywhere(digits_dir, tmp_path):
    first, second = (load_source(config(folder), "test") for folder in (digits_dir, tmp_path))
    assert [first.records[i] for i in range(360)] == [second.records[i] for i in range(360)]


def test_indexing_agrees_with_read_all(digits_dir):
    source = load_source(config(digits_dir), "test")
    pixels, labels = source.read_all()
    for index in (0, 137, 359, np.int64(5)):
        example = source[index]
        assert np.array_equal(example["image"], pixels[index])
        assert example["label"] == labels[index]
        assert isinstance(example["label"], int)
    for index in (-1, 360):
        with pytest.raises(IndexError):
            source[index]
    assert sum(1 for _ in source) == 360


def test_a_source_can_be_pickled(digits_dir):
    source = load_source(config(digits_dir), "test")
    source[0]
    copy = pickle.loads(pickle.dumps(source))
    assert np.array_equal(copy[3]["image"], source[3]["image"])


def test_slices_are_parts_of_the_split(digits_dir):
    whole = load_source(config(digits_dir), "train").read_all()[0]
    parts = [load_source(config(digits_dir), f"train[{part}]") for part in (":90%", "90%:")]
    assert np.array_equal(np.concatenate([part.read_all()[0] for part in parts]), whole)
    assert len(load_source(config(digits_dir), "train+test")) == 1797


def test_other_sizes_are_scaled_and_cropped(stripes_dir):
    image = load_source(config(stripes_dir, "stripes", 5), "train")[0]["image"]
    assert image.shape == (5, 5, 3)
    assert (image == 90).all()  # Cropped, not squeezed: no red.
    same = load_source(config(stripes_dir, "stripes", 10), "train")[0]["image"]
    assert (same == 90).all()


def test_the_usual_folder_follows_the_environment(digits_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(digits_dir))
    monkeypatch.setattr(prepare, "run_builder", lambda *args: pytest.fail("not found there"))
    assert len(load_source(config(""), "test")) == 360


def test_processes_that_start_together_prepare_once(tmp_path, monkeypatch):
    runs = []
    run = prepare.run_builder
    monkeypatch.setattr(prepare, "run_builder", lambda *args: (runs.append(1), run(*args)))
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: prepare.prepare_digits(str(tmp_path)), range(3)))
    assert len(runs) == 1


# --- what can go wrong --------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["validation", "trian", "train[:bad]", "train[:0]", ""])
def test_a_split_that_does_not_exist(digits_dir, split):
    with pytest.raises(InputError, match=r"has train \(1437\), test \(360\)"):
        load_source(config(digits_dir), split)


def test_an_unknown_name_names_the_near_ones(stripes_dir):
    with pytest.raises(InputError, match=r"'cifar11'.*did you mean .*cifar10"):
        load_source(config(stripes_dir, "cifar11"), "train")
    with pytest.raises(InputError, match="did you mean stripes"):
        load_source(config(stripes_dir, "strips"), "train")
    with pytest.raises(InputError, match="prepare it with `alexnet-jax prepare`"):
        load_source(config(stripes_dir, "qqqqqqqqqq"), "train")


@pytest.mark.parametrize("name", ["", "a b", "../x", "huggingface:mnist", "a/b/c"])
def test_a_name_that_is_none(tmp_path, name):
    with pytest.raises(InputError, match=r"config\.data\.name"):
        load_source(config(tmp_path, name), "train")
    assert not list(tmp_path.iterdir())


def test_an_unknown_config(tmp_path):
    with pytest.raises(InputError, match="imagenet_resized/33x33"):
        load_source(config(tmp_path, "imagenet_resized/33x33"), "train")


def test_a_size_that_is_none(digits_dir):
    with pytest.raises(InputError, match="image_size is 0"):
        load_source(config(digits_dir, image_size=0), "train")


def test_a_set_that_is_no_image_classification(tmp_path):
    import tensorflow_datasets as tfds

    class Texts(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"text": tfds.features.Text(), "score": tfds.features.Scalar(np.int64)}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield 0, {"text": "word", "score": 1}

    prepare.run_builder(Texts(data_dir=tmp_path, file_format="array_record"), tmp_path)
    with pytest.raises(InputError, match=r"has score \(Scalar\), text \(Text\)"):
        load_source(config(tmp_path, "texts"), "train")


def test_keys_without_supervision_and_labels_that_are_none(tmp_path):
    import tensorflow_datasets as tfds

    class Partly(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "id": tfds.features.Text(),
                "photo": tfds.features.Image(shape=(2, 2, 3)),
                "category": tfds.features.ClassLabel(num_classes=2),
                "label": tfds.features.ClassLabel(num_classes=3),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {
                name: self._generate_examples(label) for name, label in (("train", 2), ("test", -1))
            }

        def _generate_examples(self, label):
            png = io.BytesIO()
            Image.new("RGB", (2, 2), "red").save(png, "PNG")
            png.seek(0)
            yield 0, {"id": "x", "photo": png, "category": 0, "label": label}

    prepare.run_builder(Partly(data_dir=tmp_path, file_format="array_record"), tmp_path)
    source = load_source(config(tmp_path, "partly", 2), "train")
    assert source[0]["label"] == 2
    assert source.class_names == ("0", "1", "2")
    with pytest.raises(InputError, match="label -1"):
        load_source(config(tmp_path, "partly", 2), "test").read_all()


def test_damage_to_prepared_data_is_a_sentence(stripes_dir):
    folder = stripes_dir / "stripes" / "1.0.0"
    (file,) = folder.glob("*train.array_record*")
    content = file.read_bytes()
    file.unlink()
    with pytest.raises(InputError, match=f"{file.name} is missing"):
        load_source(config(stripes_dir, "stripes"), "train")
    file.write_bytes(content)
    (folder / "dataset_info.json").write_text('{"name": "stri')
    with pytest.raises(InputError, match=r"stripes.* cannot be opened"):
        load_source(config(stripes_dir, "stripes"), "train")


def test_a_damaged_template_of_file_names_is_a_sentence(stripes_dir):
    """Found by `--hypothesis-profile=thousand`; TFDS looks at it late."""
    file = stripes_dir / "stripes" / "1.0.0" / "dataset_info.json"
    file.write_text(file.read_text().replace("{FILEFORMAT}", "{FILFORMAT}"))
    with pytest.raises(InputError, match=r"stripes in .* cannot be opened \(Could not format"):
        load_source(config(stripes_dir, "stripes"), "train")


def test_damage_to_a_record_is_a_sentence(stripes_dir):
    (file,) = (stripes_dir / "stripes" / "1.0.0").glob("*train.array_record*")
    content = bytearray(file.read_bytes())
    where = content.find(b"IDAT")
    assert where > 0
    content[where + 5] ^= 255
    file.write_bytes(content)
    source = load_source(config(stripes_dir, "stripes", 10), "train")
    with pytest.raises(InputError, match="files of stripes train are damaged"):
        source.read_all()


# --- what TFDS said, kept -----------------------------------------------------------------------


@pytest.fixture
def asked(stripes_dir, monkeypatch, tmp_path):
    """The splits that TFDS is asked for, after a first opening of stripes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load_source(config(stripes_dir, "stripes"), "train")
    found, find_split = [], source.find_split

    def noting(name, data_dir, split):
        found.append(split)
        return find_split(name, data_dir, split)

    monkeypatch.setattr(source, "find_split", noting)
    return found


def test_what_was_opened_before_is_opened_without_tfds(asked, stripes_dir):
    first = load_source(config(stripes_dir, "stripes"), "train")
    assert not asked
    code = f"""
import sys
sys.modules["tensorflow_datasets"] = None  # an import of it fails
from ml_collections import ConfigDict
from alexnet_jax.data.source import load_source
source = load_source(ConfigDict({config(stripes_dir, "stripes").to_dict()!r}), "train")
print(source.name, source.class_names, source.fingerprint, len(source), source.records[5].hex())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    expected = (first.name, first.class_names, first.fingerprint, 6, first.records[5].hex())
    assert done.stdout.strip() == " ".join(map(str, expected))


def test_tfds_is_asked_for_every_split_once(asked, stripes_dir):
    for split in ("test", "train[:50%]", "test", "train[:50%]", "train"):
        load_source(config(stripes_dir, "stripes"), split)
    assert asked == ["test", "train[:50%]"]
    assert len(load_source(config(stripes_dir, "stripes"), "train[:50%]")) == 3


def newer_version(folder):
    shutil.copytree(folder, folder.with_name("1.0.1"))
    info = folder.with_name("1.0.1") / "dataset_info.json"
    info.write_text(info.read_text().replace("1.0.0", "1.0.1"))


def other_names(folder):
    (folder / "label.labels.txt").write_text("left\nright\n")


def prepared_again(folder):
    """As `alexnet-jax prepare --overwrite` leaves it."""
    tree = folder.parents[2] / "stripes"
    (tree / "a").rename(tree / "z")
    prepare.prepare_path(tree, data_dir=str(folder.parents[1]), test_fraction=0.5, overwrite=True)


@pytest.mark.parametrize(
    ("change", "folder", "names"),
    [
        (newer_version, "1.0.1", ("a", "b")),
        (other_names, "1.0.0", ("left", "right")),
        (prepared_again, "1.0.0", ("b", "z")),
    ],
)
def test_tfds_is_asked_again_after_any_change(asked, stripes_dir, change, folder, names):
    change(stripes_dir / "stripes" / "1.0.0")
    source = load_source(config(stripes_dir, "stripes"), "train")
    assert asked == ["train"]
    assert (Path(source.folder).name, source.class_names) == (folder, names)


@pytest.mark.parametrize("content", ["", "[]", '{"split": {}}', '{"split": {"folder": "/"}}'])
def test_a_damaged_file_of_the_cache_is_replaced(asked, stripes_dir, content):
    (file,) = (environment.cache_folder() / "splits").iterdir()
    file.write_text(content)
    for _ in range(2):
        assert len(load_source(config(stripes_dir, "stripes"), "train")) == 6
    assert asked == ["train"]


def test_a_cache_that_cannot_be_written_is_done_without(asked, stripes_dir, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(load_source(config(stripes_dir, "stripes"), "train")) == 6
    assert asked == ["train"]


# --- TFRecord -----------------------------------------------------------------------------------


def test_tfrecord_is_converted_beside_itself(stripes_dir):
    before = load_source(config(stripes_dir, "stripes", 10), "train")
    expected = [before.records[index] for index in range(6)]
    folder = stripes_dir / "stripes" / "1.0.0"
    to_tfrecord(folder)
    originals = {path.name: path.read_bytes() for path in folder.glob("*.tfrecord-*")}
    source = load_source(config(stripes_dir, "stripes", 10), "train")
    assert [source.records[index] for index in range(6)] == expected
    assert {path.name: path.read_bytes() for path in folder.glob("*.tfrecord-*")} == originals
    assert json.loads((folder / "dataset_info.json").read_text())["fileFormat"] == "tfrecord"
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    load_source(config(stripes_dir, "stripes", 10), "test")  # Converted already.
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written


def flip(data, byte):
    return data[:byte] + bytes([data[byte] ^ 4]) + data[byte + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-30],
        lambda data: data[: len(data) // 6],
        lambda data: flip(data, 7),  # The length: 2**58 bytes and more.
        lambda data: flip(data, 40),
        lambda data: flip(data, -1 % len(data)),
    ],
)
def test_a_damaged_tfrecord_is_refused_and_nothing_changes(stripes_dir, damage):
    folder = stripes_dir / "stripes" / "1.0.0"
    to_tfrecord(folder)
    (file,) = folder.glob("*train.tfrecord*")
    file.write_bytes(damage(file.read_bytes()))
    files = {path.name for path in folder.iterdir() if "test" not in path.name}
    for _ in range(2):
        with pytest.raises(InputError, match=f"{file.name} cannot be converted"):
            load_source(config(stripes_dir, "stripes"), "train")
    assert {path.name for path in folder.iterdir() if "test" not in path.name} == files


def test_formats_that_cannot_be_converted_name_the_remedy(stripes_dir):
    folder = stripes_dir / "stripes" / "1.0.0"
    to_tfrecord(folder)
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = "riegeli"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(InputError, match=r"prepared as riegeli.*--config\.data\.data_dir"):
        load_source(config(stripes_dir, "stripes"), "train")


# --- downloads ----------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch):
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # Nothing listens there.
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)


def test_without_a_network_a_message_comes_at_once(tmp_path, no_network):
    start = time.monotonic()
    with pytest.raises(InputError) as caught:
        load_source(config(tmp_path, "cifar10"), "train")
    assert time.monotonic() - start < 8
    for part in (
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz (162.17 MiB)",
        str(tmp_path / "downloads" / "manual"),
        "alexnet-jax prepare FILE",
        "the same command again",
    ):
        assert part in str(caught.value)


def cached_download(data_dir, folder, url, info):
    """Where TFDS keeps a file that it has downloaded."""
    from tensorflow_datasets.core.download import resource

    file = data_dir / "downloads" / folder / resource.get_dl_fname(url, info.checksum)
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


@pytest.mark.parametrize("folder", ["", "mnist"])
def test_only_missing_files_are_asked_for(tmp_path, no_network, folder):
    import tensorflow_datasets as tfds

    builder = tfds.builder("mnist", data_dir=tmp_path)
    urls = list(builder.url_infos)
    assert len(urls) == 4
    files = [cached_download(tmp_path, folder, *item) for item in builder.url_infos.items()]
    for index in (0, 2, 3):
        files[index].touch()
    with pytest.raises(InputError) as caught:
        downloads.check_downloads(builder, tmp_path / "downloads")
    assert [url in str(caught.value) for url in urls] == [False, True, False, False]
    assert "alexnet-jax prepare" not in str(caught.value)
    files[1].touch()
    downloads.check_downloads(builder, tmp_path / "downloads")


def test_a_wrong_file_put_there_by_hand(tmp_path, no_network):
    file = tmp_path / "downloads" / "manual" / "cifar-10-binary.tar.gz"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"cut short")
    with pytest.raises(
        InputError, match=r"cifar-10-binary\.tar\.gz .*sha256 is \w+, expected c4a38c50"
    ):
        load_source(config(tmp_path, "cifar10"), "train")


@pytest.fixture
def no_proxy(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_proxy")
def test_a_host_that_answers_is_reachable(monkeypatch):
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/file"  # Answers 501: it knows no HEAD.
    monkeypatch.setattr(server.RequestHandlerClass, "log_message", lambda *_: None)
    assert downloads.unreachable_hosts([url]) == {}
    server.shutdown()
    server.server_close()
    assert "refused" in str(downloads.unreachable_hosts([url]))


@pytest.mark.usefixtures("no_proxy")
def test_a_host_that_is_silent_is_given_up(monkeypatch):
    monkeypatch.setattr(downloads, "PROBE_SECONDS", 0.1)

    def slow(*args, **kwargs):  # as a name server may be that does not answer
        time.sleep(1)
        raise OSError("no such host")

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    start = time.monotonic()
    assert list(downloads.unreachable_hosts(["http://silent/file"])) == ["silent"]
    assert time.monotonic() - start < 0.9


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("Disk is full.\nmore"), "could not prepare mnist in .*: Disk is full"),
        (ModuleNotFoundError("No module", name="scipy"), "`pip install scipy`"),
    ],
)
def test_failures_of_tfds_are_sentences(tmp_path, monkeypatch, error, message):
    import tensorflow_datasets as tfds

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(prepare, "check_downloads", lambda *_: None)
    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", fail)
    with pytest.raises(InputError, match=message):
        load_source(config(tmp_path, "mnist"), "train")
    assert not list((tmp_path / "mnist").glob("*incomplete*"))


# --- with and without TensorFlow ----------------------------------------------------------------


def run_python(program, tmp_path):
    path = f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests' / 'data'}"
    environment = {**os.environ, "PYTHONPATH": path, "HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_everything_works_without_tensorflow(tmp_path):
    program = f"""
import sys
import hiding; hiding.hide_tensorflow()
from pathlib import Path
import test_source, test_prepare
from alexnet_jax.data.prepare import downloads, prepare
from alexnet_jax.data.source import load_source

tmp_path = Path({str(tmp_path)!r})
test_prepare.test_both_cifar10_archives_give_the_same_records(tmp_path)
path = test_prepare.write_folder(tmp_path / "pets", test_prepare.tree_files())
prepared = prepare.prepare_path(path, data_dir=str(tmp_path / "tfds"))
test_source.to_tfrecord(prepared.folder)
for name in ("pets", "digits"):
    images, labels = load_source(test_source.config(tmp_path / "tfds", name), "train").read_all()
    print(len(images))
assert not any(name.split(".")[0] == "tensorflow" for name in sys.modules)
"""
    assert run_python(program, tmp_path).split() == ["6", "1437"]


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="needs TensorFlow")
def test_tfds_itself_prepares_the_same_cifar10(tmp_path):
    """TFDS's own builder, in its own TFRecord format, against ours: same order, same pixels."""
    program = f"""
from pathlib import Path
import numpy as np
import tensorflow_datasets as tfds
import test_source, test_prepare
from alexnet_jax.data.source import load_source
from tensorflow_datasets.image_classification.cifar import Cifar10

tmp_path = Path({str(tmp_path)!r})
data = test_prepare.cifar10_data()
manual = tmp_path / "theirs" / "downloads" / "manual"
manual.parent.mkdir(parents=True)
archive = test_prepare.binary_archive(manual, data)
((url, info),) = Cifar10.url_infos.items()
checksum = test_prepare.sums(archive)[archive.name]
size = archive.stat().st_size
infos = {{url: tfds.download.checksums.UrlInfo(
    size=tfds.core.utils.Size(size), checksum=checksum, filename=info.filename)}}
Cifar10.url_infos = infos
builder = Cifar10(data_dir=tmp_path / "theirs")
builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual))
assert list(Path(builder.data_dir).glob("*.tfrecord-*"))
test_prepare.prepare_cifar10(archive, tmp_path / "ours")
for split in ("train", "test"):
    theirs, ours = (load_source(test_source.config(tmp_path / name, "cifar10", 32), split)
                    for name in ("theirs", "ours"))
    assert theirs.class_names == ours.class_names
    for one, other in zip(theirs.read_all(), ours.read_all(), strict=True):
        np.testing.assert_array_equal(one, other)
print("equal")
"""
    assert run_python(program, tmp_path).strip().endswith("equal")
