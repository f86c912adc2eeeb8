"""Photos of a run that are worth a look, each beside its mask and, where there is one, its label.

Enters: DuckDB's views over one run. Leaves: small JPEGs with their captions. A photo is read as it
was when it was segmented (by its etag), so what is drawn over it was made of it.
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
"""The longer side of a picture in the report, in px."""

_ALPHA = 0.6
_NAMED = 5  # classes of a photo in its caption
_WITHIN = 100_000_000  # px that may be decoded, unless the photo is known to have more

_RIGHT = """list_sum(list_transform(classes, lambda c: c.tp))
    / nullif(list_sum(list_transform(classes, lambda c: c.tp + c.fn)), 0)"""

# title, of which photos, in which order; the first is for runs that can be shown whole
_ALL = ("All photos, the least sure first", "true", "confidence, uri")
_GROUPS = (
    ("Picked at random", "true", "md5(uri)"),
    ("Least sure", "true", "confidence, uri"),
    ("Furthest from their labels", "share_right IS NOT NULL", "share_right, uri"),
)

Chosen = tuple[str, int, float | None]


@dataclass(frozen=True, kw_only=True)
class GalleryImage:
    """A photo of the run: JPEGs by what they show, what is in it, how much of its label is right.

    `classes` has (name, colour, share of the pixels), the largest first; `right` is the share of
    labelled pixels, None without a label; `note` says why a picture is missing, "" if none is.
    """

    uri: str
    pictures: dict[str, bytes]
    classes: tuple[tuple[str, Color, float], ...]
    confidence: float
    right: float | None
    note: str


@dataclass(frozen=True, kw_only=True)
class GalleryGroup:
    """Photos of one kind."""

    title: str
    photos: tuple[GalleryImage, ...]


def select_groups(
    con: duckdb.DuckDBPyConnection, run: RunLayout, classes: Classes, count: int
) -> tuple[GalleryGroup, ...]:
    """The groups that have photos, each with at most `count`; one of all where that are few.

    Raises StorageError where the results cannot be read; a photo that cannot is shown as such.
    One shard and one photo are held at a time: Pillow's limits are a process's, so no threads.
    """
    all_of_them = _choose(con, *_ALL[1:], count + 1)
    kinds = (_ALL,) if len(all_of_them) <= count else _GROUPS
    chosen = {title: _choose(con, where, order, count) for title, where, order in kinds}
    wanted: dict[int, dict[str, float | None]] = {}
    for uri, shard, right in (each for some in chosen.values() for each in some):
        wanted.setdefault(shard, {})[uri] = right
    found: dict[str, GalleryImage] = {}
    for shard, rights in sorted(wanted.items()):
        for row in _rows(run.shard(shard), list(rights)):
            found[row["uri"]] = _photo(row, classes, rights[row["uri"]])
    return tuple(
        GalleryGroup(title=title, photos=tuple(found[uri] for uri, _, _ in some))
        for title, some in chosen.items()
        if some
    )


def _choose(con: duckdb.DuckDBPyConnection, where: str, order: str, count: int) -> list[Chosen]:
    """(URI, shard, share of its label that is right) of the first photos in an order."""
    photos = f"SELECT *, {_RIGHT} AS share_right FROM images WHERE status = 'ok'"
    sql = f"SELECT uri, shard, share_right FROM ({photos}) WHERE {where} ORDER BY {order} LIMIT ?"
    found: list[Chosen] = con.execute(sql, [count]).fetchall()
    return found


def _rows(shard: str, uris: list[str]) -> list[dict[str, Any]]:
    """The rows of these photos in a shard's file."""
    table = pq.read_table(io.BytesIO(storage.read(shard)))
    rows: list[dict[str, Any]] = table.filter(
        pc.is_in(table.column("uri"), pa.array(uris))
    ).to_pylist()
    return rows


def _photo(row: dict[str, Any], classes: Classes, right: float | None) -> GalleryImage:
    """A photo as the report shows it; over white where it cannot be read any more."""
    notes: list[str] = []
    shown = {"photo": _unless(notes, "photo", _small, row)}
    under = _white(row) if shown["photo"] is None else shown["photo"]
    for what, read in (("label", _label), ("mask", _mask)):
        shown[what] = _unless(notes, what, _drawn, row, read, under, classes)
    return GalleryImage(
        uri=row["uri"],
        pictures={what: _jpeg(picture) for what, picture in shown.items() if picture is not None},
        classes=_largest(row["classes"], classes),
        confidence=row["confidence"],
        right=right,
        note="; ".join(notes),
    )


def _unless(
    notes: list[str], what: str, read: Callable[..., Pixels | None], *given: Any
) -> Pixels | None:
    """What `read` gives, or None and a note why it cannot be read any more."""
    try:
        # these bytes, by their etag, were decoded before, in a process made for that
        return read(*given)
    except (StorageError, ImageError, LabelError) as error:
        notes.append(f"the {what} cannot be read: {error}")
        return None


def _within(row: dict[str, Any]) -> int:
    """How many pixels may be decoded."""
    pixels: int = row["height"] * row["width"]
    return max(_WITHIN, pixels)


def _small(row: dict[str, Any]) -> Pixels:
    data = storage.read(row["uri"], row["etag"])
    return _resized(images.decode(data, max_pixels=_within(row)))


def _white(row: dict[str, Any]) -> Pixels:
    return _resized(np.full((row["height"], row["width"], 3), 255, dtype=np.uint8))


def _label(row: dict[str, Any], classes: Classes) -> Pixels | None:
    if row["label_uri"] is None or row["label_error"] is not None:
        return None
    data = storage.read(row["label_uri"], row["label_etag"])
    size = row["height"], row["width"]
    return masks.decode_label(data, classes, size=size, max_pixels=_within(row))


def _mask(row: dict[str, Any], _: Classes) -> Pixels:
    return masks.decode(row["mask"], max_pixels=_within(row))


def _drawn(
    row: dict[str, Any],
    read: Callable[[dict[str, Any], Classes], Pixels | None],
    under: Pixels,
    classes: Classes,
) -> Pixels | None:
    ids = read(row, classes)
    return None if ids is None else _over(under, ids, classes)


def _resized(photo: Pixels) -> Pixels:
    height, width = photo.shape[:2]
    scale = min(1.0, SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(photo).resize(size, Image.Resampling.LANCZOS))


def _over(small: Pixels, ids: Pixels, classes: Classes) -> Pixels:
    """`ids` drawn over the smaller photo."""
    size = small.shape[1], small.shape[0]
    fitted = np.asarray(Image.fromarray(ids).resize(size, Image.Resampling.NEAREST))
    return masks.overlay(small, fitted, classes, alpha=_ALPHA)


def _jpeg(picture: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _largest(found: list[dict[str, Any]], classes: Classes) -> tuple[tuple[str, Color, float], ...]:
    seen = sorted((c for c in found if c["pixels"]), key=lambda c: -c["fraction"])[:_NAMED]
    return tuple((c["class_name"], classes.palette[c["class_id"]], c["fraction"]) for c in seen)
