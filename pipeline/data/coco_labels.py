"""A COCO data set made ready for training: a label for each photo, and a table of the pairs.

Enters: the URI of a folder with train2017/, val2017/ and annotations/. Leaves: labels/SPLIT/*.png
and pairs.parquet below another URI. The photos stay where they are and are not read. The table is
written last; a label that is there already is left as it is, unless the annotations have changed.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data import coco, masks, storage
from pipeline.data.coco import AnnotatedImage
from pipeline.data.labels import VOC
from pipeline.data.pairs import stem
from pipeline.data.storage import StorageError

FOLDERS = {"train": "train2017", "val": "val2017"}
"""Where COCO keeps the photos of each split; train2017 is trainval without minival."""

TABLE = "pairs.parquet"

_PUTS = 16
_BATCH = 256  # photos between two looks at how far it is


@dataclass(frozen=True, kw_only=True)
class SplitCounts:
    """What became of a split: how many photos are in the table, and how many were left out."""

    kept: int
    left_out: int


def read_annotations(data: str) -> dict[str, list[AnnotatedImage]]:
    """The pictures of each split below `data`, in the order of their names.

    Raises ValueError where annotations or photos are missing or wrong, StorageError where storage
    refuses.
    """
    return {split: _pictures(data, folder) for split, folder in FOLDERS.items()}


def convert(
    pictures: Mapping[str, Sequence[AnnotatedImage]],
    data: str,
    out: str,
    *,
    min_pixels: int,
    tell: Callable[[int], None],
) -> dict[str, SplitCounts]:
    """Draws the labels of `annotated(data)` below `out`, writes the table, says what it has.

    A photo of train with fewer than `min_pixels` px of VOC's things is left out; val has all.
    `tell` is called with the number of photos drawn since it was called last. Raises ValueError
    where nothing of train is left, StorageError where storage refuses.
    """
    rows: list[tuple[str, str, str]] = []
    drawn: dict[str, SplitCounts] = {}
    for split, folder in FOLDERS.items():
        images = [storage.join(data, f"{folder}/{each.file_name}") for each in pictures[split]]
        least = min_pixels if split == "train" else 0
        labels = list(_labels(out, folder, pictures[split], least, tell))
        kept = [(i, key, split) for i, key in zip(images, labels, strict=True) if key]
        rows += kept
        drawn[split] = SplitCounts(kept=len(kept), left_out=len(labels) - len(kept))
    if not drawn["train"].kept:
        raise ValueError(
            f"none of {drawn['train'].left_out} photos of {FOLDERS['train']} has {min_pixels} px "
            "of VOC's classes; give a smaller --min-pixels"
        )
    columns = dict(zip(("image", "label", "split"), zip(*rows, strict=True), strict=True))
    buffer = io.BytesIO()
    pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), buffer)
    storage.write(storage.join(out, TABLE), buffer.getvalue())
    return drawn


def _pictures(data: str, folder: str) -> list[AnnotatedImage]:
    """The annotated pictures of `folder`, each of which is there."""
    uri = storage.join(data, f"annotations/instances_{folder}.json")
    try:
        pictures = coco.parse(storage.read(uri))
    except StorageError as error:
        if error.kind != "vanished":
            raise
        raise ValueError(
            f"{uri} does not exist; {data} must hold {' and '.join(FOLDERS.values())}, and "
            "annotations with COCO's instances_*.json"
        ) from None
    except ValueError as error:
        raise ValueError(f"{uri}: {error}") from None
    photos = storage.join(data, folder)
    there = {storage.relative(photos, item.uri) for item in storage.list_objects(photos)}
    missing = [picture.file_name for picture in pictures if picture.file_name not in there]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(pictures)} photos that {uri} names are not in {photos}, the "
            f"first is {missing[0]}; add them"
        )
    return pictures


def _labels(
    out: str,
    folder: str,
    pictures: Sequence[AnnotatedImage],
    least: int,
    tell: Callable[[int], None],
) -> Iterator[str | None]:
    """The key of each picture's label below `out`, None where fewer than `least` px are in it."""

    def label(picture: AnnotatedImage) -> str | None:
        ids = coco.draw_label(picture)
        if np.count_nonzero((ids != 0) & (ids != VOC.ignore_index)) < least:
            return None
        key = f"labels/{folder}/{stem(picture.file_name)}.png"
        _put(storage.join(out, key), masks.encode(ids))
        return key

    with ThreadPoolExecutor(_PUTS) as pool:
        for start in range(0, len(pictures), _BATCH):
            batch = pictures[start : start + _BATCH]
            yield from pool.map(label, batch)
            tell(len(batch))


def _put(uri: str, data: bytes) -> None:
    """`data` is what lies at `uri` afterwards; the same bytes are not written again."""
    if not storage.create(uri, data) and storage.read(uri) != data:
        storage.write(uri, data)
