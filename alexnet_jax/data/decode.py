"""Encoded images in, uint8 RGB out: the one module that decodes, and what it accepts."""

import contextlib
import errno
import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from alexnet_jax.errors import InputError

MAX_PIXELS = 100_000_000  # No photograph of a training set is larger; a decompression bomb is.
MAX_FILE_BYTES = 512 * 2**20
# Pillow would try every format it knows, whatever the file is called, and hands EPS to
# Ghostscript, which runs the program that an EPS file is.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


def decode(data: bytes, size: int) -> np.ndarray:
    """Decodes an image file as `resize_and_crop` does; bad bytes raise nearly any exception."""
    with _open(data) as image:
        return resize_and_crop(image, size)


def resize_and_crop(image: Image.Image, size: int) -> np.ndarray:
    """Resizes the short side of an image of any mode, and crops the center: uint8[size, size, 3].

    It is RGB, and upright according to its EXIF orientation.
    """
    rgb = to_rgb(_upright(image))
    return np.asarray(rgb if rgb.size == (size, size) else ImageOps.fit(rgb, (size, size)))


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to RGB.

    Transparent pixels are composited on white and 16-bit gray is scaled to 8 bits; Pillow alone
    makes the former black and clips the latter. Floats, and integers of more than 16 bits, have no
    agreed range and raise a ValueError.
    """
    if image.mode == "F":
        raise ValueError("its pixels are 32-bit floats; save it with 8 or 16 bits a channel")
    if image.mode.startswith("I"):
        image = _gray_from_16_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def image_from_array(pixels: np.ndarray) -> Image.Image:
    """Converts an array to a Pillow image; 16-bit values are rounded to 8 bits.

    It is uint8 or uint16, [H, W] or [H, W, 1] (gray), [H, W, 3] (RGB) or [H, W, 4] (RGBA); any
    other raises a ValueError.
    """
    if pixels.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"its dtype is {pixels.dtype}; it must be uint8 or uint16")
    if pixels.ndim < 2 or pixels.shape[2:] not in ((), (1,), (3,), (4,)) or not pixels.size:
        raise ValueError(
            f"its shape is {list(pixels.shape)}; it must be [H, W], [H, W, 1], [H, W, 3] or "
            "[H, W, 4], with at least one pixel"
        )
    if pixels.shape[2:] == (1,):
        pixels = pixels[:, :, 0]
    return Image.fromarray(_to_8_bits(pixels) if pixels.dtype == np.uint16 else pixels)


def read_image(path: Path, size: int) -> np.ndarray:
    """Reads an image file in any of `FORMATS` exactly as training reads it from a prepared set."""
    try:
        if not path.is_file():  # A device, say, might never end.
            raise FileNotFoundError(errno.ENOENT, "no such file")
        check_file_size(str(path), path.stat().st_size)
        data = path.read_bytes()
    except OSError as error:
        why = error.strerror
        raise InputError(f"The image {path} cannot be read ({why}); name another file.") from None
    with _checked(data, str(path)):
        return decode(data, size)


def check_file_size(name: str, size: int) -> None:
    """Raises an InputError if an image file has more than `MAX_FILE_BYTES`."""
    if size > MAX_FILE_BYTES:
        raise InputError(
            f"The image {name} has {size} bytes, more than the {MAX_FILE_BYTES} allowed; "
            "scale it down, or remove it."
        )


def count_values(images: np.ndarray, chosen: np.ndarray | None = None) -> np.ndarray:
    """Counts how often each value occurs in each channel of images, or of the chosen ones.

    From uint8[N, H, W, 3] and indices int[M] to int64[3, 256].
    """
    chosen = np.arange(len(images)) if chosen is None else chosen
    counts = np.zeros(3 * 256, np.int64)
    for start in range(0, len(chosen), 256):  # Small enough for the processor's cache.
        block = images[chosen[start : start + 256]]
        counts += Image.fromarray(block.reshape(-1, block.shape[2], 3)).histogram()
    return counts.reshape(3, 256)


def encode_png(image: Image.Image | np.ndarray) -> bytes:
    """Encodes an image, or uint8[H, W] (gray) or uint8[H, W, 3] (RGB), without loss."""
    buffer = io.BytesIO()
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def to_jpeg_or_png(data: bytes, name: str) -> bytes:
    """Checks an image file by decoding it, and re-encodes it where other readers might fail.

    Returns `data` itself if it is an upright RGB or gray JPEG or PNG; otherwise an upright RGB PNG,
    composited on white where it was transparent. Errors call it by its `name`.
    """
    with _checked(data, name), _open(data) as image:
        image.load()
        upright = _upright(image)
        is_plain = image.format in ("JPEG", "PNG") and image.mode in ("RGB", "L")
        if is_plain and upright is image and not image.has_transparency_data:
            return data
        return encode_png(to_rgb(upright))


@contextlib.contextmanager
def _checked(data: bytes, name: str) -> Iterator[None]:
    """Verifies checksums; turns what Pillow raises, then or later, into InputErrors with a name."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `_open` has a limit.
            with _open(data) as image:
                if image.format == "PNG":
                    image.verify()  # Decoding skips the checksums of the pixels.
            yield
    except Exception as error:  # Pillow raises nearly every kind of exception on bad bytes.
        if isinstance(error, Image.DecompressionBombError):
            problem = f"has more than {MAX_PIXELS // 10**6} megapixels; scale it down, or remove it"
        elif isinstance(error, UnidentifiedImageError):  # Its own text names an object in memory.
            problem = f"is in none of the formats {', '.join(FORMATS)}; replace or remove it"
        else:
            problem = f"cannot be decoded ({error}); replace or remove it"
        raise InputError(f"The image {name} {problem}.") from error


def _open(data: bytes) -> Image.Image:
    """Reads the header of an image file, and rejects what must not be decoded."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError(f"it has more than {MAX_PIXELS // 10**6} megapixels")
    return image


def _gray_from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("its pixels have more than 16 bits; save it with 8 or 16 bits a channel")
    gray = _to_8_bits(values)
    if "transparency" in image.info:  # One value of gray, lost with the 16 bits.
        gray[values == image.info["transparency"]] = 255
    return Image.fromarray(gray)


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation; returns `image` itself where it is upright."""
    try:
        upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    except Exception:  # Damaged EXIF, on which Pillow raises as many kinds, says nothing.
        upright = True
    return image if upright else ImageOps.exif_transpose(image)
