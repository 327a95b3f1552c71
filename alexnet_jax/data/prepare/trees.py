"""Trees of class folders, on disk or inside an archive: what lies in them and which image is what.

Archives are read member by member and never unpacked, so no member can write anywhere, and what
they may make of memory and time is bounded.
"""

import bz2
import contextlib
import dataclasses
import gzip
import hashlib
import lzma
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from alexnet_jax.data.decode import MAX_FILE_BYTES
from alexnet_jax.errors import InputError

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm"}
    | {".tif", ".tiff", ".webp"}
)
# Folder names that hold a split, and the split they hold.
_TRAIN = "train"
_HELD_OUT = {"test": "test", "val": "validation", "validation": "validation", "valid": "validation"}
# Images hardly compress, so an archive that unpacks to more than this was made to do harm.
MAX_RATIO = 200
MAX_SMALL_BYTES = 2**30  # Whatever the ratio.
MAX_MEMBERS = 5_000_000  # ImageNet has 1.4 million images.
MAX_NAME_LENGTH = 4096  # Linux's own limit of a path.
MAX_DEPTH = 64
MAX_HEADER_BYTES = 2**20  # Of the names and attributes of one member.
# Members that hold the name or the attributes of the next, and are read into memory.
_EXTENDED_HEADERS = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)
# All that the standard library raises on bad bytes.
_DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, zipfile.LargeZipFile, lzma.LZMAError, zlib.error),
    *(EOFError, OSError, NotImplementedError, RuntimeError, ValueError, struct.error),
)
_OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".tgz": gzip.open}
_OPENERS |= {".xz": lzma.open, ".txz": lzma.open, ".bz2": bz2.open, ".tbz2": bz2.open}
ARCHIVE_SUFFIXES = frozenset({".tar", ".zip", *_OPENERS})


@dataclasses.dataclass(frozen=True)
class Entry:
    """A folder or a file of a tree.

    Attributes:
        name: Its path below the root, with forward slashes.
        is_folder: Whether it is a folder.
        read: Returns the file's bytes; valid only until the walk goes on. None of what is no
            regular file: links, which may lead anywhere, devices and pipes.
    """

    name: str
    is_folder: bool
    read: Callable[[], bytes] | None


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which image of a tree belongs to which split and class.

    Attributes:
        path: The folder or archive.
        class_names: Sorted.
        splits: For each split, the class of every image by the image's path in the tree.
        ignored: How many files are no images, no regular files, or outside the class folders.
    """

    path: Path
    class_names: tuple[str, ...]
    splits: Mapping[str, Mapping[str, str]]
    ignored: int


def find_layout(path: Path, test_fraction: float, *, progress: bool = False) -> Layout:
    """Lists a tree and decides which image belongs to which split and class.

    The tree is `train/<class>/...` with `test/<class>/...` (`val`, `validation` and `valid` stand
    in for `test` where there is none), or just `<class>/...`, which is then split class by class.
    Either may lie below common top folders.

    Args:
        path: A folder, or a tar or zip archive.
        test_fraction: Share of each class that a tree without splits gives to test.
        progress: Whether to show a bar on a terminal.

    Raises:
        InputError: The archive cannot be read, there are fewer than two classes, or a class is
            empty, is in test alone, or has a name that cannot be kept.
    """
    folders: set[PurePosixPath] = set()
    files: dict[PurePosixPath, str] = {}
    ignored = links = 0
    hidden = None if progress else True
    for entry in tqdm(walk(path), f"Listing {path.name}", unit="file", disable=hidden):
        place = PurePosixPath(entry.name)
        folders.update(place.parents)
        if entry.is_folder:
            folders.add(place)
        elif entry.read is None:
            links += 1
        elif place.suffix.lower() not in IMAGE_SUFFIXES:
            ignored += 1
        elif place in files:
            raise InputError(f"{path} holds {entry.name} twice; pack the archive anew.")
        else:
            files[place] = entry.name

    roots = _split_roots(_below_common_top(folders, files), folders, files)
    copy = f" Links in it were not followed ({links:,}); copy what they name." if links else ""
    splits = {
        split: _classes_below(root, folders, files, path, copy) for split, root in roots.items()
    }
    class_names = tuple(sorted(splits[_TRAIN]))
    for split, classes in splits.items():
        for name in sorted(set(classes) - set(class_names)):
            raise InputError(f"{path} has the class {name} in {split} but not in train.")
    for name in class_names:
        # TFDS keeps the names as stripped lines of a text file.
        if not name.isprintable() or name != name.strip():
            raise InputError(
                f"{path} has the class {name!r}; a class must be named by printable characters "
                "with no space at either end."
            )
    if len(class_names) < 2:
        found = f"only the class folder {class_names[0]}" if class_names else "no class folder"
        raise InputError(f"{path} holds {found} with images; at least two are needed.{copy}")
    if len(splits) == 1:
        splits = _hold_out(splits[_TRAIN], test_fraction)
    labels = {
        split: {name: label for label, names in classes.items() for name in names}
        for split, classes in splits.items()
    }
    if not labels["test"]:
        raise InputError(
            f"{path} has too few images for a test split of {test_fraction}; raise --test_fraction."
        )
    ignored += links + len(files) - sum(map(len, labels.values()))
    return Layout(path, class_names, labels, ignored)


def walk(path: Path) -> Iterator[Entry]:
    """Yields the folders and files of a tree, in an order that does not change.

    Hidden entries and what macOS adds to archives are left out.

    Args:
        path: A folder, or a tar or zip archive.

    Raises:
        InputError: The path is neither, the archive is damaged, a file cannot be an image for its
            size, or there is more in the archive than it could honestly hold.
    """
    if path.is_dir():
        entries = _walk_folder(path)
    elif path.suffix.lower() == ".zip":
        entries = _walk_zip(path)
    elif path.suffix.lower() in ARCHIVE_SUFFIXES:
        entries = _walk_tar(path)
    else:
        raise InputError(
            f"{path} is neither a folder nor an archive ({', '.join(sorted(ARCHIVE_SUFFIXES))})."
        )
    with readable(path):
        for count, entry in enumerate(entries, start=1):
            if count > MAX_MEMBERS:
                raise InputError(
                    f"{path} holds more than {MAX_MEMBERS:,} files and folders; prepare a part."
                )
            _check_name(entry.name, path)
            parts = PurePosixPath(entry.name).parts
            if not any(part.startswith(".") or part == "__MACOSX" for part in parts):
                yield entry


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns what a damaged archive or an unreadable file raises into an InputError."""
    try:
        yield
    except InputError:
        raise
    except _DAMAGE as error:
        raise InputError(
            f"{path} cannot be read to its end ({error}); it is damaged or cut short, get it again."
        ) from error


