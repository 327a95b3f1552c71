"""Preparing data sets: archives, folders, images, and everything that can be wrong with them."""

import fcntl
import hashlib
import io
import os
import pickle
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from alexnet_jax.cli import prepare as script
from alexnet_jax.config import default_config
from alexnet_jax.data import decode
from alexnet_jax.data.prepare import builders, prepare, trees
from alexnet_jax.data.source import load_source
from alexnet_jax.errors import InputError

ROOT = Path(__file__).parents[2]


def encoded(color=(200, 30, 60), size=(12, 10), mode="RGB", kind="PNG", **options):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def tree_files(splits=("train", "test"), classes=("cat", "dog"), count=3):
    return {
        f"{split}/{name}/{index}.png": encoded((40 * index, len(name), row))
        for row, split in enumerate(splits)
        for name in classes
        for index in range(count)
    }


def write_folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def write_tar(path, files, mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            if name.endswith("/"):
                member.type = tarfile.DIRTYPE
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def source_of(prepared, data_dir, split="train", size=12):
    config = ConfigDict({"name": prepared.name, "data_dir": str(data_dir), "image_size": size})
    return load_source(config, split)


def leftovers(data_dir):
    """Everything under the root that a reader could take for data."""
    return [
        file
        for file in Path(data_dir).rglob("*")
        if file.is_file() and file.name != ".lock" and "downloads" not in file.parts
    ]


# --- class folders ------------------------------------------------------------------------------


WRITERS = {
    "data": write_folder,
    "data.zip": write_zip,
    "data.tar": lambda path, files: write_tar(path, files, "w"),
    "data.tar.gz": lambda path, files: write_tar(path, files, "w:gz"),
    "data.tar.xz": lambda path, files: write_tar(path, files, "w:xz"),
    "data.tar.bz2": lambda path, files: write_tar(path, files, "w:bz2"),
    "data.tgz": lambda path, files: write_tar(path, files, "w:gz"),
}


@pytest.mark.parametrize("container", WRITERS)
def test_every_container_gives_the_same_labels(tmp_path, container):
    files = {f"top/{name}": content for name, content in tree_files().items()}
    files |= {"top/README.txt": b"hello", "top/train/cat/.hidden.png": b"x"}
    files |= {"__MACOSX/top/train/cat/._0.png": b"x"}
    labeled = trees.label_files(WRITERS[container](tmp_path / container, files), 0.2)
    assert labeled.class_names == ("cat", "dog")
    assert labeled.ignored == 1  # The README; what is hidden is not even counted.
    assert labeled.splits["train"] == {
        f"top/train/{name}/{index}.png": name for name in ("cat", "dog") for index in range(3)
    }
    assert len(labeled.splits["test"]) == 6
    read = {entry.name: entry.read() for entry in trees.walk(labeled.path) if not entry.is_folder}
    assert read["top/train/cat/1.png"] == files["top/train/cat/1.png"]


@pytest.mark.parametrize("container", ["data", "data.zip", "data.tar.xz"])
def test_prepared_images_are_the_originals(tmp_path, container):
    files = tree_files(count=2)
    path = WRITERS[container](tmp_path / container, files)
    prepared = prepare.prepare_path(path, name="pets", data_dir=str(tmp_path / "tfds"))
    assert prepared.is_new
    assert prepared.splits == {"train": 4, "test": 4}
    assert prepared.class_names == ("cat", "dog")
    pixels, labels = source_of(prepared, tmp_path / "tfds").read_all()
    found = {
        (prepared.class_names[label], *image[5, 5])
        for image, label in zip(pixels, labels, strict=True)
    }
    assert found == {(name, 40 * index, 3, 0) for name in ("cat", "dog") for index in range(2)}


@pytest.mark.parametrize("held_out", ["val", "validation", "valid"])
def test_validation_stands_in_for_a_missing_test(tmp_path, held_out):
    path = write_folder(tmp_path / "data", tree_files(splits=("train", held_out)))
    assert set(trees.label_files(path, 0.2).splits) == {"train", "test"}


def test_validation_stays_itself_beside_a_test(tmp_path):
    path = write_folder(tmp_path / "data", tree_files(splits=("train", "val", "test")))
    splits = trees.label_files(path, 0.2).splits
    assert set(splits) == {"train", "validation", "test"}
    assert all(name.startswith("val/") for name in splits["validation"])


def test_one_tree_is_split_class_by_class(tmp_path):
    files = tree_files(splits=("x",), classes=("cat", "dog"), count=20)
    labeled = trees.label_files(write_folder(tmp_path / "a", files), 0.25)
    for split, count in {"train": 15, "test": 5}.items():
        labels = list(labeled.splits[split].values())
        assert [labels.count(name) for name in ("cat", "dog")] == [count, count]
    assert not set(labeled.splits["train"]) & set(labeled.splits["test"])
    # Neither the order in the archive nor other classes matter to where an image goes.
    more = dict(reversed(files.items())) | {"x/emu/0.png": encoded(), "x/emu/1.png": encoded()}
    again = trees.label_files(write_tar(tmp_path / "b.tar", more, "w"), 0.25)
    kept = {name for name, label in again.splits["test"].items() if label != "emu"}
    assert kept == set(labeled.splits["test"])


def test_train_may_be_a_class(tmp_path):
    files = {f"{name}/{index}.png": encoded() for name in ("train", "bus") for index in range(5)}
    files["train/night/0.png"] = encoded()
    assert trees.label_files(write_folder(tmp_path / "d", files), 0.2).class_names == (
        "bus",
        "train",
    )


def test_links_and_devices_are_skipped(tmp_path):
    path = write_tar(tmp_path / "data.tar", tree_files(), "w")
    with tarfile.open(path, "a") as tar:
        for name, kind in {
            "train/cat/l.png": tarfile.SYMTYPE,
            "train/cat/d.png": tarfile.CHRTYPE,
        }.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    found = trees.label_files(path, 0.2)
    assert (len(found.splits["train"]), found.ignored) == (6, 2)
    folder = write_folder(tmp_path / "folder", tree_files())
    (folder / "train/cat/l.png").symlink_to("/etc/passwd")
    (folder / "train/bird").symlink_to(folder / "train/cat")
    found = trees.label_files(folder, 0.2)
    assert (len(found.splits["train"]), found.ignored) == (6, 2)
    links = tmp_path / "links"
    links.mkdir()
    (links / "cat").symlink_to(folder / "train/cat")
    with pytest.raises(InputError, match=r"no class folder .* were not followed \(1\); copy"):
        trees.label_files(links, 0.2)
    (links / "dog").mkdir()
    (links / "dog" / "0.png").symlink_to(folder / "train/dog/0.png")
    with pytest.raises(InputError, match=r"dog of .* holds no image; .* were not followed \(2"):
        trees.label_files(links, 0.2)


def test_members_outside_the_archive_write_nothing(tmp_path):
    files = {"../../escaped/cat/0.png": encoded(), "/absolute/0.png": encoded()} | tree_files()
    path = write_tar(tmp_path / "evil.tar", files, "w")
    prepared = prepare.prepare_path(path, data_dir=str(tmp_path / "deep" / "er" / "tfds"))
    assert prepared.name == "evil"
    assert not list(tmp_path.rglob("*escaped*"))
    assert not Path("/absolute").exists()


EMPTY_CLASS = tree_files() | {"train/emu/notes.txt": b"no image"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (EMPTY_CLASS, r"class folder train/emu .* holds no image"),
        (tree_files() | {"test/emu/0.png": encoded()}, "class emu in test but not in train"),
        (tree_files(classes=("cat",)), "only the class folder cat"),
        ({"readme.txt": b"x"}, "holds no class folder"),
        (tree_files(splits=("x",), count=1), "too few images"),
    ],
)
def test_bad_trees_are_refused(tmp_path, files, message):
    for path in (write_folder(tmp_path / "d", files), write_tar(tmp_path / "d.tar.gz", files)):
        with pytest.raises(InputError, match=message):
            prepare.prepare_path(path, name="mine", data_dir=str(tmp_path / "tfds"))
    assert not leftovers(tmp_path / "tfds")


