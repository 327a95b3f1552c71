"""Trees of class folders, on disk or in an archive: what they contain and how it is labeled.

Archives are read member by member and never unpacked, so no member can write anywhere, and the
memory and time that they may take is bounded.
"""

import bz2
import contextlib
import functools
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
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from tqdm import tqdm

from alexnet_jax.data.decode import check_file_size
from alexnet_jax.errors import InputError

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm"}
    | {".tif", ".tiff", ".webp"}
)
# Folder names beside "train", and the split they hold.
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
    *(EOFError, OSError, RuntimeError, ValueError, struct.error),
)
_OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".tgz": gzip.open}
_OPENERS |= {".xz": lzma.open, ".txz": lzma.open, ".bz2": bz2.open, ".tbz2": bz2.open}
ARCHIVE_SUFFIXES = frozenset({".tar", ".zip", *_OPENERS})


class Entry(NamedTuple):
    """A folder or a file of a tree."""

    name: str  # its path below the root, with forward slashes
    # Returns the file's bytes, until the next entry is asked for. None for folders, devices, pipes,
    # and links, which may lead anywhere.
    read: Callable[[], bytes] | None = None
    size: int = 0
    is_folder: bool = False


class LabeledFiles(NamedTuple):
    """The images of a tree with their splits and classes."""

    path: Path  # the folder or archive
    class_names: tuple[str, ...]
    splits: Mapping[str, Mapping[str, str]]  # for each, the class by the image's path in the tree
    ignored: int  # files that are no images, no regular files, or outside the class folders


def label_files(path: Path, test_fraction: float) -> LabeledFiles:
    """Lists a tree and decides which image belongs to which split and class.

    The tree is `train/<class>/...` with `test/<class>/...` (`val`, `validation` and `valid` stand
    in for a missing `test`), or just `<class>/...`, which is then split class by class. Either may
    be below common top folders.
    """
    top, total, links = _Folder(PurePosixPath()), 0, 0
    for entry in tqdm(walk(path), f"Listing {path.name}", unit="file", disable=None):
        place = PurePosixPath(entry.name)
        folder = top.descend(place.parts if entry.is_folder else place.parts[:-1])
        total += not entry.is_folder
        links += entry.read is None and not entry.is_folder
        if entry.read and place.suffix.lower() in IMAGE_SUFFIXES:
            if entry.name in folder.images:
                raise InputError(f"{path} holds {entry.name} twice; pack the archive again.")
            folder.images.add(entry.name)
    copy = f" Links in it were not followed ({links:,}); copy what they name." if links else ""
    splits = {split: _labels(root, path, copy) for split, root in _split_roots(top).items()}
    class_names = tuple(sorted(set(splits["train"].values())))
    for split, labels in splits.items():
        for name in sorted(set(labels.values()) - set(class_names)):
            raise InputError(f"{path} has the class {name} in {split} but not in train.")
    if len(class_names) < 2:
        found = f"only the class folder {class_names[0]}" if class_names else "no class folder"
        raise InputError(f"{path} holds {found} with images; at least two are needed.{copy}")
    if len(splits) == 1:
        splits = _hold_out(splits["train"], test_fraction)
    if not splits["test"]:
        raise InputError(f"{path} has too few images to hold any out; raise --test_fraction.")
    return LabeledFiles(path, class_names, splits, total - sum(map(len, splits.values())))


