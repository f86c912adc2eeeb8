"""Masks and labels: encode masks as PNG, decode labels from untrusted bytes, draw overlays.

A mask is (h, w) uint8, value = class id; a label may also contain `ignore_index`. Ambiguous label
files are refused with a reason: training on wrong labels is worse than on fewer.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.data import images
from pipeline.data.images import ImageError, Pixels
from pipeline.data.labels import Classes, voc_colormap
from pipeline.text import one_line

# as returned by Pillow: uint8, bool or wider integers
Stored = npt.NDArray[Any]

# lossless formats: JPEG and WebP blur ids, PGM rescales them
LABEL_FORMATS = ("PNG", "TIFF", "BMP", "GIF")

# VOC's color of 255, the border around objects
VOC_BORDER = voc_colormap(256)[255]


class LabelError(ValueError):
    """Bytes that cannot be read as a label of the classes; the message is one line."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def encode(mask: npt.NDArray[np.uint8]) -> bytes:
    """Return `mask` (h, w) uint8 as an 8-bit L PNG, value = class id. Raises ValueError."""
    if mask.dtype != np.uint8 or mask.ndim != 2 or mask.size == 0:
        raise ValueError(f"the mask is {mask.dtype} {mask.shape}; it must be uint8 (h, w)")
    buffer = io.BytesIO()
    # run-length matching (3) is smaller and faster on masks than zlib's default
    Image.fromarray(mask).save(buffer, "PNG", compress_level=1, compress_type=3)
    return buffer.getvalue()


def decode(data: bytes, *, max_pixels: int = 2**31 - 1) -> Pixels:
    """Return the mask (h, w) in an 8-bit L PNG. Raises ImageError on other data."""
    with images.guard(max_pixels):
        image = images.open_image(data, formats=("PNG",))
        if images.raw_mode(image) != "L":
            raise ImageError("unsupported", f"a mask must be 8-bit L, not {image.mode}")
        image.load()
        return np.array(image)


def overlay(
    image: Pixels, mask: npt.NDArray[np.uint8], classes: Classes, *, alpha: float = 0.5
) -> Pixels:
    """Return `image` (h, w, 3) blended with the palette colors of `mask`; class borders are opaque.

    `alpha` in [0, 1] is the weight of the colors; pixels of `ignore_index` show the image.
    Raises ValueError if the sizes differ, a value is not a class, or `alpha` is out of range.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha {alpha}: must be between 0 and 1")
    if image.shape != (*mask.shape, 3):
        raise ValueError(f"the image is {image.shape}, but the mask is {mask.shape}")
    _check_ids(mask, classes, "mask")
    palette = np.zeros((256, 3), dtype=np.uint8)
    palette[: classes.num_classes] = classes.palette
    weight = np.where(_borders(mask), 256, round(alpha * 256)).astype(np.uint32)
    weight[mask == classes.ignore_index] = 0
    weight = weight[:, :, None]
    mixed = (image * (256 - weight) + palette[mask] * weight + 128) >> 8
    return mixed.astype(np.uint8)


def decode_label(
    data: bytes,
    classes: Classes,
    *,
    size: tuple[int, int] | None = None,
    max_pixels: int = 100_000_000,
    lookup: npt.NDArray[np.uint8] | None = None,
) -> Pixels:
    """Return the label in `data` (h, w) uint8: ids of `classes` and `ignore_index`, upright.

    A palette image gives its indexes, never its colors; a gray image its stored values, at any bit
    depth; an RGB image is looked up in the palette, with VOC's border color as ignore_index.
    `lookup` (256,) uint8 maps the values read to ids, like CITYSCAPES_TRAIN_IDS. `size` is (h, w)
    of the upright image. Raises LabelError if the bytes cannot be read this way, hold any other
    value, or differ in size; ValueError if `lookup` has another shape or type.
    """
    if lookup is not None and (lookup.shape != (256,) or lookup.dtype != np.uint8):
        raise ValueError(f"lookup is {lookup.dtype} {lookup.shape}; it must be uint8 (256,)")
    try:
        with images.guard(max_pixels):
            image = images.open_image(data, formats=LABEL_FORMATS)
            raw_mode = images.raw_mode(image)
            image.load()
            values, orientation = np.asarray(image), images.orientation(image)
    except ImageError as error:
        raise LabelError(f"label cannot be read as {', '.join(LABEL_FORMATS)}: {error}") from error
    ids = images.upright(_ids(values, image.mode, raw_mode, classes), orientation)
    if size is not None and ids.shape != size:
        raise LabelError(
            f"label is {ids.shape[0]} x {ids.shape[1]}, "
            f"but its image is {size[0]} x {size[1]} (height x width)"
        )
    ids = np.ascontiguousarray(ids if lookup is None else lookup[ids])
    _check_ids(ids, classes, "label")
    return ids


def _ids(values: Stored, mode: str, raw_mode: str, classes: Classes) -> Pixels:
    """Return Pillow's `values` (h, w) or (h, w, bands) as ids (h, w) uint8, not yet checked."""
    if ";16" in raw_mode and not mode.startswith("I"):
        # Pillow keeps only the high byte, so small ids would all become 0
        raise LabelError("label has 16-bit colors; save it as an 8-bit gray or palette PNG")
    if mode in ("LA", "PA", "RGBA"):
        values = _opaque(values, classes)
    if mode in ("RGB", "RGBA", "RGBX"):
        return _by_color(values, classes)
    if mode in ("I", "I;16", "I;16B"):
        return _narrow(values)
    if mode not in ("1", "L", "LA", "P", "PA"):
        raise LabelError(f"label has mode {mode}; save it as an 8-bit gray or palette PNG")
    # Pillow scales 2-bit and 4-bit gray to 0..255; undo that to get the stored id
    step = {"L;2": 85, "L;4": 17}.get(raw_mode[:3], 1) if mode == "L" else 1
    ids: Pixels = values.reshape(values.shape[:2]).astype(np.uint8)
    return ids // np.uint8(step)