def test_an_empty_folder_is_an_empty_class(tmp_path):
    folder = write_folder(tmp_path / "d", tree_files())
    (folder / "train" / "emu").mkdir()
    archive = write_tar(tmp_path / "d.tar", {**tree_files(), "train/emu/": b""}, "w")
    zipped = write_zip(tmp_path / "d.zip", {**tree_files(), "train/emu/": b""})
    for path in (folder, archive, zipped):
        with pytest.raises(InputError, match="train/emu"):
            trees.label_files(path, 0.2)


def test_a_class_that_cannot_be_read_is_not_left_out(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "d", tree_files())
    scandir = os.scandir

    def refusing(path):
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(InputError, match=r"Permission denied.*dog"):
        prepare.prepare_path(folder, name="mine", data_dir=str(tmp_path / "tfds"))


def test_a_name_twice_in_an_archive_is_refused(tmp_path):
    path = write_tar(tmp_path / "d.tar", tree_files(), "w")
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("train/cat/0.png"))
    with pytest.raises(InputError, match=r"train/cat/0\.png twice"):
        trees.label_files(path, 0.2)


@pytest.mark.parametrize("container", ["data.zip", "data.tar", "data.tar.gz", "data.tar.xz"])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.6, 0.97])
def test_a_truncated_archive_is_refused(tmp_path, container, kept):
    noise = np.random.default_rng(0).bytes(3000)
    files = {name: content + noise for name, content in tree_files().items()}
    path = WRITERS[container](tmp_path / container, files)
    if container == "data.tar":  # The archive ends in padding; cut its members instead.
        path.write_bytes(path.read_bytes().rstrip(b"\0"))
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(InputError, match=r"damaged|cut short"):
        trees.label_files(path, 0.2)


