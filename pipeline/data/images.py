"""Untrusted bytes become an RGB array, or one typed error.

Whatever the bytes hold, `decode` returns a picture as a viewer would show it, raises `ImageError`,
or runs out of memory; Pillow's own exceptions and warnings do not leave this room. A decoder in C
may still crash or hang: the process it runs in contains that. Pillow's limits are module globals,
set for the time of a call: use one thread of a process at a time.
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

from pipeline.text import one_line

# empty: no bytes. truncated: an image that ends early. not_an_image: no format that is known here.
# too_large: over the pixel limit. unsupported: a known format or variant that is not read.
# corrupt: the format's own rules are broken in any other way.
ImageErrorKind = Literal[
    "empty", "truncated", "not_an_image", "too_large", "unsupported", "corrupt"
]
IMAGE_ERROR_KINDS: tuple[ImageErrorKind, ...] = get_args(ImageErrorKind)

Pixels = npt.NDArray[np.uint8]

# Pictures that Pillow decodes by itself: never EPS (starts Ghostscript), PDF, WMF, nor BUFR, GRIB,
# HDF5 (stubs that decode nothing). Tried in this order; TGA has no signature, so it is last.
FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF", "JPEG2000", "BMP", "DIB", "PPM", "ICO", "CUR"),
    *("ICNS", "PSD", "DDS", "QOI", "SGI", "SUN", "PCX", "DCX", "FLI", "TGA"),
)

# (name, offset, bytes) that tell a broken or a refused file from one that is no image at all;
# a name of FORMATS is a broken one. The bare ftyp is after those that it would hide.
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

# what Pillow's plugins say, in lower case
_TRUNCATED = ("truncated", "buffer is not large enough", "not enough", "unexpected end")
_UNSUPPORTED = ("unsupported", "not supported", "unknown compression", "unknown pixel mode")


class ImageError(ValueError):
    """Bytes that are no picture within the limits. `kind` is one of `IMAGE_ERROR_KINDS`.

    The message is one line of at most 300 printable characters, whatever the bytes hold.
    """

    def __init__(self, kind: ImageErrorKind, message: str) -> None:
        super().__init__(kind, message)  # both, so that the error survives pickling
        self.kind: ImageErrorKind = kind

    def __str__(self) -> str:
        return one_line(self.args[1])


def decode(data: bytes, *, max_pixels: int = 100_000_000) -> Pixels:
    """The picture in `data` as (h, w, 3) RGB, C-contiguous, upright by its EXIF orientation.

    Of an animation or a document it is the first frame. Transparency is shown on white. CMYK is
    converted without its profile, LAB as D50. 16-bit gray is 0 to 65535 (12-bit TIFF 0 to 4095),
    32-bit integers too, floats 0 to 1 or else 0 to 255; what exceeds that is stretched from its
    least to its largest value; 16-bit gray ignores a transparent value.
    Raises ImageError on anything else, `too_large` before a pixel is decoded, and MemoryError
    where memory is short.
    """
    with guard(max_pixels):
        image = open_image(data)
        # asked first: Pillow forgets how samples are stored once it has read them
        white = 4095 if raw_mode(image).startswith("I;12") else 65535
        image.load()
        return _to_rgb(image, white)


@contextmanager
def guard(max_pixels: int) -> Iterator[None]:
    """Pillow within limits: in the body its errors become ImageError and its warnings silence.

    Raises ValueError where `max_pixels` is under 1.
    """
    if max_pixels < 1:
        raise ValueError(f"max_pixels is {max_pixels}; it must be at least 1")
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # up to twice its limit Pillow only warns; it checks icons' inner images too
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        Image.MAX_IMAGE_PIXELS = max_pixels
        try:
            yield
        except (ImageError, MemoryError):
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            size = str(error).partition(" exceeds")[0]
            raise ImageError("too_large", f"{size} is over max_pixels, {max_pixels}") from error
        # Pillow's parsers raise whatever their slicing and unpacking happens to raise (OSError,
        # SyntaxError, struct.error, zlib.error, KeyError, ...): no narrower list is complete
        except Exception as error:
            raise ImageError(_kind(error), f"{type(error).__name__}: {error}") from error
        finally:
            Image.MAX_IMAGE_PIXELS = before


def open_image(data: bytes, *, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """The image in `data` with its header read and no pixel decoded; to be called in `guard`."""
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
    """How the samples of an opened, not yet loaded image are stored, like "L;4"; "" if unknown."""
    tiles = getattr(image, "tile", None)
    args: Any = tiles[0].args if tiles else ""
    first = args[0] if isinstance(args, tuple) and args else args
    return first if isinstance(first, str) else ""


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of a loaded image, 1 to 8; 1 where it has none or a broken one."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except MemoryError:
        raise
    # the pixels are fine: broken metadata, in any of the ways of `guard`, must not cost the image
    except Exception:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def upright(stored: Pixels, orientation: int) -> Pixels:
    """A view of `stored` (h, w, ...) as its EXIF `orientation` (1 to 8) wants it to be seen."""
    return _flip(stored.swapaxes(0, 1) if orientation >= 5 else stored, orientation)


def _stored(upright: Pixels, orientation: int) -> Pixels:
    """The inverse of `upright`: a view of the upright array in the order of the file."""
    flipped = _flip(upright, orientation)
    return flipped.swapaxes(0, 1) if orientation >= 5 else flipped


def _flip(pixels: Pixels, orientation: int) -> Pixels:
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return pixels[::rows, ::columns]


def _to_rgb(image: Image.Image, white: int) -> Pixels:
    turn = orientation(image)
    height, width = image.height, image.width
    out = np.empty((width, height, 3) if turn >= 5 else (height, width, 3), dtype=np.uint8)
    stored = _stored(out, turn)
    convert = _converter(image, white)
    for top, strip in _strips(image):
        stored[top : top + strip.height] = convert(strip)
    return out


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """(top row, strip) of about a million pixels: a large image is never held in three copies."""
    rows = max(1, 2**20 // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _converter(image: Image.Image, white: int) -> Callable[[Image.Image], Pixels]:
    """What turns a strip of `image` into (h, w, 3), or (h, w, 1) where it is gray."""
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
    """The least and the largest finite value, (0, 0) where there is none."""
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
        return ImageError("not_an_image", f"no image format begins with {data[:8]!r}")
    if name in formats:
        return ImageError("corrupt", f"it begins as {name}, but its header cannot be read")
    wanted = " or ".join(formats[:2])
    return ImageError("unsupported", f"{name} is not read; convert it to {wanted}")


def _kind(error: Exception) -> ImageErrorKind:
    text = str(error).lower()
    if isinstance(error, EOFError | struct.error) or any(word in text for word in _TRUNCATED):
        return "truncated"
    if isinstance(error, NotImplementedError | ImportError) or any(w in text for w in _UNSUPPORTED):
        return "unsupported"
    return "corrupt"
