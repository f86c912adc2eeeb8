"""Convert COCO to a training set: a label PNG per image, and a table of image/label pairs.

The input is a folder with train2017/, val2017/ and annotations/. The output is labels/SPLIT/*.png
and pairs.parquet under another URI. The images stay where they are and are not read. The table is
written last; existing labels are kept unless the annotations have changed.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data import coco, masks, storage
from pipeline.data.coco import AnnotatedImage
from pipeline.data.labels import VOC
from pipeline.data.pairs import stem
from pipeline.data.prefetch import prefetch
from pipeline.data.storage import StorageError

FOLDERS = {"train": "train2017", "val": "val2017"}
"""COCO's image folder of each split; train2017 is trainval without minival."""

TABLE = "pairs.parquet"

_WRITERS = 16


@dataclass(frozen=True, kw_only=True)
class SplitCounts:
    """Numbers of images of a split that are in the table, and that were left out."""

    kept: int
    left_out: int


def read_annotations(data: str) -> dict[str, list[AnnotatedImage]]:
    """Return the annotated images of each split under `data`, sorted by name.

    Raises ValueError if annotations or images are missing or malformed, StorageError if storage
    refuses.
    """
    return {split: _read_split(data, folder) for split, folder in FOLDERS.items()}


def convert(
    images: Mapping[str, Sequence[AnnotatedImage]],
    data: str,
    out: str,
    *,
    min_pixels: int,
    progress: Callable[[int], None],
) -> dict[str, SplitCounts]:
    """Write the labels of `read_annotations(data)` and the pair table under `out`.

    Train images with fewer than `min_pixels` px of VOC's classes are left out; val keeps all.
    `progress` is called with the number of images finished since its last call. Returns counts by
    split. Raises ValueError if no train image is left, StorageError if storage refuses.
    """
    rows: list[tuple[str, str, str]] = []
    counts: dict[str, SplitCounts] = {}
    for split, folder in FOLDERS.items():
        uris = [storage.join(data, f"{folder}/{each.file_name}") for each in images[split]]
        least = min_pixels if split == "train" else 0
        labels = list(_write_labels(out, folder, images[split], least, progress))
        kept = [(uri, key, split) for uri, key in zip(uris, labels, strict=True) if key]
        rows += kept
        counts[split] = SplitCounts(kept=len(kept), left_out=len(labels) - len(kept))
    if not counts["train"].kept:
        raise ValueError(
            f"none of the {counts['train'].left_out} images in {FOLDERS['train']} has "
            f"{min_pixels} px of VOC's classes; give a smaller --min-pixels"
        )
    columns = dict(zip(("image", "label", "split"), zip(*rows, strict=True), strict=True))
    buffer = io.BytesIO()
    pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), buffer)
    storage.write(storage.join(out, TABLE), buffer.getvalue())
    return counts


def _read_split(data: str, folder: str) -> list[AnnotatedImage]:
    """Return the annotated images of `folder`. Raises ValueError if an image file is missing."""
    uri = storage.join(data, f"annotations/instances_{folder}.json")
    try:
        images = coco.parse(storage.read(uri))
    except StorageError as error:
        if error.kind != "vanished":
            raise
        raise ValueError(
            f"{uri} does not exist; {data} must hold {' and '.join(FOLDERS.values())}, and "
            "annotations with COCO's instances_*.json"
        ) from None
    except ValueError as error:
        raise ValueError(f"{uri}: {error}") from None
    root = storage.join(data, folder)
    present = {storage.relative(root, item.uri) for item in storage.list_objects(root)}
    missing = [image.file_name for image in images if image.file_name not in present]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(images)} images listed in {uri} are not in {root}, the first "
            f"is {missing[0]}; add them"
        )
    return images


def _write_labels(
    out: str,
    folder: str,
    images: Sequence[AnnotatedImage],
    least: int,
    progress: Callable[[int], None],
) -> Iterator[str | None]:
    """Yield the key of each image's label under `out`, None if it has fewer than `least` px."""

    def write(image: AnnotatedImage) -> str | None:
        ids = coco.draw_label(image)
        if np.count_nonzero((ids != 0) & (ids != VOC.ignore_index)) < least:
            return None
        key = f"labels/{folder}/{stem(image.file_name)}.png"
        _write_if_different(storage.join(out, key), masks.encode(ids))
        return key

    for key in prefetch(images, write, threads=_WRITERS, ahead=2 * _WRITERS):
        yield key
        progress(1)


def _write_if_different(uri: str, data: bytes) -> None:
    """Make `data` the object at `uri`; an identical object is not rewritten."""
    if not storage.create(uri, data) and storage.read(uri) != data:
        storage.write(uri, data)
