"""COCO annotations are drawn as labels with VOC's class ids, and malformed ones are refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from matplotlib.path import Path as Outline

from pipeline.data import coco
from pipeline.data.coco import AnnotatedImage
from tests.data.tiny_coco import instances, rectangle

PERSON, CAT, TV = 15, 8, 20


def drawn(*things: tuple[int, Any], number: int = 0) -> list[list[int]]:
    """Return the label of an image with these (category, segmentation)."""
    named = [(number, category, segmentation) for category, segmentation in things]
    (image,) = coco.parse(json.dumps(instances([number], named)).encode())
    return coco.draw_label(image).tolist()


def test_annotations_get_voc_ids_and_all_other_pixels_are_background() -> None:
    label = np.zeros((5, 7), dtype=int)
    label[1:3, 2:6] = TV
    label[4, 0:2] = PERSON
    other = (13, rectangle(0, 0, 5, 7))  # a stop sign: VOC has no class for it
    things = (72, rectangle(1, 2, 3, 6)), (1, rectangle(4, 0, 5, 2)), other
    assert drawn(*things) == label.tolist()


def test_every_voc_class_is_mapped_from_its_coco_category() -> None:
    # COCO ids in VOC's order, worked out by hand from the two lists
    ids = [5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72]
    for class_id, category in enumerate(ids, start=1):
        assert drawn((category, rectangle(0, 0, 5, 7))) == [[class_id] * 7] * 5


def test_overlaps_of_one_class_are_kept_and_of_two_classes_ignored() -> None:
    label = np.full((5, 7), CAT)
    label[2:, 3:] = 255
    label[2:, 5:] = PERSON
    cats = (17, rectangle(0, 0, 5, 4)), (17, rectangle(0, 2, 5, 5)), (17, rectangle(0, 4, 2, 7))
    assert drawn(*cats, (1, rectangle(2, 3, 5, 7))) == label.tolist()


def test_all_polygons_of_an_annotation_are_drawn() -> None:
    label = np.zeros((5, 7), dtype=int)
    label[0, 0] = label[4, 6] = CAT
    assert drawn((17, rectangle(0, 0, 1, 1) + rectangle(4, 6, 5, 7))) == label.tolist()


def test_run_lengths_of_a_crowd_go_down_the_columns() -> None:
    counts = [3, 4, 20, 8]
    flat = np.repeat([0, PERSON, 0, PERSON], counts)
    expected = [[int(flat[column * 5 + row]) for column in range(7)] for row in range(5)]
    assert drawn((1, {"size": [5, 7], "counts": counts})) == expected


def test_polygons_are_filled_as_by_matplotlib() -> None:
    generator = np.random.default_rng(7)
    for _ in range(20):
        angles = np.sort(generator.uniform(0, 2 * np.pi, 9))
        radii = generator.uniform(20, 60, 9)
        points = np.stack([80 + radii * np.cos(angles), 65 + radii * np.sin(angles)], axis=1)
        image = AnnotatedImage(
            file_name="a", height=130, width=160, annotations=[(CAT, [points.ravel().tolist()])]
        )
        rows, columns = np.mgrid[:130, :160]
        centers = np.stack([columns.ravel() + 0.5, rows.ravel() + 0.5], axis=1)
        inside = Outline(np.vstack([points, points[:1]])).contains_points(centers)
        differ = np.count_nonzero((coco.draw_label(image) == CAT) != inside.reshape(130, 160))
        # the two may disagree on the pixels under the outline, about 400
        assert differ < 0.5 * np.hypot(*np.diff(points, axis=0, append=points[:1]).T).sum()
        assert inside.sum() > 2000


def changed(**values: Any) -> bytes:
    return json.dumps(instances([0], []) | values).encode()


def thing(segmentation: Any, **values: Any) -> bytes:
    made = instances([0], [(0, 1, segmentation)])
    made["annotations"][0] |= values
    return json.dumps(made).encode()


@pytest.mark.parametrize(
    "segmentation",
    [
        [],
        [[1, 1, 4, 4]],  # pycocotools would take this for a box
        [[1, 1, 4, 1, 4]],
        [[1, 1, 4, 1, 4, 1e30]],
        [[1, 1, 4, 1, 4, float("inf")]],
        [[1, 1, 4, float("nan"), 4, 4]],
        [[-20_000, 1, 40_000, 4] * 20],  # pycocotools allocates memory for each pixel of it
        [1, 1, 4, 1, 4, 4],
        [["a", "b", "c", "d", "e", "f"]],
        None,
        {"size": [7, 5], "counts": [35]},
        {"size": [5, 7], "counts": [30]},  # pycocotools would read uninitialized memory
        {"size": [5, 7], "counts": [40, -5]},
        {"size": [5, 7], "counts": "54j0"},
    ],
)
def test_a_segmentation_that_is_unsafe_to_draw_is_refused_by_name(segmentation: Any) -> None:
    with pytest.raises(ValueError, match=r"of annotation 0 \(000000000000.jpg\) must be"):
        coco.parse(thing(segmentation))


def same_names(*names: str) -> bytes:
    sizes = {"height": 2, "width": 2}
    return changed(images=[{"id": i, "file_name": name} | sizes for i, name in enumerate(names)])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\xff\xd8\xff\xe0", r"not a COCO instances_\*.json file \(UnicodeDecodeError"),
        (b"[]", r"not a COCO instances_\*.json file \(TypeError"),
        (b'{"images": []}', r"not a COCO instances_\*.json file \(KeyError: 'categories'"),
        (changed(categories=[{"id": 1, "name": "person"}]), "categories lack airplane, bicycle"),
        (changed(images=[{"id": 1, "file_name": "a", "height": 10**9, "width": 3}]), "is 1000000"),
        (
            changed(images=[{"id": 1, "file_name": "../a", "height": 3, "width": 3}]),
            "not a file name",
        ),
        (thing(rectangle(0, 0, 1, 1), image_id=7), r"KeyError: 7"),
        (thing(rectangle(0, 0, 1, 1), category_id=99), r"KeyError: 99"),
        (thing(None, category_id=13, image_id=7), r"KeyError: 7"),  # a stop sign
        (changed(images=[]), "lists no images"),
        (changed(images=[{"id": 1, "file_name": "a", "height": 2, "width": 2}] * 2), "the id 1"),
        (same_names("a.jpg", "a.png"), "'a.jpg' and 'a.png' have the same path without extension"),
        (same_names("a.jpg", "a.jpg"), "keep one of them"),
        (b"[" * 100_000, "RecursionError"),
    ],
)
def test_other_json_files_are_refused_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        coco.parse(data)