def walk(path: Path) -> Iterator[Entry]:
    """Yields the entries of a folder, or a tar or zip archive, in an order that does not change.

    Hidden entries and what macOS adds to archives are left out. An archive that is damaged, or
    holds more than an honest one can, raises an InputError.
    """
    if path.is_dir():
        entries = _walk_folder(path)
    elif path.suffix.lower() == ".zip":
        entries = _walk_zip(path)
    elif path.suffix.lower() in ARCHIVE_SUFFIXES:
        entries = _walk_tar(path)
    else:
        known = ", ".join(sorted(ARCHIVE_SUFFIXES))
        raise InputError(f"{path} is neither a folder nor an archive ({known}).")
    with readable(path):
        for count, entry in enumerate(entries, start=1):
            if count > MAX_MEMBERS:
                raise InputError(f"{path} holds more than {MAX_MEMBERS:,} files; prepare a part.")
            _check_name(entry.name, path)
            place = PurePosixPath(entry.name.lstrip("/"))
            if any(part.startswith(".") or part == "__MACOSX" for part in place.parts):
                continue
            if entry.read and place.suffix.lower() in IMAGE_SUFFIXES:
                check_file_size(entry.name, entry.size)
            yield Entry(str(place), *entry[1:])


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns what a damaged archive or an unreadable file raises into an InputError."""
    try:
        yield
    except InputError:
        raise
    except _DAMAGE as error:
        raise InputError(f"{path} is damaged or cut short ({error}); get it again.") from error


def _walk_folder(path: Path) -> Iterator[Entry]:
    def fail(error: OSError) -> None:  # Or a class that cannot be read would be left out.
        raise error

    for folder, folders, files in os.walk(path, onerror=fail):
        folders.sort()
        place = Path(folder).relative_to(path)
        yield Entry(place.as_posix(), is_folder=True)
        links = [name for name in folders if Path(folder, name).is_symlink()]  # Not walked into.
        for name in sorted(files + links):
            file = Path(folder, name)
            status = file.lstat()
            read = file.read_bytes if stat.S_ISREG(status.st_mode) else None
            yield Entry((place / name).as_posix(), read, status.st_size)


def _walk_tar(path: Path) -> Iterator[Entry]:
    opener = _OPENERS.get(path.suffix.lower(), Path.open)
    with opener(path, "rb") as packed:
        file: Any = _Bounded(packed, path)
        with tarfile.open(fileobj=file, mode="r|", tarinfo=_StrictTarInfo) as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # Or a million headers would pile up in memory.
                name = member.name
                if member.issparse():  # Its holes take no room, and a TiB when read.
                    raise InputError(f"{path} holds a sparse file, {name}; pack it without these.")
                content = tar.extractfile(member) if member.isreg() else None
                read = content.read if content else None
                yield Entry(name, read, member.size, member.isdir())
        # The compressor's checksum is at the very end.
        while file.read(2**20):
            pass


def _walk_zip(path: Path) -> Iterator[Entry]:
    with zipfile.ZipFile(path) as archive:
        # Before anything is read: members may overlap, each unpacking the same bytes again.
        _check_unpacked(path, sum(member.file_size for member in archive.infolist()))

        def read(member: zipfile.ZipInfo) -> bytes:
            with archive.open(member) as file:
                # Without a size, all is unpacked before it is found to be more than was declared.
                return file.read(member.file_size)

        for member in archive.infolist():
            remedy = "unpack it and give the folder"
            if member.flag_bits & 1:
                raise InputError(f"{path} is encrypted; {remedy}.")
            # zipfile unpacks other methods as a whole, whatever size is declared.
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise InputError(f"{path} is packed by another method than deflate; {remedy}.")
            is_folder = member.is_dir()
            is_file = stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG) and not is_folder
            read_it = functools.partial(read, member) if is_file else None
            yield Entry(member.filename, read_it, member.file_size, is_folder)


class _Bounded:
    """A decompressed stream, as tarfile reads it, that raises InputError for a bomb."""

    def __init__(self, file: Any, path: Path) -> None:
        self._file, self._path, self._total = file, path, 0

    def read(self, size: int) -> bytes:
        chunk = self._file.read(size)
        self._total += len(chunk)
        _check_unpacked(self._path, self._total)
        return chunk


def _check_unpacked(path: Path, total: int) -> None:
    packed = path.stat().st_size
    if total > (limit := max(MAX_SMALL_BYTES, MAX_RATIO * packed)):
        raise InputError(
            f"{path} has {packed:,} bytes but unpacks to more than {limit:,}, as a decompression "
            "bomb does; if it is yours, unpack it and give the folder."
        )


class _StrictTarInfo(tarfile.TarInfo):
    """A header that makes damage an error, which tarfile itself takes for the archive's end."""

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


def _check_name(name: str, path: Path) -> None:
    """Rejects a name that cannot be stored as text, or is made to fill the memory."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InputError(f"{path} holds {name[:80]!r}, which is not UTF-8; rename it.") from None
    if len(name) > MAX_NAME_LENGTH or name.count("/") > MAX_DEPTH:
        raise InputError(
            f"{path} holds {name[:80]!r}..., whose path has {len(name):,} characters and "
            f"{name.count('/'):,} folders; at most {MAX_NAME_LENGTH:,} and {MAX_DEPTH} are allowed."
        )


@dataclass
class _Folder:
    path: PurePosixPath
    images: set[str] = field(default_factory=set)
    folders: "dict[str, _Folder]" = field(default_factory=dict)

    def descend(self, parts: Iterable[str]) -> "_Folder":
        folder = self
        for part in parts:
            if part not in folder.folders:
                folder.folders[part] = _Folder(folder.path / part)
            folder = folder.folders[part]
        return folder

    def all_images(self) -> list[str]:
        below = (name for folder in self.folders.values() for name in folder.all_images())
        return [*self.images, *below]

    def has_only_folders(self) -> bool:
        return bool(self.folders) and not self.images


def _split_roots(root: _Folder) -> dict[str, _Folder]:
    """Finds the folder of each split; all is train where there are no split folders."""
    while len(below := list(root.folders.values())) == 1 and below[0].has_only_folders():
        root = below[0]
    by_name = {name.lower(): folder for name, folder in sorted(root.folders.items())}
    # "train" may also be a class, next to "bus": then it has images of its own.
    if "train" not in by_name or not by_name["train"].has_only_folders():
        return {"train": root}
    roots = {"train": by_name["train"]}
    for name, split in _HELD_OUT.items():
        if name in by_name:
            roots.setdefault(split, by_name[name])
    if "test" not in roots and "validation" in roots:
        roots["test"] = roots.pop("validation")
    return roots


def _labels(root: _Folder, path: Path, advice: str) -> dict[str, str]:
    """Returns the class of each image of a split."""
    labels: dict[str, str] = {}
    for name, folder in sorted(root.folders.items()):
        images = folder.all_images()
        if not images:
            where = f"The class folder {folder.path} of {path}"
            raise InputError(f"{where} holds no image; fill or remove it.{advice}")
        # TFDS stores the names as stripped lines of a text file.
        if not name.isprintable() or name != name.strip():
            raise InputError(
                f"{path} has the class {name!r}; a class must be named by printable characters "
                "with no space at either end."
            )
        labels |= dict.fromkeys(images, name)
    return labels


def _hold_out(labels: Mapping[str, str], test_fraction: float) -> dict[str, dict[str, str]]:
    """Splits each class by a hash of the names, which no other image or class can change."""
    ranked = defaultdict(list)
    for name in sorted(labels, key=lambda name: hashlib.sha256(name.encode()).digest()):
        ranked[labels[name]].append(name)
    test: dict[str, str] = {}
    for label, names in ranked.items():
        count = min(round(len(names) * test_fraction), len(names) - 1)
        test |= dict.fromkeys(names[:count], label)
    return {"train": {n: label for n, label in labels.items() if n not in test}, "test": test}
