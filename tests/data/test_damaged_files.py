"""Thousands of damaged images and data sets: each is a sentence, or read as what it is.

`pytest tests/data/test_damaged_files.py --hypothesis-profile=thousand` tries 1,000 of each kind.
"""

import functools
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from PIL import Image
from test_source import to_tfrecord

from alexnet_jax.data import decode
from alexnet_jax.data.prepare import prepare
from alexnet_jax.data.source import load_source
from alexnet_jax.errors import InputError

SIZE = (24, 20)  # Width and height.


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(values, color_type, extra=b""):
    """Writes a PNG of 16 bits a channel, which Pillow cannot: values is uint16[H, W, C]."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunks + chunk(b"IEND", b"")


def picture():
    """A gradient in each channel, so that any damage that shows is seen."""
    x, y = np.meshgrid(np.linspace(0, 1, SIZE[0]), np.linspace(0, 1, SIZE[1]))
    return Image.fromarray((np.stack([x, y, (x + y) / 2], -1) * 255).astype(np.uint8))


@functools.cache
def originals():
    rgb = picture()
    grey, wide = rgb.convert("L"), np.asarray(rgb, np.uint16) * 257
    rgba = rgb.copy()
    rgba.putalpha(grey)
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "jpeg": saved(rgb, "JPEG"),
        "progressive jpeg": saved(rgb, "JPEG", progressive=True),
        "grey jpeg": saved(grey, "JPEG"),
        "CMYK jpeg": saved(rgb.convert("CMYK"), "JPEG"),
        "EXIF jpeg": saved(rgb, "JPEG", exif=exif),
        "png": saved(rgb, "PNG"),
        "grey png": saved(grey, "PNG"),
        "1-bit png": saved(rgb.convert("1"), "PNG"),
        "palette png": saved(rgb.quantize(16), "PNG"),
        "transparent palette png": saved(rgb.quantize(16), "PNG", transparency=3),
        "alpha png": saved(rgba, "PNG"),
        "16-bit grey png": png(wide[..., :1], 0),
        "16-bit png": png(wide, 2),
        "16-bit alpha png": png(np.concatenate([wide, wide[..., :1]], -1), 6),
        "gif": saved(rgb, "GIF"),
        "animated gif": saved(rgb, "GIF", save_all=True, append_images=[rgba.convert("RGB"), grey]),
        "bmp": saved(rgb, "BMP"),
        "webp": saved(rgb, "WEBP"),
        "lossless webp": saved(rgba, "WEBP", lossless=True),
        "animated webp": saved(rgb, "WEBP", save_all=True, append_images=[grey.convert("RGB")]),
        "tiff": saved(rgb, "TIFF"),
        "packed tiff": saved(rgb, "TIFF", compression="tiff_lzw"),
        "16-bit tiff": saved(Image.fromarray(wide[..., 0]), "TIFF"),
        "CMYK tiff": saved(rgb.convert("CMYK"), "TIFF"),
        "ppm": saved(rgb, "PPM"),
        "16-bit pgm": saved(Image.fromarray(wide[..., 0]), "PPM"),
    }


ACTIONS = ("flip", "flip", "set", "cut", "put", "copy", "lose", "grow")


@st.composite
def damaged(draw, data):
    """Bytes flipped, cut, put in, copied over, lost, or the head of another file."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        if not data:
            break
        # Half of the damage to the head, where sizes and formats stand.
        most = draw(st.sampled_from([min(64, len(data)), len(data)])) - 1
        place, other = draw(st.integers(0, most)), draw(st.integers(0, len(data) - 1))
        length = draw(st.integers(1, 16))
        action = draw(st.sampled_from(ACTIONS))
        if action == "flip":
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif action == "set":
            data[place : place + length] = draw(st.sampled_from([b"\0", b"\xff"])) * length
        elif action == "cut":
            del data[place:]
        elif action == "put":
            data[place:place] = draw(st.binary(min_size=1, max_size=16))
        elif action == "copy":
            data[place : place + length] = data[other : other + length]
        elif action == "lose":
            del data[place : place + length]
        else:
            data += bytes(draw(st.sampled_from([1, 1000, 70_000])))
    return bytes(data)


@st.composite
def image_files(draw):
    name = draw(st.sampled_from(sorted(originals())))
    data = originals()[name]
    if draw(st.integers(0, 9)) == 0:
        head = draw(st.integers(1, 40))
        data = originals()[draw(st.sampled_from(sorted(originals())))][:head] + data[head:]
    return name, draw(damaged(data))


def pixels_of(encoded):
    with Image.open(io.BytesIO(encoded)) as image:
        assert image.format in ("JPEG", "PNG")
        assert image.mode in ("RGB", "L")
        return np.asarray(image)


def check_sentence(error, name):
    assert name in str(error)
    assert str(error).isprintable()


