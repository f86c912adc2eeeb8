"""Photos of a run that are worth a look, each beside its mask and, where there is one, its label.

Enters: DuckDB's views over one run. Leaves: small JPEGs with their captions. A photo is read as it
was when it was segmented (by its etag), so what is drawn over it was made of it.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
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

_READERS = 8
_ALPHA = 0.6
_NAMED = 5  # classes of a photo in its caption
_COLUMNS = ["uri", "etag", "mask", "confidence", "label_uri", "label_etag"]
_COLUMNS += ["label_error", "classes"]

_RIGHT = "list_sum(list_transform(classes, lambda c: c.tp))"
_LABELLED = "list_sum(list_transform(classes, lambda c: c.tp + c.fn))"

# title, of which photos, in which order; the first is for runs that can be shown whole
_ALL = ("All photos, the least sure first", "true", "confidence, uri")
_GROUPS = (
    ("Picked at random", "true", "md5(uri)"),
    ("Least sure", "true", "confidence, uri"),
    ("Furthest from their labels", f"{_LABELLED} > 0", f"{_RIGHT} / {_LABELLED}, uri"),
)


@dataclass(frozen=True, kw_only=True)
class Photo:
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
class Group:
    """Photos of one kind."""

    title: str
    photos: tuple[Photo, ...]


def groups(
    con: duckdb.DuckDBPyConnection, run: RunLayout, classes: Classes, count: int
) -> tuple[Group, ...]:
    """The groups that have photos, each with at most `count`; one of all where that are few.

    Raises StorageError where the results cannot be read; a photo that cannot is shown as such.
    """
    all_of_them = _choose(con, *_ALL[1:], count + 1)
    kinds = (_ALL,) if len(all_of_them) <= count else _GROUPS
    chosen = {title: _choose(con, where, order, count) for title, where, order in kinds}
    wanted: dict[int, set[str]] = {}
    for uri, shard in {each for some in chosen.values() for each in some}:
        wanted.setdefault(shard, set()).add(uri)

    def photos_of(shard: int) -> dict[str, Photo]:
        table = pq.read_table(io.BytesIO(storage.read(run.shard(shard))), columns=_COLUMNS)
        rows = (row for row in table.to_pylist() if row["uri"] in wanted[shard])
        return {row["uri"]: _photo(row, classes) for row in rows}

    found: dict[str, Photo] = {}
    with ThreadPoolExecutor(_READERS) as pool:
        for some in pool.map(photos_of, wanted):
            found |= some
    return tuple(
        Group(title=title, photos=tuple(found[uri] for uri, _ in some))
        for title, some in chosen.items()
        if some
    )


def _choose(
    con: duckdb.DuckDBPyConnection, where: str, order: str, count: int
) -> list[tuple[str, int]]:
    """(URI, shard) of the first photos in an order."""
    sql = f"SELECT uri, shard FROM images WHERE status = 'ok' AND {where} ORDER BY {order} LIMIT ?"
    found: list[tuple[str, int]] = con.execute(sql, [count]).fetchall()
    return found


def _photo(row: dict[str, Any], classes: Classes) -> Photo:
    mask = masks.decode(row["mask"])
    notes: list[str] = []
    photo = _unless(notes, "photo", lambda: images.decode(storage.read(row["uri"], row["etag"])))
    label = None
    if row["label_uri"] is not None and row["label_error"] is None:
        label = _unless(
            notes,
            "label",
            lambda: masks.decode_label(
                storage.read(row["label_uri"], row["label_etag"]), classes, size=mask.shape
            ),
        )
    small = _resized(photo if photo is not None else np.full((*mask.shape, 3), 255, np.uint8))
    pictures = {"photo": _jpeg(small)} if photo is not None else {}
    for name, ids in (("label", label), ("mask", mask)):
        if ids is not None:
            pictures[name] = _jpeg(_over(small, ids, classes))
    return Photo(
        uri=row["uri"],
        pictures=pictures,
        classes=_largest(row["classes"], classes),
        confidence=row["confidence"],
        right=_right(row["classes"]),
        note="; ".join(notes),
    )


def _unless(notes: list[str], what: str, read: Callable[[], Pixels]) -> Pixels | None:
    """What `read` gives, or None and a note why it cannot be read any more."""
    try:
        # these bytes, by their etag, were decoded before, in a process made for that
        return read()
    except (StorageError, ImageError, LabelError) as error:
        notes.append(f"the {what} cannot be read: {error}")
        return None


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


def _right(found: list[dict[str, Any]]) -> float | None:
    labelled = [c for c in found if c["tp"] is not None]
    total = sum(c["tp"] + c["fn"] for c in labelled)
    return sum(c["tp"] for c in labelled) / total if total else None
