"""Decode untrusted bytes to an RGB array, or raise one typed error.

Whatever the bytes contain, `decode` returns the image as a viewer would show it, raises
`ImageError`, or runs out of memory; Pillow's exceptions and warnings stay inside this module. C
decoders may still crash or hang, so run them in a child process. Pillow's limits are module
globals set during a call: only one thread of a process may decode at a time.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from pipeline.checks import check_at_least
from pipeline.text import one_line

# empty: no bytes. truncated: the image ends early. not_an_image: no known format.
# too_large: over the pixel limit. unsupported: a known format or variant that is not read.
# corrupt: any other violation of the format.
ImageErrorKind = Literal[
    "empty", "truncated", "not_an_image", "too_large", "unsupported", "corrupt"
]
IMAGE_ERROR_KINDS: tuple[ImageErrorKind, ...] = get_args(ImageErrorKind)

Pixels = npt.NDArray[np.uint8]

# Formats that Pillow decodes by itself: not EPS (starts Ghostscript), PDF, WMF, nor BUFR, GRIB,
# HDF5 (stubs). Tried in this order; TGA has no signature, so it is last.
FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF", "JPEG2000", "BMP", "DIB", "PPM", "ICO", "CUR"),
    *("ICNS", "PSD", "DDS", "QOI", "SGI", "SUN", "PCX", "DCX", "FLI", "TGA"),
)

# (name, offset, bytes) to tell corrupt files (a name of FORMATS) and unsupported formats (all
# others) from files that are not images. The bare ftyp comes after the more specific ones.
_SIGNATURES = (
    *(("JPEG", 0, b"\xff\xd8\xff"), ("PNG", 0, b"\x89PNG"), ("GIF", 0, b"GIF8")),
    *(("WEBP", 8, b"WEBP"), ("TIFF", 0, b"II*\0"), ("TIFF", 0, b"MM\0*"), ("AVIF", 4, b"ftypavi")),
    *(("JPEG2000", 0, b"\xff\x4f\xff\x51"), ("JPEG2000", 0, b"\0\0\0\x0cjP  ")),
    *(("BMP", 0, b"BM"), ("PSD", 0, b"8BPS"), ("DDS", 0, b"DDS "), ("QOI", 0, b"qoif")),
    *(("EPS", 0, b"%!PS"), ("EPS", 0, b"\xc5\xd0\xd3\xc6"), ("PDF", 0, b"%PDF")),
    *(("WMF", 0, b"\xd7\xcd\xc6\x9a"), ("HDF5", 0, b"\x89HDF"), ("GRIB", 0, b"GRIB")),
    *(("BUFR", 0, b"BUFR"), ("SVG", 0, b"<svg"), ("JPEG XL", 0, b"\xff\x0a")),
    *(("JPEG XL", 0, b"\0\0\0\x0cJXL "), ("HEIC", 4, b"ftyphei"), ("HEIF", 4, b"ftypmif")),
    ("video", 4, b"ftyp"),
)

# phrases in the messages of Pillow's plugins, in lower case
_TRUNCATED = ("truncated", "buffer is not large enough", "not enough", "unexpected end")
_UNSUPPORTED = ("unsupported", "not supported", "unknown compression", "unknown pixel mode")


class ImageError(ValueError):
    """Bytes that are not an image within the limits. `kind` is one of `IMAGE_ERROR_KINDS`.

    The message is one line of at most 300 printable characters.
    """

    def __init__(self, kind: ImageErrorKind, message: str) -> None:
        super().__init__(kind, message)  # both, so that the error can be pickled
        self.kind: ImageErrorKind = kind

    def __str__(self) -> str:
        return one_line(self.args[1])


def decode(data: bytes, *, max_pixels: int = 100_000_000) -> Pixels:
    """Return the image in `data` as (h, w, 3) uint8 RGB, C-contiguous, upright by EXIF orientation.

    Animations and documents give their first frame. Transparency is shown on white; a transparent
    value of 16-bit gray is ignored. CMYK is converted without its profile, LAB as D50. Gray values
    are scaled from 0..65535 (16-bit and 32-bit integers), 0..4095 (12-bit TIFF), or 0..1, else
    0..255 (floats); values beyond that are stretched from minimum to maximum.
    Raises ImageError if this fails (`too_large` before any pixel is decoded), MemoryError if memory
    is short.
    """
    with guard(max_pixels):
        image = open_image(data)
        # read before load(), after which Pillow no longer knows how samples are stored
        white = 4095 if raw_mode(image).startswith("I;12") else 65535
        image.load()
        return _to_rgb(image, white)


@contextmanager
def guard(max_pixels: int) -> Iterator[None]:
    """Limit Pillow to `max_pixels`, turn its errors into ImageError and silence its warnings.

    Raises ValueError if `max_pixels` is less than 1.
    """
    check_at_least("max_pixels", max_pixels, 1)
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Pillow only warns up to twice its limit; it also checks images inside icons
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        Image.MAX_IMAGE_PIXELS = max_pixels
        try:
            yield
        except (ImageError, MemoryError):
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            size = str(error).partition(" exceeds")[0]
            raise ImageError("too_large", f"{size} is over max_pixels, {max_pixels}") from error
        # Pillow's parsers raise OSError, SyntaxError, struct.error, zlib.error, KeyError and more:
        # no narrower list is complete
        except Exception as error:
            raise ImageError(_kind(error), f"{type(error).__name__}: {error}") from error
        finally:
            Image.MAX_IMAGE_PIXELS = before


def open_image(data: bytes, *, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Return the image in `data` with only its header read; call this inside `guard`."""
    if not data:
        raise ImageError("empty", "the object has no bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError:
        raise _unidentified(data, formats) from None
    if 0 in image.size:
        raise ImageError("corrupt", f"{image.format} of {image.height} x {image.width} pixels")
    return image


def raw_mode(image: Image.Image) -> str:
    """Return how the samples of an image not yet loaded are stored, such as "L;4", or ""."""
    tiles = getattr(image, "tile", None)
    args: Any = tiles[0].args if tiles else ""
    first = args[0] if isinstance(args, tuple) and args else args
    return first if isinstance(first, str) else ""


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image, 1 to 8; 1 if it is missing or invalid."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except MemoryError:
        raise
    # broken metadata raises as many types as in `guard`, and must not cost the image
    except Exception:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def upright(stored: Pixels, orientation: int) -> Pixels:
    """Return an upright view of `stored` (h, w, ...) by its EXIF `orientation`, 1 to 8."""
    return _flip(stored.swapaxes(0, 1) if orientation >= 5 else stored, orientation)


def _stored(upright: Pixels, orientation: int) -> Pixels:
    """Return the inverse of `upright`: a view of the upright array in the file's order."""
    flipped = _flip(upright, orientation)
    return flipped.swapaxes(0, 1) if orientation >= 5 else flipped


def _flip(pixels: Pixels, orientation: int) -> Pixels:
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return pixels[::rows, ::columns]


def _to_rgb(image: Image.Image, white: int) -> Pixels:
    exif = orientation(image)
    height, width = image.height, image.width
    out = np.empty((width, height, 3) if exif >= 5 else (height, width, 3), dtype=np.uint8)
    stored = _stored(out, exif)
    convert = _converter(image, white)
    for top, strip in _strips(image):
        stored[top : top + strip.height] = convert(strip)
    return out


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield (top row, strip) of about a million pixels, so that temporary copies stay small."""
    rows = max(1, 2**20 // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _converter(image: Image.Image, white: int) -> Callable[[Image.Image], Pixels]:
    """Return the function that converts a strip of `image` to (h, w, 3), or (h, w, 1) if gray."""
    if image.mode.startswith("I;16"):
        return partial(_gray, low=0, high=white)
    if image.mode in ("I", "F"):
        low, high = _range(image)
        for usual in (1, 255, 65535)[:2] if image.mode == "F" else (65535,):
            if low >= 0 and high <= usual:
                return partial(_gray, low=0, high=usual)
        return partial(_gray, low=low, high=high)
    palette = image.palette.mode if image.mode == "P" and image.palette else ""
    if "A" in (image.mode[-1], palette[-1:]) or "transparency" in image.info:
        return _on_white
    return lambda strip: np.asarray(strip.convert("RGB"))


def _range(image: Image.Image) -> tuple[float, float]:
    """Return the smallest and the largest finite value, (0, 0) if there are none."""
    low, high = np.inf, -np.inf
    for _, strip in _strips(image):
        values = np.asarray(strip)
        finite = values[np.isfinite(values)]
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    return (low, high) if low <= high else (0.0, 0.0)


def _gray(strip: Image.Image, *, low: float, high: float) -> Pixels:
    values = np.nan_to_num(np.asarray(strip, dtype=np.float64), nan=low)
    scaled = (values - low) / ((high - low) or 1.0)
    return (scaled.clip(0, 1) * 255 + 0.5).astype(np.uint8)[:, :, None]


def _on_white(strip: Image.Image) -> Pixels:
    rgba = np.asarray(strip.convert("RGBA"))
    alpha = rgba[:, :, 3:].astype(np.uint16)
    mixed: npt.NDArray[np.uint16] = (rgba[:, :, :3] * alpha + 255 * (255 - alpha) + 127) // 255
    return mixed.astype(np.uint8)


def _unidentified(data: bytes, formats: tuple[str, ...]) -> ImageError:
    name = next((name for name, at, magic in _SIGNATURES if data.startswith(magic, at)), None)
    if name is None:
        return ImageError("not_an_image", f"no image format starts with {data[:8]!r}")
    if name in formats:
        return ImageError("corrupt", f"it starts like {name}, but its header cannot be read")
    wanted = " or ".join(formats[:2])
    return ImageError("unsupported", f"{name} is not read; convert it to {wanted}")


def _kind(error: Exception) -> ImageErrorKind:
    text = str(error).lower()
    if isinstance(error, EOFError | struct.error) or any(word in text for word in _TRUNCATED):
        return "truncated"
    if isinstance(error, NotImplementedError | ImportError) or any(w in text for w in _UNSUPPORTED):
        return "unsupported"
    return "corrupt"
