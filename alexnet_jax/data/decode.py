"""Encoded images in, RGB uint8 out: the one place where Pillow decodes, and what it may accept."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from alexnet_jax.errors import InputError

# No photograph of a training set is larger; a decompression bomb is.
MAX_PIXELS = 100_000_000
MAX_FILE_BYTES = 512 * 2**20
# Pillow would try every format it knows on a file, whatever it is called, and hands EPS to
# Ghostscript, which runs the program that an EPS file is.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

_ORIENTATION = 0x0112  # The EXIF tag; 1 means "as stored".


def to_rgb(image: Image.Image) -> Image.Image:
    """Turns an image of any mode into RGB.

    Transparent pixels are composed on white and 16-bit grey is scaled to 8 bits: Pillow alone
    would make the former black and clip the latter.

    Args:
        image: A Pillow image of any mode, with values of at most 16 bits.

    Returns:
        The same picture in mode "RGB"; the argument itself if it is so already.

    Raises:
        ValueError: The pixels are floats, or integers beyond 16 bits, which have no agreed range.
    """
    if image.mode == "F":
        raise ValueError("its pixels are 32-bit floats; save it with 8 or 16 bits a channel")
    if image.mode.startswith("I"):
        image = _grey_from_16_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def decode(data: bytes, size: int) -> np.ndarray:
    """Decodes one image to a square of the wanted size.

    Args:
        data: The encoded image.
        size: Side of the result. A larger or smaller image is scaled by its short side, then
            cropped to its centre.

    Returns:
        uint8[size, size, 3], RGB, upright according to its EXIF orientation.

    Raises:
        Exception: The image is too large or cannot be decoded; Pillow raises nearly every kind.
    """
    with _open(data) as image:
        return to_square(image, size)


def to_square(image: Image.Image, size: int) -> np.ndarray:
    """Brings an image into the form that networks take.

    Args:
        image: Of any mode and size.
        size: Side of the result. A larger or smaller image is scaled by its short side, then
            cropped to its centre.

    Returns:
        uint8[size, size, 3], RGB, upright according to its EXIF orientation.

    Raises:
        ValueError: As `to_rgb`.
    """
    rgb = to_rgb(_upright(image))
    if rgb.size != (size, size):
        rgb = ImageOps.fit(rgb, (size, size))
    return np.asarray(rgb)


def from_pixels(pixels: np.ndarray) -> Image.Image:
    """Makes a Pillow image of an array.

    Args:
        pixels: uint8 or uint16, [H, W] or [H, W, 1] (grey), [H, W, 3] (RGB) or [H, W, 4] (RGB and
            opacity). Of 16 bits the upper 8 are kept, rounded.

    Raises:
        ValueError: It is something else.
    """
    if pixels.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"its dtype is {pixels.dtype}; it must be uint8 or uint16")
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if (
        not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4)))
        or not pixels.size
    ):
        raise ValueError(
            f"its shape is {list(pixels.shape)}; it must be [H, W], [H, W, 1], [H, W, 3] or "
            "[H, W, 4], with at least one pixel"
        )
    return Image.fromarray(_to_8_bits(pixels) if pixels.dtype == np.uint16 else pixels)


def read_square(path: Path, size: int) -> np.ndarray:
    """Reads an image file of any origin as training would have read it from a prepared set.

    Args:
        path: The file; its content tells the format, not its name.
        size: As for `to_square`.

    Returns:
        uint8[size, size, 3], RGB, upright.

    Raises:
        InputError: It cannot be read or decoded, or is too large.
    """
    try:
        if not path.is_file():  # A device, say, might never end.
            raise InputError(f"The image {path} is not there, or is no file; name an image file.")
        length = path.stat().st_size
        if length > MAX_FILE_BYTES:
            raise InputError(
                f"The image {path} has {length} bytes, more than the {MAX_FILE_BYTES} allowed; "
                "scale it down, or remove it."
            )
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise InputError(
            f"The image {path} cannot be read ({getattr(error, 'strerror', None) or error}); "
            "name a file that can."
        ) from None
    with _refusing(str(path)):
        _verify(data)
        return decode(data, size)


def count_values(images: np.ndarray, chosen: np.ndarray | None = None) -> np.ndarray:
    """Counts how often each value occurs in each channel: int64[3, 256].

    Args:
        images: uint8[N, H, W, 3].
        chosen: int[M], which of them count; None: all.
    """
    chosen = np.arange(len(images)) if chosen is None else chosen
    counts = np.zeros(3 * 256, np.int64)
    for start in range(0, len(chosen), 256):  # Small enough for the processor's cache.
        block = images[chosen[start : start + 256]]
        counts += Image.fromarray(block.reshape(-1, block.shape[2], 3)).histogram()
    return counts.reshape(3, 256)


def encode_png(pixels: np.ndarray) -> bytes:
    """Encodes uint8[H, W] (grey) or uint8[H, W, 3] (RGB) without loss."""
    return _to_png(Image.fromarray(pixels))


def normalize_encoded(data: bytes, name: str) -> bytes:
    """Checks an image file by decoding it, and brings it into a form every reader understands.

    Args:
        data: The file's bytes.
        name: What to call the image in an error.

    Returns:
        `data` itself if it is an upright RGB or grey JPEG or PNG; otherwise an RGB PNG, upright
        according to its EXIF orientation, composed on white where it was transparent.

    Raises:
        InputError: The image is too large or cannot be decoded.
    """
    with _refusing(name):
        _verify(data)
        with _open(data) as image:
            image.load()
            if _is_plain(image):
                return data
            return _to_png(to_rgb(_upright(image)))


def _verify(data: bytes) -> None:
    with _open(data) as image:
        if image.format == "PNG":
            image.verify()  # Decoding skips the checksums of the pixels.


@contextlib.contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Turns what a bad image makes Pillow raise into an InputError with the image's name."""
    try:
        with warnings.catch_warnings():
            # Our own limit follows, with the image's name.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    except Image.DecompressionBombError as error:
        raise InputError(
            f"The image {name} has more than {MAX_PIXELS // 10**6} megapixels; "
            "scale it down, or remove it."
        ) from error
    except UnidentifiedImageError as error:  # Its own text names an object in memory.
        raise InputError(
            f"The image {name} is in none of the formats {', '.join(FORMATS)}; "
            "replace or remove it."
        ) from error
    except Exception as error:  # Pillow raises nearly every kind of exception on bad bytes.
        raise InputError(
            f"The image {name} cannot be decoded ({error}); replace or remove it."
        ) from error


def _open(data: bytes) -> Image.Image:
    """Reads the head of an image file, and refuses what must not be decoded."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError(f"it has more than {MAX_PIXELS // 10**6} megapixels")
    return image


def _grey_from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("its pixels have more than 16 bits; save it with 8 or 16 bits a channel")
    grey = _to_8_bits(values)
    if "transparency" in image.info:  # One value of grey, lost with the 16 bits.
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Damaged EXIF, on which Pillow raises as many kinds, says nothing.
        return 1


def _upright(image: Image.Image) -> Image.Image:
    return image if _orientation(image) == 1 else ImageOps.exif_transpose(image)


def _is_plain(image: Image.Image) -> bool:
    return (
        image.format in ("JPEG", "PNG")
        and image.mode in ("RGB", "L")
        and not image.has_transparency_data
        and _orientation(image) == 1
    )


def _to_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