class _Bounded:
    """A decompressed stream that ends in an InputError where only a bomb would go on."""

    def __init__(self, file: Any, path: Path) -> None:
        self._file = file
        self._path = path
        self._left = _most_bytes(path)

    def read(self, size: int) -> bytes:
        chunk = self._file.read(size)
        self._left -= len(chunk)
        if self._left < 0:
            raise _bomb(self._path)
        return chunk


def _most_bytes(path: Path) -> int:
    return max(MAX_SMALL_BYTES, MAX_RATIO * path.stat().st_size)


def _bomb(path: Path) -> InputError:
    return InputError(
        f"{path} has {path.stat().st_size:,} bytes but unpacks to more than {_most_bytes(path):,}, "
        "as a decompression bomb does; if it is yours, unpack it and give the folder."
    )


class _StrictTarInfo(tarfile.TarInfo):
    """A header that makes damage an error: tarfile by itself takes it for the archive's end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_StrictTarInfo":
        header = super().frombuf(buf, encoding, errors)
        if header.type in _EXTENDED_HEADERS and header.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {header.size:,} bytes")
        return header

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_StrictTarInfo":
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":  # The proper end.
                raise
            raise tarfile.ReadError(f"bad member header: {error}") from error


def _walk_folder(path: Path) -> Iterator[Entry]:
    def refuse(error: OSError) -> None:  # else a class that cannot be read would be left out
        raise error

    for folder, folders, files in os.walk(path, onerror=refuse):
        folders.sort()
        place = Path(folder).relative_to(path)
        yield Entry(place.as_posix(), True, bytes)
        linked = [name for name in folders if Path(folder, name).is_symlink()]  # not walked into
        for name in sorted(files + linked):
            file = Path(folder, name)
            status = file.lstat()
            inside = (place / name).as_posix()
            if stat.S_ISREG(status.st_mode):
                yield _file_entry(inside, status.st_size, file.read_bytes)
            else:
                yield Entry(inside, False, None)


def _walk_tar(path: Path) -> Iterator[Entry]:
    opener = _OPENERS.get(path.suffix.lower(), Path.open)
    with opener(path, "rb") as packed:
        file: Any = _Bounded(packed, path)  # Of a stream, tarfile uses nothing but read().
        with tarfile.open(fileobj=file, mode="r|", tarinfo=_StrictTarInfo) as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # Or a million headers would pile up in memory.
                if member.isdir():
                    yield Entry(_inside(member.name), True, bytes)
                elif member.issparse():  # Its holes take no room, and a TiB when read.
                    raise InputError(
                        f"{path} holds a sparse file, {member.name}; pack it without --sparse."
                    )
                elif member.isreg():
                    content = tar.extractfile(member)
                    assert content is not None  # It is a regular file.
                    yield _file_entry(_inside(member.name), member.size, content.read)
                else:
                    yield Entry(_inside(member.name), False, None)
        # The compressor's checksum stands at the very end.
        while file.read(2**20):
            pass


def _walk_zip(path: Path) -> Iterator[Entry]:
    with zipfile.ZipFile(path) as archive:
        # Before anything is read: members may overlap, each unpacking the same bytes again.
        if sum(member.file_size for member in archive.infolist()) > _most_bytes(path):
            raise _bomb(path)
        for member in archive.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16)
            if member.is_dir():
                yield Entry(_inside(member.filename), True, bytes)
            elif member.flag_bits & 1:
                raise InputError(f"{path} is encrypted; unpack it and give the folder.")
            elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                # zipfile unpacks the others as a whole, whatever size is declared.
                raise InputError(
                    f"{path} is packed by another method than deflate; pack it anew, or unpack it "
                    "and give the folder."
                )
            elif kind in (0, stat.S_IFREG):
                read = _zip_reader(archive, member)
                yield _file_entry(_inside(member.filename), member.file_size, read)
            else:
                yield Entry(_inside(member.filename), False, None)


def _zip_reader(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Callable[[], bytes]:
    def read() -> bytes:
        with archive.open(member) as file:
            # Without a size, all is unpacked before it is found to be more than was declared.
            return file.read(member.file_size)

    return read


def _file_entry(name: str, size: int, read: Callable[[], bytes]) -> Entry:
    if size > MAX_FILE_BYTES and PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES:
        raise InputError(
            f"The image {name} has {size} bytes, more than the {MAX_FILE_BYTES} allowed; "
            "scale it down, or remove it."
        )
    return Entry(name, False, read)


def _inside(name: str) -> str:
    """Writes a member's name as a path below the archive's root."""
    return PurePosixPath(name.lstrip("/")).as_posix()


def _check_name(name: str, path: Path) -> None:
    """Refuses a name that cannot be kept as text, or is made to fill the memory."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{path} holds the name {name[:80]!r}, which is no UTF-8; rename it."
        ) from None
    if len(name) > MAX_NAME_LENGTH or name.count("/") > MAX_DEPTH:
        raise InputError(
            f"{path} holds {name[:80]!r}..., whose path has {len(name):,} characters and "
            f"{name.count('/'):,} folders; at most {MAX_NAME_LENGTH:,} and {MAX_DEPTH} are allowed."
        )