def test_a_tar_that_ends_between_members_is_refused(tmp_path):
    path = write_tar(tmp_path / "data.tar", tree_files(), "w")
    with tarfile.open(path) as tar:
        cut = tar.getmember("test/cat/0.png").offset
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError, match="damaged"):
        trees.label_files(path, 0.2)


def test_a_flipped_bit_in_an_archive_is_found(tmp_path):
    for container in ("data.tar.gz", "data.tar.xz", "data.zip"):
        path = WRITERS[container](tmp_path / container, tree_files())
        content = bytearray(path.read_bytes())
        content[len(content) // 3] ^= 16
        path.write_bytes(content)
        with pytest.raises(InputError):
            prepare.prepare_path(path, name="mine", data_dir=str(tmp_path / "tfds"))


def test_a_wrong_checksum_at_the_end_of_an_archive_is_found(tmp_path):
    path = write_tar(tmp_path / "data.tar.gz", tree_files())
    content = bytearray(path.read_bytes())
    content[-8] ^= 1  # gzip ends in the checksum and the length.
    path.write_bytes(content)
    with pytest.raises(InputError, match="CRC"):
        trees.label_files(path, 0.2)


def test_other_files_are_refused(tmp_path):
    file = tmp_path / "data.rar"
    file.write_bytes(b"Rar!")
    with pytest.raises(InputError, match=r"data\.rar is neither a folder nor an archive"):
        prepare.prepare_path(file, data_dir=str(tmp_path))
    with pytest.raises(InputError, match="no file or folder"):
        prepare.prepare_path(tmp_path / "nothing", data_dir=str(tmp_path))
    with pytest.raises(InputError, match=r"test fraction is 1\.5"):
        prepare.prepare_path(tmp_path, data_dir=str(tmp_path), test_fraction=1.5)


@pytest.mark.parametrize("name", ["Big", "1st", "a-b", "cifar10", "digits", "mnist"])
def test_names_that_cannot_be_used(tmp_path, name):
    path = write_folder(tmp_path / "d", tree_files())
    with pytest.raises(InputError, match=f"name '{name}'"):
        prepare.prepare_path(path, name=name, data_dir=str(tmp_path / "tfds"))


@pytest.mark.parametrize(
    ("file", "name"),
    [("My-Photos.tar.xz", "my_photos"), ("2021.zip", "images_2021"), ("flowers", "flowers")],
)
def test_the_name_comes_from_the_path(tmp_path, file, name):
    assert prepare.default_name(tmp_path / file) == name


# --- single images ------------------------------------------------------------------------------


def rgb(data):
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "RGB"
        return np.asarray(image)


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGB", "PNG"), ("L", "PNG"), ("RGB", "JPEG"), ("L", "JPEG")]
)
def test_plain_images_keep_their_bytes(mode, kind):
    data = encoded(mode=mode, kind=kind)
    assert decode.to_jpeg_or_png(data, "x") is data


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("P", "PNG"),
        ("P", "GIF"),
        ("CMYK", "JPEG"),
        ("CMYK", "TIFF"),
        ("RGB", "BMP"),
        ("RGB", "WEBP"),
    ],
)
def test_other_modes_become_rgb_png(mode, kind):
    pixels = rgb(decode.to_jpeg_or_png(encoded(mode=mode, kind=kind), "x")).astype(int)
    assert np.abs(pixels - (200, 30, 60)).max() < 50  # A palette and JPEG are only near.


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_composed_on_white(mode):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    assert (rgb(decode.to_jpeg_or_png(buffer.getvalue(), "x")) == 255).all()


