"""A COCO data set of a few tiny generated images."""

from __future__ import annotations

import json
from typing import Any

from tests.data.tiny_datasets import SIZES, image_file

CATEGORIES = {
    1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train",
    9: "boat", 13: "stop sign", 16: "bird", 17: "cat", 18: "dog", 19: "horse", 20: "sheep",
    21: "cow", 44: "bottle", 62: "chair", 63: "couch", 64: "potted plant", 67: "dining table",
    72: "tv",
}  # fmt: skip

Json = dict[str, Any]


def rectangle(top: int, left: int, bottom: int, right: int) -> list[list[float]]:
    """Return a polygon around rows [top, bottom) and columns [left, right)."""
    return [[left, top, right, top, right, bottom, left, bottom]]


def instances(numbers: list[int], things: list[tuple[int, int, Any]]) -> Json:
    """Return instances_*.json for images `numbers`; things are (number, category, segmentation)."""
    return {
        "info": {"year": 2017},
        "licenses": [],
        "categories": [{"id": i, "name": name} for i, name in CATEGORIES.items()],
        "images": [
            {"id": 100 + n, "file_name": f"{n:012d}.jpg", "height": h, "width": w, "license": 1}
            for n, (h, w) in ((n, SIZES[n % len(SIZES)]) for n in numbers)
        ],
        "annotations": [
            {
                "id": i,
                "image_id": 100 + number,
                "category_id": category,
                "segmentation": segmentation,
                "iscrowd": int(isinstance(segmentation, dict)),
            }
            for i, (number, category, segmentation) in enumerate(things)
        ],
    }


def coco_files(**splits: Json) -> dict[str, bytes | str]:
    """Return the files of a COCO with these annotations: train2017=..., val2017=..."""
    files: dict[str, bytes | str] = {}
    for folder, values in splits.items():
        files[f"annotations/instances_{folder}.json"] = json.dumps(values)
        for image in values["images"]:
            files[f"{folder}/{image['file_name']}"] = image_file(image["id"] - 100)
    return files
