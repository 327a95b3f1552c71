"""Nothing that comes as data is run, leaves its folder, or fills the memory."""

import ast
import bz2
import contextlib
import gzip
import io
import lzma
import os
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import pytest
from PIL import Image

from alexnet_jax.data import decode
from alexnet_jax.data.prepare import trees
from alexnet_jax.errors import InputError

ROOT = Path(__file__).parents[1]

# --- nothing runs -------------------------------------------------------------------------------

# Modules that turn data into code; pickletools only lists what a pickle would do.
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve"}
FORBIDDEN_MODULES |= {"joblib", "code", "codeop"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
FORBIDDEN_CALLS |= {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "shutil.unpack_archive"}
# A config file is a program by design, named by the person who starts the run, or the project's.
ALLOWED = {
    (name, "runpy") for name in ("alexnet_jax/config", "configs/ablation", "scripts/ablation")
}


def violations(source, file):
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
            tops = {name.partition(".")[0] for name in names}
            found += sorted(tops & FORBIDDEN_MODULES)
            found += [top for top in tops & {"runpy"} if (file, top) not in ALLOWED]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {word.arg: word.value for word in node.keywords}
            if name in FORBIDDEN_CALLS or name.endswith((".extractall", ".extract")):
                found.append(name)
            if name == "torch.load" and ast.unparse(given.get("weights_only", node)) != "True":
                found.append(name)
            if "allow_pickle" in given and ast.unparse(given["allow_pickle"]) != "False":
                found.append(name)
            if "shell" in given and ast.unparse(given["shell"]) != "False":
                found.append(name)
    return found


SOURCES = [p for top in ("alexnet_jax", "scripts", "configs") for p in (ROOT / top).rglob("*.py")]


@pytest.mark.parametrize(
    "path",
    sorted(SOURCES),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_source_file_runs_data(path):
    assert violations(path.read_text(), path.relative_to(ROOT).with_suffix("").as_posix()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib.numpy_pickle",
        "eval(x)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "yaml.load(f)",
        "tar.extractall()",
        "subprocess.run(x, shell=True)",
        "import runpy",
    ],
)
def test_the_search_finds_what_it_looks_for(source):
    assert violations(source, "alexnet_jax/train")


def test_the_search_lets_pass_what_is_safe():
    safe = "torch.load(f, weights_only=True); np.load(f); import pickletools; model.eval()"
    assert violations(safe, "alexnet_jax/train") == []


# --- archives -----------------------------------------------------------------------------------


def picture():
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "PNG")
    return buffer.getvalue()


GOOD = [f"{split}/{name}/0.png" for split in ("train", "test") for name in ("cat", "dog")]
OUTSIDE = ["../out/a/0.png", "/abs/a/0.png", "train/../../out/0.png", "C:\\out\\0.png"]
OUTSIDE += ["\\\\host\\out\\0.png", "train/cat/../../../out/0.png", "..", "/", "train/CAT/0.png"]


def add(tar, name, content=b"", kind=tarfile.REGTYPE, link=""):
    member = tarfile.TarInfo(name)
    member.type, member.size, member.linkname = kind, len(content), link
    tar.addfile(member, io.BytesIO(content))


def everything_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def check_sentence(error, path):
    assert str(error).isprintable()
    assert str(path) in str(error)


@contextlib.contextmanager
def little_memory():
    """Fails if Python took 16 MiB or more at once, which is less than the bombs unpack to."""
    tracemalloc.start()
    try:
        yield
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 16 * 2**20, f"{most:,} bytes"