def test_a_transparent_colour_is_composed_on_white():
    data = encoded((1, 2, 3), transparency=(1, 2, 3))
    assert (rgb(decode.to_jpeg_or_png(data, "x")) == 255).all()


def test_16_bit_grey_is_scaled():
    buffer = io.BytesIO()
    Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)).save(buffer, "PNG")
    pixels = rgb(decode.to_jpeg_or_png(buffer.getvalue(), "x"))
    assert pixels[0, :, 0].tolist() == [0, 100, 255]


def test_the_exif_orientation_is_applied():
    image = Image.new("RGB", (8, 4), "red")
    image.paste("blue", (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # Turn by 90 degrees, clockwise.
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    pixels = rgb(decode.to_jpeg_or_png(buffer.getvalue(), "x"))
    assert pixels.shape == (8, 4, 3)
    assert pixels[0, 0].tolist() == [0, 0, 255]
    assert pixels[-1, 0].tolist() == [255, 0, 0]


def bomb(width, height):
    """A PNG that claims a size and holds next to nothing."""
    data = encoded()
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


@pytest.mark.parametrize("size", [(10_001, 10_000), (60_000, 60_000)])
def test_enormous_images_are_refused_by_name(size):
    with pytest.raises(InputError, match=r"train/cat/0\.png has more than 100 megapixels"):
        decode.to_jpeg_or_png(bomb(*size), "train/cat/0.png")


@pytest.mark.parametrize("data", [b"", b"not an image", encoded()[:50], encoded(kind="JPEG")[:-40]])
def test_undecodable_images_are_refused_by_name(tmp_path, data):
    path = write_folder(tmp_path / "d", tree_files() | {"train/dog/bad.png": data})
    with pytest.raises(InputError, match=r"train/dog/bad\.png (cannot be decoded|is in none)"):
        prepare.prepare_path(path, data_dir=str(tmp_path / "tfds"))
    assert not leftovers(tmp_path / "tfds")


def test_a_float_image_is_refused():
    buffer = io.BytesIO()
    Image.new("F", (3, 3)).save(buffer, "TIFF")
    with pytest.raises(InputError, match="32-bit floats"):
        decode.to_jpeg_or_png(buffer.getvalue(), "x")


# --- CIFAR-10 -----------------------------------------------------------------------------------

NAMES = [f"class{index}" for index in range(10)]
BATCHES = [f"data_batch_{part}" for part in range(1, 6)] + ["test_batch"]


def cifar10_data(count=12):
    rng = np.random.default_rng(0)
    return {
        batch: (
            rng.integers(0, 10, count).tolist(),
            rng.integers(0, 256, (count, 3072), dtype=np.uint8),
        )
        for batch in BATCHES
    }


def binary_archive(folder, data):
    folder.mkdir(exist_ok=True)
    files = {"cifar-10-batches-bin/batches.meta.txt": ("\n".join(NAMES) + "\n\n").encode()}
    for batch, (labels, pixels) in data.items():
        records = b"".join(
            bytes([label]) + row.tobytes() for label, row in zip(labels, pixels, strict=True)
        )
        files[f"cifar-10-batches-bin/{batch}.bin"] = records
    return write_tar(folder / "cifar-10-binary.tar.gz", files)


def python2_pickle(items):
    """Pickles a dict of strings, numbers and lists the way Python 2 did, byte strings and all."""

    def write(item):
        if isinstance(item, bytes) and len(item) < 256:
            return b"U" + bytes([len(item)]) + item + b"q\x07"
        if isinstance(item, bytes):
            return b"T" + struct.pack("<i", len(item)) + item
        if isinstance(item, int):
            return b"K" + bytes([item])
        step = 5 if isinstance(item[0], int) else 100
        parts = (item[start : start + step] for start in range(0, len(item), step))
        return b"]q\x09" + b"".join(b"(" + b"".join(map(write, part)) + b"e" for part in parts)

    body = b"".join(write(key) + write(value) for key, value in items.items())
    return b"\x80\x02}q\x01(" + body + b"u."


def python_archive(folder, data):
    folder.mkdir(exist_ok=True)
    # The batches in another order, as in the official archive.
    files = {}
    for batch, (labels, pixels) in reversed(data.items()):
        files[f"cifar-10-batches-py/{batch}"] = python2_pickle(
            {
                b"batch_label": b"training batch",
                b"labels": labels,
                b"data": pixels.tobytes(),
                b"filenames": [b"a.png", b"b.png"],
            }
        )
    meta = {
        b"num_cases_per_batch": 12,
        b"label_names": [name.encode() for name in NAMES],
        b"num_vis": 200,
    }
    files["cifar-10-batches-py/batches.meta"] = python2_pickle(meta)
    return write_tar(folder / "cifar-10-python.tar.gz", files)


def sums(*archives):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in archives}


def prepare_cifar10(archive, data_dir):
    """Prepares an archive as if it were the official one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builders, "CIFAR10_SHA256", sums(archive))
        return prepare.prepare_path(archive, data_dir=str(data_dir))


def test_the_fake_pickles_are_pickles():
    items = {b"labels": list(range(12)), b"data": bytes(3072), b"filenames": [b"a", b"b"]}
    loaded = pickle.loads(python2_pickle(items), encoding="bytes")
    # Memo opcodes aside, it is what Python reads.
    assert loaded == items


def test_both_cifar10_archives_give_the_same_records(tmp_path):
    from tensorflow_datasets.proto import tf_example_pb2

    data = cifar10_data()
    binary, python = binary_archive(tmp_path, data), python_archive(tmp_path, data)
    content = []
    for archive in (binary, python):
        data_dir = tmp_path / archive.name.split("-")[2]
        prepared = prepare_cifar10(archive, data_dir)
        assert prepared.folder == data_dir / "cifar10" / "3.0.2"
        assert prepared.splits == {"train": 60, "test": 12}
        assert prepared.class_names == tuple(NAMES)
        source = source_of(prepared, data_dir, size=32)
        content.append([source.records[index] for index in range(len(source))])
    assert content[0] == content[1]
    ids = [
        tf_example_pb2.Example.FromString(record).features.feature["id"] for record in content[0]
    ]
    assert {item.bytes_list.value[0] for item in ids} == {b"train_%05d" % i for i in range(60)}
    wanted = {
        (label, row.reshape(3, 32, 32).transpose(1, 2, 0).tobytes())
        for batch in BATCHES[:5]
        for label, row in zip(*data[batch], strict=True)
    }
    pixels, labels = source.read_all()
    assert {
        (label, image.tobytes()) for image, label in zip(pixels, labels.tolist(), strict=True)
    } == wanted


def test_a_pickle_is_never_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    data = cifar10_data(2)
    python = python_archive(tmp_path, data)
    evil = pickle.dumps({"labels": [1, 2], "data": bytes(2 * 3072), "x": Trap()}, protocol=2)
    with tarfile.open(python) as tar:
        files = {name: tar.extractfile(name).read() for name in tar.getnames()}
    files["cifar-10-batches-py/data_batch_1"] = evil
    write_tar(python, files)
    prepare_cifar10(python, tmp_path / "tfds")
    assert not (tmp_path / "executed").exists()


def test_a_wrong_checksum_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(b"not the official one")
    monkeypatch.setattr(builders, "read_cifar10", lambda path: pytest.fail("it was read"))
    found = hashlib.sha256(b"not the official one").hexdigest()
    with pytest.raises(InputError, match=f"{found}, expected 6d958be0"):
        prepare.prepare_path(archive, data_dir=str(tmp_path / "tfds"))
    assert not leftovers(tmp_path / "tfds")


def test_malformed_cifar10_archives_are_refused(tmp_path):
    data = cifar10_data(2)
    for change, message in (
        ({"cifar-10-batches-bin/test_batch.bin": b"12345"}, "no valid CIFAR-10"),
        ({"cifar-10-batches-bin/test_batch.bin": None}, r"no member 'test_batch\.bin'"),
    ):
        archive = binary_archive(tmp_path, data)
        with tarfile.open(archive) as tar:
            files = {name: tar.extractfile(name).read() for name in tar.getnames()} | change
        write_tar(archive, {name: item for name, item in files.items() if item is not None})
        with pytest.raises(InputError, match=message):
            prepare_cifar10(archive, tmp_path / "tfds")


def test_cifar10_keeps_its_name(tmp_path):
    archive = binary_archive(tmp_path, cifar10_data(2))
    with pytest.raises(InputError, match="leave the name out"):
        prepare.prepare_path(archive, name="other", data_dir=str(tmp_path / "tfds"))


# --- interruption, repetition, the program ------------------------------------------------------


def test_an_interruption_leaves_nothing_and_the_next_run_works(tmp_path, monkeypatch):
    path = write_folder(tmp_path / "pets", tree_files())
    data_dir = str(tmp_path / "tfds")
    normalize = decode.to_jpeg_or_png

    def interrupt(data, name):
        if name.startswith("test/"):  # Train is written by then.
            raise KeyboardInterrupt
        return normalize(data, name)

    monkeypatch.setattr(decode, "to_jpeg_or_png", interrupt)
    assert script.main([str(path), f"--data_dir={data_dir}"]) == 130
    assert not leftovers(data_dir)
    monkeypatch.setattr(decode, "to_jpeg_or_png", normalize)
    assert prepare.prepare_path(path, data_dir=data_dir).is_new


def test_a_killed_preparation_is_cleared_by_the_next(tmp_path):
    path = write_folder(tmp_path / "pets", tree_files())
    stale = tmp_path / "tfds" / "pets" / "incomplete.ABC123_1.0.0"
    write_folder(stale, {"pets-train.array_record-00000-of-00001": b"half"})
    other = tmp_path / "tfds" / "cats" / "incomplete.ABC123_1.0.0"
    other.mkdir(parents=True)
    prepare.prepare_path(path, data_dir=str(tmp_path / "tfds"))
    assert not stale.exists()
    assert other.exists()


def test_overwriting_keeps_the_old_set_until_the_new_is_complete(tmp_path):
    data_dir = str(tmp_path / "tfds")
    path = write_folder(tmp_path / "pets", tree_files())
    assert prepare.prepare_path(path, data_dir=data_dir).is_new
    write_folder(path, {"train/cat/new.png": encoded()})
    assert prepare.prepare_path(path, data_dir=data_dir).splits["train"] == 6
    (path / "train/cat/new.png").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"new\.png"):
        prepare.prepare_path(path, data_dir=data_dir, overwrite=True)
    assert prepare.prepare_path(path, data_dir=data_dir).splits["train"] == 6
    (path / "train/cat/new.png").write_bytes(encoded())
    again = prepare.prepare_path(path, data_dir=data_dir, overwrite=True)
    assert again.is_new
    assert again.splits["train"] == 7
    assert [entry.name for entry in sorted((tmp_path / "tfds/pets").iterdir())] == [
        ".lock",
        "1.0.0",
    ]


def test_the_old_set_survives_a_kill_while_it_is_replaced(tmp_path):
    data_dir = tmp_path / "tfds"
    path = write_folder(tmp_path / "pets", tree_files())
    folder = prepare.prepare_path(path, data_dir=str(data_dir)).folder
    replaced = folder.with_name("replaced.1.0.0")
    folder.rename(replaced)
    assert not prepare.prepare_path(path, data_dir=str(data_dir)).is_new
    folder.rename(replaced)
    config = default_config().data
    config.name, config.data_dir = "pets", str(data_dir)
    assert len(load_source(config, "train")) == 6


def test_of_two_that_prepare_the_same_set_the_second_takes_the_first_ones(tmp_path, monkeypatch):
    data_dir = str(tmp_path / "tfds")
    path = write_folder(tmp_path / "pets", tree_files())
    flock = fcntl.flock

    def after_another(*args):
        monkeypatch.setattr(fcntl, "flock", flock)
        assert prepare.prepare_path(path, data_dir=data_dir).is_new
        flock(*args)

    monkeypatch.setattr(fcntl, "flock", after_another)
    assert not prepare.prepare_path(path, data_dir=data_dir).is_new


def test_the_program_reports_and_repeats(tmp_path, capsys):
    main = script.main
    files = tree_files() | {"train/notes.txt": b"x"}
    path = write_tar(tmp_path / "pets.tar.gz", files)
    arguments = [str(path), f"--data_dir={tmp_path / 'tfds'}"]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    for part in (
        "train: 6 images",
        "test: 6 images",
        "2 classes: cat, dog",
        str(tmp_path / "tfds" / "pets" / "1.0.0"),
        "1 files ignored",
        "alexnet-jax train --config=cifar10 --config.data.name=pets --workdir=runs/pets",
    ):
        assert part in output
    assert main(arguments) == 0
    assert "was prepared already" in capsys.readouterr().out
    assert main([*arguments, "--overwrite"]) == 0
    assert "pets is ready in" in capsys.readouterr().out


def test_the_program_prints_errors_as_sentences(tmp_path, capsys):
    assert script.main([str(tmp_path / "none.zip"), f"--data_dir={tmp_path}"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: There is no file or folder")
    assert captured.out == ""


def test_an_unwritable_folder_is_an_error(tmp_path):
    path = write_folder(tmp_path / "pets", tree_files())
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot be written"):
        prepare.prepare_path(path, data_dir=str(tmp_path / "file"))


@pytest.fixture
def heeds_ctrl_c():
    """A shell has its background jobs ignore Ctrl-C, and so would all that they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_in_a_real_process(tmp_path):
    path = write_folder(tmp_path / "pets", tree_files(count=5000))
    data_dir = tmp_path / "tfds"
    process = subprocess.Popen(
        [sys.executable, "-m", "alexnet_jax.cli", "prepare", path, f"--data_dir={data_dir}"],
        env={"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 30
    while not list(data_dir.glob("pets/incomplete.*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert error.strip().splitlines() == ["Interrupted."]
    assert not leftovers(data_dir)
