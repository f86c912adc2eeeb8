"""COCO's annotations as labels of VOC's classes: outlines of things, drawn into index masks.

Enters: the bytes of an instances_*.json. Leaves: a `Picture` for each photo, which `draw` turns
into a label. What VOC has no class for is background. Source: the paper's data, Sec. 4.2.
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

_OTHER_NAMES = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}
CLASS_IDS = {_OTHER_NAMES.get(name, name): i for i, name in enumerate(VOC.names) if i}
"""VOC's id of each of its things, by COCO's name."""

# the drawing is done in C, which trusts what it is given
_MAX_SIDE = 20_000
_MAX_WAY = 100  # how long a polygon may be, in times the picture's height and width

_WRONG = (
    *(KeyError, TypeError, OverflowError, RecursionError),
    *(UnicodeDecodeError, json.JSONDecodeError),
)

Segmentation = Sequence[Sequence[float]] | Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class AnnotatedImage:
    """A photo that was annotated: its file's name, its size in px, what VOC names in it.

    `outlines` has (class id, polygons or uncompressed run lengths) of each thing.
    """

    file_name: str
    height: int
    width: int
    outlines: list[tuple[int, Segmentation]] = field(default_factory=list)


def parse(data: bytes) -> list[AnnotatedImage]:
    """The pictures of an instances_*.json in the order of their names, those without things too.

    Raises ValueError where `data` is no such file, lacks one of VOC's classes, has two pictures
    of one id or one name, or a thing that is of no picture or cannot be drawn.
    """
    try:
        values = json.loads(data)
        classes = _classes(values["categories"])
        pictures: dict[int, AnnotatedImage] = {}
        for image in values["images"]:
            if image["id"] in pictures:
                raise ValueError(f"two of its images have the id {image['id']}")
            pictures[image["id"]] = _picture(image)
        for thing in values["annotations"]:
            picture, class_id = pictures[thing["image_id"]], classes[thing["category_id"]]
            if class_id is not None:
                picture.outlines.append((class_id, _outline(thing, picture)))
    except _WRONG as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"it is no instances_*.json of COCO ({what:.200})") from None
    if not pictures:
        raise ValueError("it names no image")
    # labels are named like their pictures, but for the ending
    index_by_stem((picture.file_name, picture.file_name) for picture in pictures.values())
    return sorted(pictures.values(), key=lambda picture: picture.file_name)


def draw_label(picture: AnnotatedImage) -> Pixels:
    """The label (h, w) uint8: VOC's class ids, 0 where nothing is outlined.

    It is ignore_index where things of two classes lie over each other: COCO does not say which
    of them is in front. A crowd is an outline like any other.
    """
    height, width = picture.height, picture.width
    label = np.zeros((height, width), dtype=np.uint8)
    for class_id in sorted({class_id for class_id, _ in picture.outlines}):
        mine = (outline for of, outline in picture.outlines if of == class_id)
        here = rle.decode(rle.merge(_runs(mine, height, width))).astype(bool)
        label[here] = np.where(label[here] == 0, class_id, VOC.ignore_index)
    return label


def _classes(categories: Iterable[Mapping[str, Any]]) -> dict[int, int | None]:
    """COCO's ids -> VOC's, None where VOC has no such class."""
    found = {int(each["id"]): CLASS_IDS.get(each["name"]) for each in categories}
    missing = sorted(CLASS_IDS.keys() - {each["name"] for each in categories})
    if missing:
        raise ValueError(f"its categories lack {', '.join(missing)}: they are not COCO's")
    return found


def _picture(image: Mapping[str, Any]) -> AnnotatedImage:
    name, height, width = image["file_name"], image["height"], image["width"]
    if not all(type(side) is int and 0 < side <= _MAX_SIDE for side in (height, width)):
        raise ValueError(f"its image {name!r:.100} is {height} x {width} (height x width)")
    if not isinstance(name, str) or "/" in name or name in ("", ".", ".."):
        raise ValueError(f"its image {image['id']} is called {name!r:.100}, which is no file name")
    return AnnotatedImage(file_name=name, height=height, width=width)


def _outline(thing: Mapping[str, Any], picture: AnnotatedImage) -> Segmentation:
    """The segmentation of an annotation, once it is known to be safe to draw."""
    outline = thing.get("segmentation")
    if not (_are_runs(outline, picture) or _are_polygons(outline, picture)):
        raise ValueError(
            f"the segmentation of its annotation {thing.get('id')} ({picture.file_name}) is "
            "neither polygons of three points or more nor run lengths of the image's size; mend "
            "it, or take it out"
        )
    found: Segmentation = thing["segmentation"]
    return found


def _are_runs(outline: Any, picture: AnnotatedImage) -> bool:
    if not isinstance(outline, dict):
        return False
    counts = outline.get("counts")
    return (
        outline.get("size") == [picture.height, picture.width]
        and isinstance(counts, list)
        and all(type(count) is int and count >= 0 for count in counts)
        and sum(counts) == picture.height * picture.width
    )


def _are_polygons(outline: Any, picture: AnnotatedImage) -> bool:
    return (
        isinstance(outline, list)
        and bool(outline)
        and all(_is_polygon(each, picture) for each in outline)
    )


def _is_polygon(values: Any, picture: AnnotatedImage) -> bool:
    """Whether it is x, y, x, y, ... of three points or more around about the picture."""
    if not isinstance(values, list) or len(values) < 6 or len(values) % 2:
        return False
    if not all(isinstance(value, int | float) for value in values):
        return False
    points = np.array(values, dtype=np.float64).reshape(-1, 2)
    if not (np.abs(points) <= 2 * _MAX_SIDE).all():  # no NaN is
        return False
    way = np.abs(np.diff(points, axis=0, append=points[:1])).sum()
    return bool(way <= _MAX_WAY * (picture.height + picture.width))


def _runs(outlines: Iterable[Segmentation], height: int, width: int) -> list[Any]:
    """Outlines as what pycocotools merges; several polygons are parts of one thing."""
    found: list[Any] = []
    for outline in outlines:
        runs = rle.frPyObjects(outline, height, width)
        found.extend(runs if isinstance(runs, list) else [runs])
    return found