def _opaque(values: Stored, classes: Classes) -> Stored:
    """Return `values` without their last band, alpha. Raises LabelError if it hides a pixel."""
    if int(values[:, :, -1].min()) < 255:
        raise LabelError(
            "label has transparent pixels; save it without alpha, "
            f"with ignore_index ({classes.ignore_index}) where there is no label"
        )
    return values[:, :, :-1]


def _narrow(values: Stored) -> Pixels:
    """Return 16-bit or 32-bit `values` as uint8. Raises LabelError if one does not fit."""
    for value in (int(values.min()), int(values.max())):
        if not 0 <= value <= 255:
            raise LabelError(f"label holds class {value}; class ids are 0 to 255")
    ids: Pixels = values.astype(np.uint8)
    return ids


def _by_color(values: Stored, classes: Classes) -> Pixels:
    """Return the ids (h, w) of the colors in `values` (h, w, 3 or more)."""
    ids = {color: i for i, color in enumerate(classes.palette)}
    if len(ids) < classes.num_classes:
        raise LabelError("label is RGB, but the palette has duplicate colors; save it as class ids")
    ids.setdefault(VOC_BORDER, classes.ignore_index)
    known = np.array(sorted((_code(np.array(color)), i) for color, i in ids.items()))
    codes = _code(values)
    found = np.searchsorted(known[:-1, 0], codes)
    unknown = values[known[found, 0] != codes]
    if unknown.size:
        color = tuple(unknown[0, :3].tolist())
        raise LabelError(f"label holds color {color}, which is not a class; save it as class ids")
    classes_found: Pixels = known[found, 1].astype(np.uint8)
    return classes_found


def _code(colors: Stored) -> npt.NDArray[np.int32]:
    """Return one integer per color (..., 3 or more)."""
    red, green, blue = (colors[..., band].astype(np.int32) for band in range(3))
    return red << 16 | green << 8 | blue


def _borders(mask: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Return where the class differs from that of the pixel above or to the left."""
    edge = np.zeros(mask.shape, dtype=np.bool_)
    edge[1:] |= mask[1:] != mask[:-1]
    edge[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    return edge


def _check_ids(ids: npt.NDArray[np.uint8], classes: Classes, what: str) -> None:
    if int(ids.max()) < classes.num_classes:
        return
    unknown = ids[(ids >= classes.num_classes) & (ids != classes.ignore_index)]
    if unknown.size:
        raise LabelError(
            f"{what} holds class {unknown.max()}, but num_classes is {classes.num_classes}; "
            f"is ignore_index ({classes.ignore_index}) set?"
        )
