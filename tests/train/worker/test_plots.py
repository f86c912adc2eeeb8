"""Plots of a run, and its TensorBoard file decoded without TensorBoard."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from pipeline.data.labels import VOC
from pipeline.evaluation.score import Score
from pipeline.train.worker import plots
from pipeline.train.worker.history import History, Step

NAMES = ("ground", "traffic light", "never")
HISTORY = History(
    steps=[Step(10 * i, 1e9 + i / 4, 3.0 / i, 0.01 / i, 30.0 + i, 0.125) for i in range(1, 40)],
    scores=[
        Score(200, 1e9 + 60.5, 0.25, 0.75, (0.25, 0.5, None)),
        Score(390, 1e9 + 90.5, 0.5, 0.875, (0.5, 0.75, 0.0)),
    ],
)


def opened(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    assert image.format == "PNG"
    return np.array(image.convert("RGB"))


def has_color(pixels: np.ndarray, color: tuple[int, ...]) -> bool:
    return bool((pixels == color).all(axis=2).sum() >= 100)


def crc32c(data: bytes) -> int:
    """Return the CRC-32C (Castagnoli) of `data`, computed bit by bit."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
    """Return the masked checksum of a TFRecord."""
    value = crc32c(data)
    return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF


def records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a TFRecord file after checking their checksums."""
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        body = data[12 : 12 + length]
        assert struct.unpack("<I", data[8:12]) == (masked(data[:8]),)
        assert struct.unpack("<I", data[12 + length : 16 + length]) == (masked(body),)
        yield body
        data = data[16 + length :]


def varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the variable-length integer at `at` and the offset behind it."""
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at


def message(data: bytes) -> list[tuple[int, bytes | int]]:
    """Return the (field, value) pairs of a protocol buffer; values are bytes or integers."""
    at, found = 0, []
    while at < len(data):
        key, at = varint(data, at)
        if key & 7 == 0:
            value, at = varint(data, at)
            found.append((key >> 3, value))
            continue
        size = {1: 8, 5: 4}.get(key & 7)
        if size is None:
            size, at = varint(data, at)
        found.append((key >> 3, data[at : at + size]))
        at += size
    return found  # type: ignore[return-value]


def events(data: bytes) -> list[tuple[float, int, str, float]]:
    """Return (wall time, step, tag, value) of all scalars, by event.proto and summary.proto."""
    found = []
    for number, record in enumerate(records(data)):
        fields = dict(message(record))
        (wall_time,) = struct.unpack("<d", fields.get(1, bytes(8)))
        if number == 0:
            assert fields[3] == b"brain.Event:2"
            continue
        for _, value in message(fields[5]):
            scalar = dict(message(value))
            (number_,) = struct.unpack("<f", scalar[2])
            found.append((wall_time, fields[2], scalar[1].decode(), number_))
    return found  # type: ignore[return-value]


def test_the_event_file_has_every_value_of_the_history_at_its_time() -> None:
    expected = []
    for step in HISTORY.steps:
        for name in ("loss", "lr", "images_per_second", "wait_share"):
            expected.append((step.time, step.step, f"train/{name}", getattr(step, name)))
    for score in HISTORY.scores:
        expected.append((score.time, score.step, "val/miou", score.miou))
        expected.append((score.time, score.step, "val/pixel_accuracy", score.pixel_accuracy))
        for name, iou in zip(NAMES, score.ious, strict=True):
            if iou is not None:
                expected.append((score.time, score.step, f"val/iou/{name}", iou))
    found = events(plots.event_file(HISTORY, NAMES))
    assert [event[1] for event in found] == sorted(event[1] for event in found)
    found.sort()
    expected.sort()
    assert [event[:3] for event in found] == [event[:3] for event in expected]
    assert [event[3] for event in found] == pytest.approx(
        [event[3] for event in expected], rel=1e-6
    )


def test_the_event_file_depends_only_on_the_history() -> None:
    again = History.from_json(HISTORY.to_json()).copy()
    assert plots.event_file(again, NAMES) == plots.event_file(HISTORY, NAMES)
    assert events(plots.event_file(History(), NAMES)) == []


def test_a_wrong_number_of_class_names_is_refused() -> None:
    with pytest.raises(ValueError, match=r"class_names has 2 names, .* step 200 has 3"):
        plots.event_file(HISTORY, NAMES[:2])


@pytest.mark.parametrize(
    "history", [HISTORY, History(), History(steps=HISTORY.steps[:1], scores=HISTORY.scores[:1])]
)
def test_curves_of_any_history_are_drawn_the_same_each_time(history: History) -> None:
    first = plots.plot_curves(history)
    assert first == plots.plot_curves(history)
    assert min(opened(first).shape[:2]) > 500


def test_samples_show_the_image_and_the_colors_of_its_classes() -> None:
    image = np.full((60, 90, 3), (10, 200, 30), dtype=np.uint8)
    label = np.zeros((60, 90), dtype=np.uint8)
    label[10:40, 20:50] = 8
    label[50:] = 255
    mask = np.zeros_like(label)
    mask[10:40, 20:55] = 12
    pixels = opened(plots.plot_samples([(image, label, mask, "a cat")], VOC))
    assert has_color(pixels, (10, 200, 30))
    shown = [i for i in range(1, 21) if has_color(pixels, VOC.palette[i])]
    assert shown == [8, 12]


def test_plotting_no_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="rows is empty"):
        plots.plot_samples([], VOC)
