"""COCO's outlines as labels: drawn where they are, called what VOC calls them, refused if wrong."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from matplotlib.path import Path as Outline

from pipeline.data import coco
from pipeline.data.coco import AnnotatedImage
from tests.data.coco_set import instances, rectangle

PERSON, CAT, TV = 15, 8, 20


def drawn(*things: tuple[int, Any], number: int = 0) -> list[list[int]]:
    """The label of a photo with these (category, segmentation)."""
    named = [(number, category, segmentation) for category, segmentation in things]
    (picture,) = coco.parse(json.dumps(instances([number], named)).encode())
    return coco.draw_label(picture).tolist()


def test_a_thing_has_vocs_id_where_it_is_and_nothing_is_background() -> None:
    label = np.zeros((5, 7), dtype=int)
    label[1:3, 2:6] = TV
    label[4, 0:2] = PERSON
    other = (13, rectangle(0, 0, 5, 7))  # a stop sign, for which VOC has no class
    things = (72, rectangle(1, 2, 3, 6)), (1, rectangle(4, 0, 5, 2)), other
    assert drawn(*things) == label.tolist()


def test_every_class_of_voc_is_found_by_its_name_in_coco() -> None:
    # VOC's order, by COCO's ids: worked out by hand from the two lists
    ids = [5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72]
    for class_id, category in enumerate(ids, start=1):
        assert drawn((category, rectangle(0, 0, 5, 7))) == [[class_id] * 7] * 5


def test_two_things_of_one_class_may_overlap_but_of_two_nobody_knows_who_is_in_front() -> None:
    label = np.full((5, 7), CAT)
    label[2:, 3:] = 255
    label[2:, 5:] = PERSON
    cats = (17, rectangle(0, 0, 5, 4)), (17, rectangle(0, 2, 5, 5)), (17, rectangle(0, 4, 2, 7))
    assert drawn(*cats, (1, rectangle(2, 3, 5, 7))) == label.tolist()


def test_parts_of_one_thing_are_all_drawn() -> None:
    label = np.zeros((5, 7), dtype=int)
    label[0, 0] = label[4, 6] = CAT
    assert drawn((17, rectangle(0, 0, 1, 1) + rectangle(4, 6, 5, 7))) == label.tolist()


def test_a_crowd_is_run_lengths_down_the_columns() -> None:
    counts = [3, 4, 20, 8]
    flat = np.repeat([0, PERSON, 0, PERSON], counts)
    expected = [[int(flat[column * 5 + row]) for column in range(7)] for row in range(5)]
    assert drawn((1, {"size": [5, 7], "counts": counts})) == expected


def test_an_outline_is_filled_as_another_library_fills_it() -> None:
    generator = np.random.default_rng(7)
    for _ in range(20):
        angles = np.sort(generator.uniform(0, 2 * np.pi, 9))
        radii = generator.uniform(20, 60, 9)
        points = np.stack([80 + radii * np.cos(angles), 65 + radii * np.sin(angles)], axis=1)
        picture = AnnotatedImage(
            file_name="a", height=130, width=160, outlines=[(CAT, [points.ravel().tolist()])]
        )
        rows, columns = np.mgrid[:130, :160]
        centres = np.stack([columns.ravel() + 0.5, rows.ravel() + 0.5], axis=1)
        inside = Outline(np.vstack([points, points[:1]])).contains_points(centres)
        differ = np.count_nonzero((coco.draw_label(picture) == CAT) != inside.reshape(130, 160))
        # the two may see the pixels under the line differently, of which there are about 400
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
        [[1, 1, 4, 4]],  # pycocotools would take it for a box
        [[1, 1, 4, 1, 4]],
        [[1, 1, 4, 1, 4, 1e30]],
        [[1, 1, 4, 1, 4, float("inf")]],
        [[1, 1, 4, float("nan"), 4, 4]],
        [[-20_000, 1, 40_000, 4] * 20],  # in C, some memory for every pixel of its way
        [1, 1, 4, 1, 4, 4],
        [["a", "b", "c", "d", "e", "f"]],
        None,
        {"size": [7, 5], "counts": [35]},
        {"size": [5, 7], "counts": [30]},  # pycocotools would draw what memory held
        {"size": [5, 7], "counts": [40, -5]},
        {"size": [5, 7], "counts": "54j0"},
    ],
)
def test_a_segmentation_that_cannot_be_drawn_is_named(segmentation: Any) -> None:
    with pytest.raises(ValueError, match=r"of its annotation 0 \(000000000000.jpg\) is neither"):
        coco.parse(thing(segmentation))


def same_names(*names: str) -> bytes:
    sizes = {"height": 2, "width": 2}
    return changed(images=[{"id": i, "file_name": name} | sizes for i, name in enumerate(names)])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\xff\xd8\xff\xe0", r"is no instances_\*.json of COCO \(UnicodeDecodeError"),
        (b"[]", r"is no instances_\*.json of COCO \(TypeError"),
        (b'{"images": []}', r"is no instances_\*.json of COCO \(KeyError: 'categories'"),
        (changed(categories=[{"id": 1, "name": "person"}]), "categories lack airplane, bicycle"),
        (changed(images=[{"id": 1, "file_name": "a", "height": 10**9, "width": 3}]), "is 1000000"),
        (changed(images=[{"id": 1, "file_name": "../a", "height": 3, "width": 3}]), "no file name"),
        (thing(rectangle(0, 0, 1, 1), image_id=7), r"KeyError: 7"),
        (thing(rectangle(0, 0, 1, 1), category_id=99), r"KeyError: 99"),
        (thing(None, category_id=13, image_id=7), r"KeyError: 7"),  # a stop sign
        (changed(images=[]), "it names no image"),
        (changed(images=[{"id": 1, "file_name": "a", "height": 2, "width": 2}] * 2), "the id 1"),
        (same_names("a.jpg", "a.png"), "'a.jpg' and 'a.png' have the same path without extension"),
        (same_names("a.jpg", "a.jpg"), "keep one of them"),
        (b"[" * 100_000, "RecursionError"),
    ],
)
def test_what_is_not_cocos_is_refused_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        coco.parse(data)
