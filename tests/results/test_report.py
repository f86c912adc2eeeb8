"""Reports: numbers match a plain loop, and pictures show the images as they were segmented."""

from __future__ import annotations

import io
import re
from collections import Counter
from dataclasses import replace
from hashlib import md5
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.data import masks, storage
from pipeline.data.labels import VOC
from pipeline.results import page, report
from pipeline.results.report import BINS, Report
from tests.results.synthetic_runs import Row, image_row, write_run

HOSTILE = "<script>alert('x')</script>\"&amp;.png"


def stored(uri: str, data: bytes) -> storage.Object:
    storage.write(uri, data)
    found = storage.stat_object(uri)
    assert found is not None
    return found


def png(color: tuple[int, int, int], height: int = 40, width: int = 60) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), color).save(buffer, "PNG")
    return buffer.getvalue()


def row(
    prefix: str, name: str, number: int, *, label: bool = False, shard: int = 0, run: str = "a"
) -> Row:
    """Return the row of a 40 x 60 image with class `number` in 10 * number columns of the mask.

    The label has it in 20 columns, and class 8, which no mask has, in the rest.
    """
    image = stored(f"{prefix}/images/{name}", png((255, 255, 255)))
    mask, wanted = np.zeros((40, 60), np.uint8), np.full((40, 60), 8, np.uint8)
    mask[:, : 10 * number] = wanted[:, :20] = number
    values: Row = {}
    if label:
        item = stored(f"{prefix}/labels/{name}", masks.encode(wanted))
        values |= {"label_uri": item.uri, "label_etag": item.etag}
    found = []
    for class_id in {0, number, *([8] if label else [])}:
        here, there = mask == class_id, wanted == class_id
        pixels = int(here.sum())
        found.append(
            {"class_id": class_id, "class_name": VOC.names[class_id], "pixels": pixels}
            | {"fraction": pixels / 2400, "confidence": 0.5 + number / 20 if pixels else None}
            | {"tp": int((here & there).sum()) if label else None}
            | {"fp": int((here & ~there).sum()) if label else None}
            | {"fn": int((~here & there).sum()) if label else None}
        )
    made = image_row(image.uri, run, etag=image.etag, shard=shard, classes=found, **values)
    made |= {"height": 40, "width": 60, "mask": masks.encode(mask)}
    return made | {"confidence": 0.3 + number / 20}


def error(prefix: str, name: str, kind: str, why: str = "it is cut off") -> Row:
    uri = f"{prefix}/images/{name}"
    return image_row(uri, "a", status="error", error_kind=kind, error=why, classes=None)


def results_of(prefix: str, *, finished: bool = True, name: str = "{}.png") -> list[Row]:
    """Write a run of two shards: five images, three with good labels, and three errors.

    Beside it are a run whose name starts alike and a file that is not part of a run.
    """
    first = [row(prefix, name.format(i), i, label=i != 2) for i in (1, 2)]
    first += [error(prefix, name.format(f"e{i}"), "truncated") for i in (1, 2)]
    second = [row(prefix, name.format(i), i, label=True, shard=1) for i in (3, 5)]
    second.append(error(prefix, name.format("e3"), "empty"))
    bad = {"label_uri": f"{prefix}/labels/no", "label_etag": "e", "label_error": "it is RGB"}
    second.append(row(prefix, name.format(4), 4, shard=1) | bad)
    results = f"{prefix}/results"
    write_run(results, "ab", [[row(prefix, name.format(7), 6, label=True, run="ab")]], hour=-1)
    storage.write(f"{results}/images/run=a/README.txt", b"mine")
    return write_run(results, "a", [first, second], finished=finished)


def made(prefix: str, images: int = 12) -> Report:
    return report.build_report(f"{prefix}/results", "a", images=images)


