"""A training run of seconds: colored regions to segment, and a small network."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from pipeline.data import storage

COLORS = np.array([[220, 40, 40], [40, 220, 40], [40, 40, 220], [0, 0, 0]], dtype=np.uint8)
NAMES = '{"names": ["red", "green", "blue", "never"]}'


def encode(pixels: np.ndarray, image_format: str = "PNG") -> bytes:
    """Return the pixels as an image file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format)
    return buffer.getvalue()


def draw_sample(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a noisy image and its label with two ignored rows; the size depends on `number`."""
    generator = np.random.default_rng(number)
    label = np.zeros((41 + number, 53 + 2 * number), dtype=np.uint8)
    label[:20] = 1
    label[12:, 26:] = 2
    label = np.roll(label, 7 * number, axis=1)
    noise = generator.integers(-30, 30, (*label.shape, 3))
    image = np.clip(COLORS[label].astype(int) + noise, 0, 255).astype(np.uint8)
    label[:2] = 255
    return image, label


def write_dataset(prefix: str, *, train: int = 6, val: int = 3) -> None:
    """Write SPLIT/images and SPLIT/labels below `prefix`."""
    for split, numbers in (("train", range(train)), ("val", range(10, 10 + val))):
        for number in numbers:
            image, label = draw_sample(number)
            storage.write(f"{prefix}/{split}/images/{number:02d}.jpg", encode(image, "JPEG"))
            storage.write(f"{prefix}/{split}/labels/{number:02d}.png", encode(label))


def arguments(prefix: str, *more: str, out: str | None = None) -> list[str]:
    """Return flags that train on the images of `write_dataset`; `more` take precedence."""
    network = ["--num-classes", "4", "--atrous-rates", "--no-image-pooling", "--no-decoder"]
    network += ["--num-convs", "0", "--init", "None"]
    data = ["--layout", "camvid", "--classes", NAMES, "--crop-size", "33", "35"]
    data += ["--late-crop-size", "None", "--batch-size", "4"]
    evaluation = ["--eval-scales", "1", "--no-eval-flip"]
    machine = ["--cpus-per-worker", "1", "--loaders", "0", "--no-bf16"]
    return [
        *("--recipe", "camvid-mobilenetv2"),
        *("--data", f"{prefix}/set", "--out", out or f"{prefix}/out"),
        *network, *data, *evaluation, *machine, *more,
    ]  # fmt: skip


def list_etags(prefix: str) -> dict[str, str]:
    """Return the etag of every object below `prefix`, by its relative key."""
    listed = storage.list_objects(prefix)
    return {storage.relative(prefix, found.uri): found.etag for found in listed}