def refused(path, match):
    with little_memory(), pytest.raises(InputError, match=match) as caught:
        trees.label_files(path, 0.2)
    check_sentence(caught.value, path)


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("container", ["tar", "zip"])
def test_no_member_leaves_its_folder(tmp_path, container, name):
    path = tmp_path / f"data.{container}"
    if container == "tar":
        with tarfile.open(path, "w") as tar:
            for member in [*GOOD, name]:
                add(tar, member, picture())
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for member in [*GOOD, name]:
                archive.writestr(zipfile.ZipInfo(member), picture())
    before = everything_below(tmp_path)
    try:
        layout = trees.label_files(path, 0.2)
    except InputError as error:
        check_sentence(error, path)
    else:
        assert {*GOOD} <= set(layout.splits["train"]) | set(layout.splits["test"])
        for entry in trees.walk(path):
            assert entry.is_folder or entry.read() == picture()
    assert everything_below(tmp_path) == before, "it was only read"


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_hold_nothing(tmp_path, kind):
    path = tmp_path / "data.tar"
    with tarfile.open(path, "w") as tar:
        for member in GOOD:
            add(tar, member, picture())
        add(tar, "train/cat/1.png", kind=kind, link="/etc/passwd")
    files = {entry.name: entry.read for entry in trees.walk(path) if not entry.is_folder}
    assert files.pop("train/cat/1.png") is None
    assert list(files) == GOOD


def test_a_pipe_in_a_folder_is_not_waited_for(tmp_path):
    for name in GOOD:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture())
    os.mkfifo(tmp_path / "train/cat/1.png")
    (tmp_path / "train/cat/loop").symlink_to(tmp_path)
    assert sum(not e.is_folder and e.read is not None for e in trees.walk(tmp_path)) == len(GOOD)


class Zeros(io.RawIOBase):
    """A file of that many zeros, which takes no memory."""

    def __init__(self, size):
        self.left = size

    def read(self, size=-1):
        size = min(size if size >= 0 else 2**20, self.left)
        self.left -= size
        return bytes(size)


@pytest.fixture
def small_bounds(monkeypatch):
    """The same bounds, lower: so that a bomb is small enough for a test."""
    monkeypatch.setattr(trees, "MAX_SMALL_BYTES", 2**20)


OPENERS = {"tar.gz": gzip.open, "tar.xz": lzma.open, "tar.bz2": bz2.open}


@pytest.mark.parametrize("suffix", OPENERS)
@pytest.mark.parametrize("name", ["train/cat/0.png", "readme.txt"])
def test_a_compressed_bomb_is_refused(tmp_path, small_bounds, suffix, name):
    path = tmp_path / f"data.{suffix}"
    with OPENERS[suffix](path, "wb") as file, tarfile.open(fileobj=file, mode="w|") as tar:
        member = tarfile.TarInfo(name)
        member.size = 24 * 2**20
        tar.addfile(member, Zeros(member.size))
    assert path.stat().st_size < 2**18
    refused(path, "unpacks to more than")


def test_a_tail_of_zeros_is_refused(tmp_path, small_bounds):
    path = tmp_path / "data.tar.gz"
    with gzip.open(path, "wb") as file:
        with tarfile.open(fileobj=file, mode="w|") as tar:
            for name in GOOD:
                add(tar, name, picture())
        for _ in range(24):
            file.write(bytes(2**20))
    refused(path, "unpacks to more than")


@pytest.mark.parametrize("declared", [None, 10])
def test_a_zip_bomb_is_refused(tmp_path, small_bounds, declared):
    """Honest about its size, or not: then the checksum of the part that is read is wrong."""
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in GOOD:
            with archive.open(name, "w") as file:
                for _ in range(24):
                    file.write(bytes(2**20))
    if declared is not None:
        data = path.read_bytes()
        path.write_bytes(data.replace(struct.pack("<I", 24 * 2**20), struct.pack("<I", declared)))
        trees.label_files(path, 0.2)
        entries = trees.walk(path)  # It keeps the archive open.
        entry = next(entry for entry in entries if not entry.is_folder)
        with (
            little_memory(),
            pytest.raises(InputError, match="Bad CRC"),
            trees.readable(path),
        ):
            entry.read()
    else:
        refused(path, "unpacks to more than")


