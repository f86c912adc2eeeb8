"""Image galleries of a report: selected images, each with its label (if any) and its mask.

Images are read with the etag they had when they were segmented, so masks and labels are drawn over
the version they belong to.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from pipeline.data import images, masks, storage
from pipeline.data.images import ImageError, Pixels
from pipeline.data.labels import Classes, Color
from pipeline.data.masks import LabelError
from pipeline.data.storage import StorageError
from pipeline.results.layout import RunLayout

SIDE = 360
"""Longer side of a picture in the report, in px."""

_ALPHA = 0.6
_CAPTION_CLASSES = 5
_MAX_PIXELS = 100_000_000  # decoded at most, unless the image is known to have more

_PIXEL_ACCURACY = """list_sum(list_transform(classes, lambda c: c.tp))
    / nullif(list_sum(list_transform(classes, lambda c: c.tp + c.fn)), 0)"""

# title, WHERE, ORDER BY; the first is for runs small enough to show all images
_ALL = ("All images, lowest confidence first", "true", "confidence, uri")
_GROUPS = (
    ("Random sample", "true", "md5(uri)"),
    ("Lowest confidence", "true", "confidence, uri"),
    ("Lowest pixel accuracy", "pixel_accuracy IS NOT NULL", "pixel_accuracy, uri"),
)

_Selected = tuple[str, int, float | None]  # URI, shard, pixel accuracy


@dataclass(frozen=True, kw_only=True)
class GalleryImage:
    """One image of the run: JPEGs by name ("image", "label", "mask"), classes and scores.

    `classes` has (name, color, fraction of the pixels), largest first. `pixel_accuracy` is None
    without a label. `note` says why a picture is missing, or is "".
    """

    uri: str
    pictures: dict[str, bytes]
    classes: tuple[tuple[str, Color, float], ...]
    confidence: float
    pixel_accuracy: float | None
    note: str


@dataclass(frozen=True, kw_only=True)
class GalleryGroup:
    """Images under one heading."""

    title: str
    images: tuple[GalleryImage, ...]


def select_groups(
    con: duckdb.DuckDBPyConnection, run: RunLayout, classes: Classes, count: int
) -> tuple[GalleryGroup, ...]:
    """Return the non-empty groups with at most `count` images each; one group for a small run.

    An image that can no longer be read is shown without its pixels. One shard and one image are
    held at a time: Pillow's limits are per process, so there are no threads. Raises StorageError
    if the results cannot be read.
    """
    whole_run = _select(con, *_ALL[1:], count + 1)
    groups = (_ALL,) if len(whole_run) <= count else _GROUPS
    selected = {title: _select(con, where, order, count) for title, where, order in groups}
    by_shard: dict[int, dict[str, float | None]] = {}
    for uri, shard, accuracy in (each for group in selected.values() for each in group):
        by_shard.setdefault(shard, {})[uri] = accuracy
    found: dict[str, GalleryImage] = {}
    for shard, accuracies in sorted(by_shard.items()):
        for row in _read_rows(run.shard(shard), list(accuracies)):
            found[row["uri"]] = _gallery_image(row, classes, accuracies[row["uri"]])
    return tuple(
        GalleryGroup(title=title, images=tuple(found[uri] for uri, _, _ in group))
        for title, group in selected.items()
        if group
    )


def _select(con: duckdb.DuckDBPyConnection, where: str, order: str, count: int) -> list[_Selected]:
    """Return the first `count` images in an order."""
    ok = f"SELECT *, {_PIXEL_ACCURACY} AS pixel_accuracy FROM images WHERE status = 'ok'"
    sql = f"SELECT uri, shard, pixel_accuracy FROM ({ok}) WHERE {where} ORDER BY {order} LIMIT ?"
    found: list[_Selected] = con.execute(sql, [count]).fetchall()
    return found


def _read_rows(shard: str, uris: list[str]) -> list[dict[str, Any]]:
    """Return the rows of these images in a shard's file."""
    table = pq.read_table(io.BytesIO(storage.read(shard)))
    rows: list[dict[str, Any]] = table.filter(
        pc.is_in(table.column("uri"), pa.array(uris))
    ).to_pylist()
    return rows


def _gallery_image(
    row: dict[str, Any], classes: Classes, pixel_accuracy: float | None
) -> GalleryImage:
    """Return an image with its pictures, drawn over white if its pixels cannot be read."""
    notes: list[str] = []
    shown = {"image": _try(notes, "image", _thumbnail, row)}
    background = _white(row) if shown["image"] is None else shown["image"]
    for what, read in (("label", _read_label), ("mask", _read_mask)):
        shown[what] = _try(notes, what, _overlay, row, read, background, classes)
    return GalleryImage(
        uri=row["uri"],
        pictures={what: _jpeg(pixels) for what, pixels in shown.items() if pixels is not None},
        classes=_largest_classes(row["classes"], classes),
        confidence=row["confidence"],
        pixel_accuracy=pixel_accuracy,
        note="; ".join(notes),
    )


def _try(
    notes: list[str], what: str, read: Callable[..., Pixels | None], *given: Any
) -> Pixels | None:
    """Return `read(*given)`, or None after adding a note if the file cannot be read."""
    try:
        # safe in this process: these very bytes, by etag, were decoded in a child process before
        return read(*given)
    except (StorageError, ImageError, LabelError) as error:
        notes.append(f"the {what} cannot be read: {error}")
        return None


def _max_pixels(row: dict[str, Any]) -> int:
    pixels: int = row["height"] * row["width"]
    return max(_MAX_PIXELS, pixels)


def _thumbnail(row: dict[str, Any]) -> Pixels:
    data = storage.read(row["uri"], row["etag"])
    return _shrink(images.decode(data, max_pixels=_max_pixels(row)))


def _white(row: dict[str, Any]) -> Pixels:
    return _shrink(np.full((row["height"], row["width"], 3), 255, dtype=np.uint8))


def _read_label(row: dict[str, Any], classes: Classes) -> Pixels | None:
    if row["label_uri"] is None or row["label_error"] is not None:
        return None
    data = storage.read(row["label_uri"], row["label_etag"])
    size = row["height"], row["width"]
    return masks.decode_label(data, classes, size=size, max_pixels=_max_pixels(row))


def _read_mask(row: dict[str, Any], _: Classes) -> Pixels:
    return masks.decode(row["mask"], max_pixels=_max_pixels(row))


def _overlay(
    row: dict[str, Any],
    read: Callable[[dict[str, Any], Classes], Pixels | None],
    background: Pixels,
    classes: Classes,
) -> Pixels | None:
    """Return the label or mask drawn over the thumbnail, None if there is no label."""
    ids = read(row, classes)
    if ids is None:
        return None
    size = background.shape[1], background.shape[0]
    fitted = np.asarray(Image.fromarray(ids).resize(size, Image.Resampling.NEAREST))
    return masks.overlay(background, fitted, classes, alpha=_ALPHA)


def _shrink(pixels: Pixels) -> Pixels:
    height, width = pixels.shape[:2]
    scale = min(1.0, SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def _jpeg(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _largest_classes(
    found: list[dict[str, Any]], classes: Classes
) -> tuple[tuple[str, Color, float], ...]:
    present = sorted((c for c in found if c["pixels"]), key=lambda c: -c["fraction"])
    return tuple(
        (c["class_name"], classes.palette[c["class_id"]], c["fraction"])
        for c in present[:_CAPTION_CLASSES]
    )