@pytest.mark.parametrize("finished", [True, False])
def test_the_numbers_match_a_plain_loop(prefix: str, finished: bool) -> None:
    rows = results_of(prefix, finished=finished)
    found = made(prefix)
    ok = [each for each in rows if each["status"] == "ok"]
    assert (found.ok, found.errors, found.labeled) == (5, 3, 3)
    assert (found.record is not None) == finished

    by_class: dict[str, list[dict[str, Any]]] = {}
    for each in ok:
        for of_class in each["classes"]:
            by_class.setdefault(of_class["class_name"], []).append(of_class)
    assert {each.name for each in found.classes} == by_class.keys()
    ious = []
    for shown in found.classes:
        mine = by_class[shown.name]
        pixels = sum(each["pixels"] for each in mine)
        assert shown.images == sum(each["pixels"] > 0 for each in mine)
        assert shown.share == pytest.approx(pixels / (5 * 2400))
        if pixels:
            sure = sum(each["confidence"] * each["pixels"] for each in mine if each["pixels"])
            assert shown.confidence == pytest.approx(sure / pixels, rel=1e-6)
        labeled = [each for each in mine if each["tp"] is not None]
        union = sum(each["tp"] + each["fp"] + each["fn"] for each in labeled)
        iou = sum(each["tp"] for each in labeled) / union if union else None
        assert shown.iou == (pytest.approx(iou) if iou is not None else None)
        ious += [iou] if iou is not None else []
    assert found.mean_iou == pytest.approx(sum(ious) / len(ious))

    bins = Counter(int(each["confidence"] * BINS + 1e-6) for each in ok)
    assert {i: count for i, count in enumerate(found.confidence) if count} == bins
    kinds = [("truncated", 2), ("empty", 1), ("label", 1)]
    assert [(each.kind, each.images) for each in found.error_kinds] == kinds
    assert found.error_kinds[0].examples[0] == (f"{prefix}/images/e1.png", "it is cut off")
    assert found.error_kinds[2].examples == ((f"{prefix}/labels/no", "it is RGB"),)


def digest(text: str) -> bytes:
    return md5(text.encode()).digest()


def test_a_large_run_shows_its_lowest_confidence_and_accuracy(prefix: str) -> None:
    results_of(prefix)
    groups = {group.title: group.images for group in made(prefix, images=3).groups}
    names = {title: [each.uri[-5] for each in images] for title, images in groups.items()}
    assert names["Lowest confidence"] == ["1", "2", "3"]
    assert names["Lowest pixel accuracy"] == ["1", "3", "5"]
    accuracies = [each.pixel_accuracy for each in groups["Lowest pixel accuracy"]]
    assert accuracies == [pytest.approx(10 / 60), pytest.approx(20 / 60), pytest.approx(20 / 60)]
    by_digest = sorted(
        "12345", key=lambda name: md5(f"{prefix}/images/{name}.png".encode()).digest()
    )
    assert names["Random sample"] == by_digest[:3]
    assert len(groups) == 3
    (whole_run,) = made(prefix, images=5).groups
    assert [each.uri[-5] for each in whole_run.images] == ["1", "2", "3", "4", "5"]
    assert not made(prefix, images=0).groups


def test_the_mask_is_drawn_over_the_image(prefix: str) -> None:
    results_of(prefix)
    (group,) = made(prefix).groups
    image = group.images[-1]
    assert list(image.pictures) == ["image", "label", "mask"]
    assert image.note == ""
    assert image.classes[0] == (VOC.names[5], VOC.palette[5], pytest.approx(5 / 6))
    drawn = np.asarray(Image.open(io.BytesIO(image.pictures["mask"]))).astype(int)
    assert drawn.shape == (40, 60, 3)
    over = [round(0.6 * part + 0.4 * 255) for part in VOC.palette[5]]
    assert np.abs(drawn[20, 20] - over).max() < 12  # JPEG
    assert np.abs(drawn[20, 56] - [102] * 3).max() < 12  # black background over white


def test_a_large_image_is_shrunk_without_inventing_classes(tmp_path: Path) -> None:
    image = stored(str(tmp_path / "large.png"), png((255, 255, 255), 800, 1200))
    mask = np.zeros((800, 1200), np.uint8)
    mask[:, ::2] = 12  # interpolating to the background would give 6, the only green one
    classes = [
        {"class_id": i, "class_name": VOC.names[i], "pixels": 480_000}
        | {"fraction": 0.5, "confidence": 0.9}
        for i in (0, 12)
    ]
    large = image_row(image.uri, "a", etag=image.etag, classes=classes)
    large |= {"height": 800, "width": 1200, "mask": masks.encode(mask)}
    write_run(f"{tmp_path}/results", "a", [[large]])
    (group,) = made(str(tmp_path)).groups
    drawn = np.asarray(Image.open(io.BytesIO(group.images[0].pictures["mask"])))
    assert drawn.shape == (240, 360, 3)
    assert drawn[..., 1].mean() < 105


def test_a_deleted_or_replaced_image_is_left_out_but_its_mask_is_shown(prefix: str) -> None:
    results_of(prefix)
    storage.delete([f"{prefix}/images/1.png"])
    storage.write(f"{prefix}/images/2.png", png((255, 0, 0), 41, 61))
    storage.write(f"{prefix}/labels/3.png", masks.encode(np.zeros((40, 60), np.uint8)))
    (group,) = made(prefix).groups
    shown = (["label", "mask"], ["mask"], ["image", "mask"], ["image", "mask"])
    assert [list(image.pictures) for image in group.images[:4]] == list(shown)
    for image, what in zip(group.images[:3], ("image", "image", "label"), strict=True):
        assert image.note.startswith(f"the {what} cannot be read: ")
    assert [image.note for image in group.images[3:]] == ["", ""]


