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

_MAX_SIDE = 20_000  # the drawing is done in C, which trusts what it is given

Outline = Sequence[Sequence[float]] | Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A photo that was annotated: its file's name, its size in px, what VOC names in it.

    `outlines` has (class id, polygons or uncompressed run lengths) of each thing.
    """

    file_name: str
    height: int
    width: int
    outlines: list[tuple[int, Outline]] = field(default_factory=list)


def parse(data: bytes) -> list[Picture]:
    """The pictures of an instances_*.json in the order of their names, those without things too.

    Raises ValueError where `data` is no such file, lacks one of VOC's classes, or names what it
    does not describe.
    """
    try:
        values = json.loads(data)
        classes = _classes(values["categories"])
        pictures = {int(image["id"]): _picture(image) for image in values["images"]}
        for thing in values["annotations"]:
            class_id = classes[thing["category_id"]]
            if class_id is not None:
                pictures[thing["image_id"]].outlines.append((class_id, _outline(thing, pictures)))
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"it is no instances_*.json of COCO ({what:.200})") from None
    return sorted(pictures.values(), key=lambda picture: picture.file_name)


def draw(picture: Picture) -> Pixels:
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


def _picture(image: Mapping[str, Any]) -> Picture:
    name, height, width = image["file_name"], image["height"], image["width"]
    sides = (height, width)
    if not all(isinstance(side, int) and 0 < side <= _MAX_SIDE for side in sides):
        raise ValueError(f"its image {name!r:.100} is {height} x {width} (height x width)")
    if not isinstance(name, str) or "/" in name or name in ("", ".", ".."):
        raise ValueError(f"its image {image['id']} is called {name!r:.100}, which is no file name")
    return Picture(file_name=name, height=height, width=width)


def _outline(thing: Mapping[str, Any], pictures: Mapping[int, Picture]) -> Outline:
    """The segmentation of an annotation, once it is known to be safe to draw."""
    outline, picture = thing["segmentation"], pictures[thing["image_id"]]
    ok = _are_runs(outline, picture) if isinstance(outline, dict) else _are_polygons(outline)
    if not ok:
        raise ValueError(
            f"the segmentation of its annotation {thing.get('id')} ({picture.file_name}) is "
            "neither polygons of three points or more nor run lengths of the image's size; mend "
            "it, or take it out"
        )
    found: Outline = outline
    return found


def _are_runs(outline: Mapping[str, Any], picture: Picture) -> bool:
    size, counts = outline["size"], outline["counts"]
    return (
        size == [picture.height, picture.width]
        and isinstance(counts, list)
        and all(isinstance(count, int) and count >= 0 for count in counts)
        and sum(counts) == picture.height * picture.width
    )


def _are_polygons(outline: Any) -> bool:
    return bool(outline) and all(
        len(polygon) >= 6
        and len(polygon) % 2 == 0
        and min(polygon) >= -_MAX_SIDE
        and max(polygon) <= 2 * _MAX_SIDE
        for polygon in outline
    )


def _runs(outlines: Iterable[Outline], height: int, width: int) -> list[Any]:
    """Outlines as what pycocotools merges; several polygons are parts of one thing."""
    found: list[Any] = []
    for outline in outlines:
        runs = rle.frPyObjects(outline, height, width)
        found.extend(runs if isinstance(runs, list) else [runs])
    return found