def test_overlapping_members_of_a_zip_are_counted_each(tmp_path, small_bounds):
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/0.png", bytes(2**19))
        first = archive.infolist()[0]
        for index in range(1, 20):  # All at the same place in the file.
            again = zipfile.ZipInfo(f"a/{index}.png")
            for field in ("compress_type", "CRC", "compress_size", "file_size", "header_offset"):
                setattr(again, field, getattr(first, field))
            archive.filelist.append(again)
    refused(path, "unpacks to more than")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_methods_that_cannot_be_bounded_are_refused(tmp_path, method):
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        for name in GOOD:
            archive.writestr(name, picture())
    refused(path, "another method than deflate")


def header(name, size, kind):
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g", b"X"])
def test_enormous_headers_are_refused(tmp_path, kind):
    path = tmp_path / "data.tar.gz"
    with gzip.open(path, "wb") as file:
        file.write(header("x", 2**40, kind) + bytes(2**21))
    refused(path, "a header of")


def test_sparse_members_are_refused(tmp_path):
    path = tmp_path / "data.tar"
    block = bytearray(header("train/cat/0.png", 0, b"S"))
    block[483:495] = b"00777777777\0"  # 8 GiB when read.
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    path.write_bytes(bytes(block) + bytes(10240))
    refused(path, "sparse file")


def test_negative_sizes_end(tmp_path):
    path = tmp_path / "data.tar"
    path.write_bytes(header("train/cat/0.png", -(2**30), b"0") + bytes(10240))
    refused(path, "damaged or cut short")


@pytest.mark.parametrize("name", ["a/" * 65 + "0.png", "a/" + "b" * 5000 + "/0.png"])
def test_absurd_names_are_refused(tmp_path, name):
    path = tmp_path / "data.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, name, picture())
    refused(path, "characters and")


def test_absurd_numbers_of_members_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(trees, "MAX_MEMBERS", 100)
    path = tmp_path / "data.tar"
    with tarfile.open(path, "w") as tar:
        for index in range(101):
            add(tar, f"train/cat/{index}.txt")
    refused(path, "more than 100 files")


@pytest.mark.parametrize("name", ["cat\ndog", "cat ", "\x1b[31mcat", "cat\udcff"])
def test_class_names_that_would_shift_the_labels_are_refused(tmp_path, name):
    path = tmp_path / "data.tar"
    with tarfile.open(path, "w") as tar:
        for index in range(5):
            add(tar, f"{name}/{index}.png", picture())
            add(tar, f"emu/{index}.png", picture())
    refused(path, "printable characters|not UTF-8")


# --- images -------------------------------------------------------------------------------------


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *extra):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + chunk(b"IEND", b"")


BOMBS = {
    "png of 100,000 x 100,000": png(100_000, 100_000, chunk(b"IDAT", zlib.compress(bytes(9)))),
    "png of 2**31 x 2**31": png(2**31 - 1, 2**31 - 1, chunk(b"IDAT", zlib.compress(bytes(9)))),
    "png with 24 MiB of text": png(
        4, 4, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(24 * 2**20))), chunk(b"IDAT", b"")
    ),
    "bmp of 100,000 x 100,000": b"BM"
    + struct.pack("<IHHI", 100, 0, 0, 54)
    + struct.pack("<IiiHHIIiiII", 40, 100_000, 100_000, 1, 24, 0, 0, 0, 0, 0, 0)
    + bytes(46),
    "ppm of 100,000 x 100,000": b"P6 100000 100000 255\n" + bytes(100),
    "gif of 65,535 x 65,535": b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + b";",
}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS)
def test_image_bombs_are_refused(data):
    with little_memory(), pytest.raises(InputError, match=r"tom\.png"):
        decode.to_jpeg_or_png(data, "tom.png")
    with pytest.raises(Exception, match=r"."):
        decode.decode(data, 16)