def test_a_corrupt_mask_is_noted_and_the_others_are_shown(prefix: str) -> None:
    rows = [row(prefix, f"{i}.png", i) for i in (1, 2, 3)]
    rows[0]["mask"] = b"\x89PNG\0"
    rows[1]["mask"] = masks.encode(np.full((40, 60), 200, np.uint8))
    write_run(f"{prefix}/results", "a", [rows])
    (group,) = made(prefix).groups
    assert [list(image.pictures) for image in group.images] == [["image"]] * 2 + [["image", "mask"]]
    assert "mask holds class 200" in group.images[1].note


class Elements(HTMLParser):
    """The names, attributes and text of a page's elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.text += " "
        self.names[tag] += 1
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def test_text_from_a_bucket_is_never_html(tmp_path: Path) -> None:
    prefix = str(tmp_path / "<img src=x onerror=alert(1)>")
    results_of(prefix, name="{}" + HOSTILE.replace("/", "_"))
    found = Elements(page.render_html(made(prefix)).decode())
    known = "html head meta title style body h1 h2 table tr th td span br div figure img figcaption"
    assert found.names.keys() <= set(known.split())
    assert found.names["img"] == 5 + 3 + 5  # images, labels, masks
    assert "onerror" not in found.attributes
    assert f"{prefix}/images/e1{HOSTILE.replace('/', '_')}" in found.text


def test_control_characters_are_escaped(tmp_path: Path) -> None:
    results_of(str(tmp_path), name="{}\x1b\u202egnp.png")
    text = page.render_html(made(str(tmp_path))).decode()
    assert "5\\x1b\\u202egnp.png" in text
    assert not set(text) & set("\x1b\u202e")


def test_the_page_shows_the_results_of_a_run(prefix: str) -> None:
    results_of(prefix, finished=False)
    found = page.render_html(made(prefix)).decode()
    text = " ".join(Elements(found).text.split())
    assert "Run a" in text
    assert "5 segmented, 3 errors" in text
    # IoU of classes 1, 3 and 5: 1/2, 2/3 and 2/5; of 0 and 8: 0
    assert "labeled images 3 mean IoU 31.3%" in text
    assert f"{VOC.names[3]} 1 10.00% 0.65 66.7%" in text
    assert "unfinished" in text
    assert "truncated 2 " in text
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in found


def test_bars_are_as_wide_as_their_values(prefix: str) -> None:
    results_of(prefix)
    found = replace(made(prefix), confidence=(0,) * (BINS - 3) + (1, 0, 4))
    share, iou = found.classes[0].share, found.classes[0].iou
    assert iou is not None
    text = page.render_html(found).decode()
    widths = [float(each) for each in re.findall(r'class="bar" style="width:([0-9.]+)rem', text)]
    assert widths[:2] == [pytest.approx(12 * share, abs=0.01), pytest.approx(12 * iou, abs=0.01)]
    assert widths[-3:] == [3.0, 0.0, 12.0]


def test_confidence_1_is_in_the_last_bin(prefix: str) -> None:
    rows = [row(prefix, f"{i}.png", i) | {"confidence": at} for i, at in ((1, 1.0), (2, 0.97))]
    write_run(f"{prefix}/results", "a", [rows])
    assert made(prefix).confidence == (0,) * (BINS - 1) + (2,)


def test_the_page_of_a_finished_run_shows_its_cost(prefix: str) -> None:
    results_of(prefix)
    record = {"images_per_second": 12.34, "gpu_seconds": 5400.0, "cost": 3.5}
    found = made(prefix)
    found = replace(found, record={**(found.record or {}), **record})
    text = " ".join(Elements(page.render_html(found).decode()).text.split())
    assert "started 2026-01-01 12:00 UTC" in text
    assert "speed 12.3 images per second" in text
    assert "GPU hours 1.50, cost 3.50" in text


def test_the_newest_run_is_the_last_started_of_the_finished_ones(prefix: str) -> None:
    results = f"{prefix}/results"
    write_run(results, "b", hour=2)
    write_run(results, "c", hour=1, hours=8)
    write_run(results, "d", hour=3, finished=False)
    assert report.newest_run(results) == "b"
    write_run(results, "e", [], hour=4)  # a night without new images
    assert report.newest_run(results) == "b"
    with pytest.raises(LookupError, match=r"run e has no images at .*: it found nothing new"):
        report.build_report(results, "e", images=1)
    with pytest.raises(LookupError, match=r"run z has no images at .*does not exist"):
        report.build_report(results, "z", images=1)
    with pytest.raises(ValueError, match=r"run id '../a': must be"):
        report.build_report(results, "../a", images=1)
