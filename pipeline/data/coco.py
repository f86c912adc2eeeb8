"""COCO annotations as labels with VOC's classes: outlines of things, drawn into masks of class ids.

Categories that VOC does not have become background. Source: arXiv 1706.05587, Sec. 4.2.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pycocotools.mask as rle

from pipeline.data.images import Pixels
from pipeline.data.labels import VOC
from pipeline.data.pairs import index_by_stem

_COCO_NAMES = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}
CLASS_IDS = {_COCO_NAMES.get(name, name): i for i, name in enumerate(VOC.names) if i}
"""VOC class id by COCO category name."""

# pycocotools draws in C and does not check its input
_MAX_SIDE = 20_000
_MAX_PERIMETER = 100  # of a polygon, in multiples of the image's height + width

_PARSE_ERRORS = (
    *(KeyError, TypeError, OverflowError, RecursionError),
    *(UnicodeDecodeError, json.JSONDecodeError),
)

Segmentation = Sequence[Sequence[float]] | Mapping[str, Any]
"""COCO's two forms: polygons, or uncompressed run lengths."""


@dataclass(frozen=True, kw_only=True)
class AnnotatedImage:
    """An annotated image: file name, size in px, and its annotations of VOC's classes.

    `annotations` has (class id, segmentation).
    """

    file_name: str
    height: int
    width: int
    annotations: list[tuple[int, Segmentation]] = field(default_factory=list)


def parse(data: bytes) -> list[AnnotatedImage]:
    """Return the images of an instances_*.json by file name, including those without annotations.

    Raises ValueError if `data` is not such a file, if a class of VOC is missing, if two images
    share an id or a name, or if an annotation belongs to no image or cannot be drawn.
    """
    try:
        values = json.loads(data)
        classes = _class_ids(values["categories"])
        images: dict[int, AnnotatedImage] = {}
        for entry in values["images"]:
            if entry["id"] in images:
                raise ValueError(f"two images have the id {entry['id']}")
            images[entry["id"]] = _parse_image(entry)
        for annotation in values["annotations"]:
            image = images[annotation["image_id"]]
            class_id = classes[annotation["category_id"]]
            if class_id is not None:
                image.annotations.append((class_id, _parse_segmentation(annotation, image)))
    except _PARSE_ERRORS as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"not a COCO instances_*.json file ({what:.200})") from None
    if not images:
        raise ValueError("the file lists no images")
    # a label is named like its image, except for the extension
    index_by_stem((image.file_name, image.file_name) for image in images.values())
    return sorted(images.values(), key=lambda image: image.file_name)


def draw_label(image: AnnotatedImage) -> Pixels:
    """Return the label (h, w) uint8: VOC class ids, 0 outside all outlines.

    Pixels where things of two classes overlap are ignore_index: COCO does not say which one is in
    front. A crowd is drawn like any other annotation.
    """
    height, width = image.height, image.width
    label = np.zeros((height, width), dtype=np.uint8)
    for class_id in sorted({class_id for class_id, _ in image.annotations}):
        segmentations = (each for of, each in image.annotations if of == class_id)
        runs = _run_lengths(segmentations, height, width)
        inside = rle.decode(rle.merge(runs)).astype(bool)
        label[inside] = np.where(label[inside] == 0, class_id, VOC.ignore_index)
    return label


def _class_ids(categories: Iterable[Mapping[str, Any]]) -> dict[int, int | None]:
    """Return VOC's class id by COCO category id, None for categories that VOC does not have."""
    found = {int(each["id"]): CLASS_IDS.get(each["name"]) for each in categories}
    missing = sorted(CLASS_IDS.keys() - {each["name"] for each in categories})
    if missing:
        raise ValueError(f"the categories lack {', '.join(missing)}; they are not COCO's")
    return found


def _parse_image(entry: Mapping[str, Any]) -> AnnotatedImage:
    name, height, width = entry["file_name"], entry["height"], entry["width"]
    if not all(type(side) is int and 0 < side <= _MAX_SIDE for side in (height, width)):
        raise ValueError(
            f"image {name!r:.100} is {height} x {width} (height x width); sides must be integers "
            f"from 1 to {_MAX_SIDE}"
        )
    if not isinstance(name, str) or "/" in name or name in ("", ".", ".."):
        raise ValueError(f"file_name of image {entry['id']} is {name!r:.100}, not a file name")
    return AnnotatedImage(file_name=name, height=height, width=width)


def _parse_segmentation(annotation: Mapping[str, Any], image: AnnotatedImage) -> Segmentation:
    """Return an annotation's segmentation. Raises ValueError if it is not safe to draw."""
    segmentation = annotation.get("segmentation")
    if not (_are_run_lengths(segmentation, image) or _are_polygons(segmentation, image)):
        raise ValueError(
            f"the segmentation of annotation {annotation.get('id')} ({image.file_name}) must be "
            "polygons of at least three points or run lengths of the image's size; fix or remove it"
        )
    found: Segmentation = annotation["segmentation"]
    return found


def _are_run_lengths(segmentation: Any, image: AnnotatedImage) -> bool:
    if not isinstance(segmentation, dict):
        return False
    counts = segmentation.get("counts")
    return (
        segmentation.get("size") == [image.height, image.width]
        and isinstance(counts, list)
        and all(type(count) is int and count >= 0 for count in counts)
        and sum(counts) == image.height * image.width
    )


def _are_polygons(segmentation: Any, image: AnnotatedImage) -> bool:
    return (
        isinstance(segmentation, list)
        and bool(segmentation)
        and all(_is_polygon(each, image) for each in segmentation)
    )


def _is_polygon(values: Any, image: AnnotatedImage) -> bool:
    """Return whether `values` is x, y, x, y, ... of at least three points on or near the image."""
    if not isinstance(values, list) or len(values) < 6 or len(values) % 2:
        return False
    if not all(isinstance(value, int | float) for value in values):
        return False
    points = np.array(values, dtype=np.float64).reshape(-1, 2)
    if not (np.abs(points) <= 2 * _MAX_SIDE).all():  # also false for NaN
        return False
    perimeter = np.abs(np.diff(points, axis=0, append=points[:1])).sum()
    return bool(perimeter <= _MAX_PERIMETER * (image.height + image.width))


def _run_lengths(segmentations: Iterable[Segmentation], height: int, width: int) -> list[Any]:
    """Return the segmentations in pycocotools' form; polygons of one thing are separate items."""
    found: list[Any] = []
    for segmentation in segmentations:
        runs = rle.frPyObjects(segmentation, height, width)
        found.extend(runs if isinstance(runs, list) else [runs])
    return found