def _below_common_top(folders: set[PurePosixPath], files: Iterable[PurePosixPath]) -> PurePosixPath:
    """Descends while there is one folder, no class (it holds folders, not images), and no other."""
    root = PurePosixPath()
    while True:
        children = _children(root, folders)
        if len(children) != 1 or _holds_images(children[0], files):
            return root
        if not _children(children[0], folders):
            return root
        root = children[0]


def _split_roots(
    root: PurePosixPath, folders: set[PurePosixPath], files: Iterable[PurePosixPath]
) -> dict[str, PurePosixPath]:
    """Finds the folder of each split; `root` itself is train where there are no split folders."""
    children = {child.name.lower(): child for child in _children(root, folders)}
    train = children.get(_TRAIN)
    # "train" may also be a class, next to "bus": then its images lie right in it.
    if train is None or _holds_images(train, files) or not _children(train, folders):
        return {_TRAIN: root}
    roots = {_TRAIN: train}
    for name, split in _HELD_OUT.items():
        if name in children and split not in roots:
            roots[split] = children[name]
    if "test" not in roots and "validation" in roots:
        roots["test"] = roots.pop("validation")
    return roots


def _children(root: PurePosixPath, folders: Iterable[PurePosixPath]) -> list[PurePosixPath]:
    return sorted(folder for folder in folders if folder != root and folder.parent == root)


def _holds_images(folder: PurePosixPath, files: Iterable[PurePosixPath]) -> bool:
    return any(file.parent == folder for file in files)


def _classes_below(
    root: PurePosixPath,
    folders: set[PurePosixPath],
    files: Mapping[PurePosixPath, str],
    path: Path,
    advice: str,
) -> dict[str, list[str]]:
    """Lists the images of each class folder of one split."""
    depth = len(root.parts)
    classes: dict[str, list[str]] = defaultdict(list)
    for file, name in files.items():
        if len(file.parts) > depth + 1 and file.parts[:depth] == root.parts:
            classes[file.parts[depth]].append(name)
    for folder in _children(root, folders):
        if folder.name not in classes:
            raise InputError(
                f"The class folder {folder} of {path} holds no image; fill or remove it.{advice}"
            )
    return classes


def _hold_out(
    classes: Mapping[str, list[str]], test_fraction: float
) -> dict[str, dict[str, list[str]]]:
    """Splits each class by a hash of the names, which no other image or class can change."""
    train, test = {}, {}
    for label, names in classes.items():
        ranked = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
        count = min(round(len(ranked) * test_fraction), len(ranked) - 1)
        train[label], test[label] = ranked[count:], ranked[:count]
    return {_TRAIN: train, "test": test}