@given(image_files())
def test_a_damaged_image_is_refused_by_name_or_has_pixels(file):
    name, data = file
    whole = [pixels_of(decode.to_jpeg_or_png(originals()[name], "x"))]
    try:
        encoded = decode.to_jpeg_or_png(data, "cats/tom.jpg")
    except InputError as error:
        check_sentence(error, "cats/tom.jpg")
        return
    pixels = pixels_of(encoded)
    assert pixels.dtype == np.uint8
    assert 0 < pixels.size <= 3 * decode.MAX_PIXELS
    decoded = decode.decode(encoded, 16)
    assert (decoded.shape, decoded.dtype) == ((16, 16, 3), np.uint8)
    if "png" in name and data[:8] == originals()[name][:8] and b"IEND" in data:
        # All of a PNG is under checksums: what is accepted is what was written.
        assert np.array_equal(pixels, whole[0])


@pytest.mark.parametrize("name", sorted(originals()))
def test_every_kind_of_image_is_read_as_what_it_is(name):
    encoded = decode.to_jpeg_or_png(originals()[name], "x")
    pixels = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")).astype(int)
    expected = np.asarray(picture()).astype(int)
    grey = np.asarray(picture().convert("L")).astype(int)[..., None]
    if "EXIF" in name:
        expected = np.rot90(expected, 3)
    if "alpha" in name or name == "lossless webp":
        alpha = expected[..., :1] if "16-bit" in name else grey
        expected = (expected * alpha + 255 * (255 - alpha)) // 255
    if name in ("grey png", "grey jpeg"):
        expected = np.repeat(grey, 3, axis=-1)
    if name in ("16-bit grey png", "16-bit tiff", "16-bit pgm"):
        expected = np.repeat(expected[..., :1], 3, axis=-1)
    assert pixels.shape == expected.shape
    if "1-bit" in name:
        assert set(np.unique(pixels)) == {0, 255}
        return
    if "transparent" in name:  # One colour of the palette has become white.
        assert (pixels == 255).all(axis=-1).any()
        expected = np.where((pixels == 255).all(axis=-1, keepdims=True), 255, expected)
    palette = "palette" in name or "gif" in name
    lossy = 24 if "jpeg" in name or name in ("webp", "animated webp") else 1
    assert np.abs(pixels - expected).max() <= (60 if palette else lossy)
    decoded = decode.decode(originals()[name], 16).astype(int)
    assert np.abs(decoded - decode.decode(encoded, 16)).max() <= 1, "reading and preparing agree"


@pytest.mark.parametrize("data", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_a_format_that_is_a_program_is_not_opened(data):
    """Pillow gives EPS to Ghostscript, whatever the file is called."""
    with pytest.raises(InputError, match=r"tom\.png is in none of the formats BMP, GIF"):
        decode.to_jpeg_or_png(data, "tom.png")


def test_one_transparent_grey_of_16_bits():
    values = np.array([[[0], [40_000], [65_535]]], np.uint16)
    encoded = decode.to_jpeg_or_png(png(values, 0, chunk(b"tRNS", b"\x9c\x40")), "x")
    assert pixels_of(encoded)[0, :, 0].tolist() == [0, 255, 255]


def test_integers_beyond_16_bits_are_refused():
    data = saved(Image.fromarray(np.array([[0, 70_000]], np.int32)), "TIFF")
    with pytest.raises(InputError, match="more than 16 bits"):
        decode.to_jpeg_or_png(data, "x")


# --- prepared data ------------------------------------------------------------------------------


def digits_config(root):
    return ConfigDict({"name": "digits", "data_dir": str(root), "image_size": 8})


def read_test_set(root):
    source = load_source(digits_config(root), "test")
    return source.class_names, *source.read_all()


@pytest.fixture(scope="module", params=["array_record", "tfrecord"])
def prepared(request, tmp_path_factory):
    """The root of a prepared data set, its files, and what is in it."""
    root = tmp_path_factory.mktemp("prepared")
    prepare.prepare_digits(str(root))
    truth = read_test_set(root)
    folder = root / "digits" / "1.0.0"
    if request.param == "tfrecord":
        to_tfrecord(folder)
    return root, folder, {file.name: file.read_bytes() for file in folder.iterdir()}, truth


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_damaged_prepared_data_is_refused_or_read_as_it_was(prepared, data):
    root, folder, files, (names, pixels, labels) = prepared
    chosen = sorted(name for name in files if "train" not in name)
    name = data.draw(st.sampled_from(chosen))
    for file in folder.iterdir():
        file.unlink()
    for other, content in files.items():
        (folder / other).write_bytes(content)
    (folder / name).write_bytes(data.draw(damaged(files[name])))
    try:
        found_names, found_pixels, found_labels = read_test_set(root)
    except InputError as error:
        check_sentence(error, "digits")
        return
    assert np.array_equal(found_pixels, pixels)
    assert np.array_equal(found_labels, labels)
    # A name that is another word is the one thing that no checksum of TFDS's covers.
    assert len(found_names) == len(names)
    assert found_names == names or name == "label.labels.txt"
