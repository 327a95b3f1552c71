"""Conversion of TFRecord, which is read front to back, to ArrayRecord, which is read at random.

Both hold the same serialized examples, so copying them needs no TensorFlow.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

import google_crc32c
from tqdm import tqdm


def copy_records(source: Path, target: Path, expected: int, bar: tqdm) -> None:
    """Copies `expected` records to an ArrayRecord file, which appears only when it is complete.

    Raises OSError, ValueError or RuntimeError for a damaged source and a failed write.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    unfinished = target.with_name(f"unfinished.{target.name}")
    try:
        writer = ArrayRecordWriter(str(unfinished), "group_size:1")
        count = 0
        for record in _tfrecords(source):
            writer.write(record)
            count += 1
            bar.update()
        writer.close()
        if count != expected:
            raise ValueError(f"it has {count} records, not {expected}")
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def _tfrecords(path: Path) -> Iterator[bytes]:
    """Yields the records of a TFRecord file: length, its checksum, data, their checksum."""
    with path.open("rb") as file:
        while header := file.read(12):
            _check(header[:8], header[8:])  # Or a wrong length would be read into memory.
            record = file.read(*struct.unpack("<Q", header[:8]))
            _check(record, file.read(4))
            yield record


def _check(data: bytes, stored: bytes) -> None:
    """Compares with the stored CRC-32C, which TFRecord masks as it may itself be summed again."""
    crc = google_crc32c.value(data)
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    if stored != masked.to_bytes(4, "little"):
        raise ValueError("it is cut short" if len(stored) < 4 else "a checksum is wrong")
