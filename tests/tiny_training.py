"""A training run that takes seconds: coloured regions to tell apart, and a small network."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from pipeline.data import storage

COLORS = np.array([[220, 40, 40], [40, 220, 40], [40, 40, 220], [0, 0, 0]], dtype=np.uint8)
NAMES = '{"names": ["red", "green", "blue", "never"]}'


def encode(pixels: np.ndarray, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def draw_sample(number: int) -> tuple[np.ndarray, np.ndarray]:
    """A noisy photo and its label, with rows to ignore; each number has its own size."""
    generator = np.random.default_rng(number)
    label = np.zeros((41 + number, 53 + 2 * number), dtype=np.uint8)
    label[:20] = 1
    label[12:, 26:] = 2
    label = np.roll(label, 7 * number, axis=1)
    noise = generator.integers(-30, 30, (*label.shape, 3))
    photo = np.clip(COLORS[label].astype(int) + noise, 0, 255).astype(np.uint8)
    label[:2] = 255
    return photo, label


def write_dataset(prefix: str, *, train: int = 6, val: int = 3) -> None:
    """Writes SPLIT/images and SPLIT/labels below `prefix`."""
    for split, numbers in (("train", range(train)), ("val", range(10, 10 + val))):
        for number in numbers:
            photo, label = draw_sample(number)
            storage.write(f"{prefix}/{split}/images/{number:02d}.jpg", encode(photo, "JPEG"))
            storage.write(f"{prefix}/{split}/labels/{number:02d}.png", encode(label))


def arguments(prefix: str, *more: str, out: str | None = None) -> list[str]:
    """A command line that trains on `put_set`'s photos; later flags go before earlier ones."""
    network = ["--num-classes", "4", "--atrous-rates", "--no-image-pooling", "--no-decoder"]
    network += ["--num-convs", "0", "--init", "None"]
    photos = ["--layout", "camvid", "--classes", NAMES, "--crop-size", "33", "35"]
    photos += ["--late-crop-size", "None", "--batch-size", "4"]
    looks = ["--eval-scales", "1", "--no-eval-flip"]
    machine = ["--cpus-per-worker", "1", "--loaders", "0", "--no-bf16"]
    return [
        *("--recipe", "camvid-mobilenetv2"),
        *("--data", f"{prefix}/set", "--out", out or f"{prefix}/out"),
        *network, *photos, *looks, *machine, *more,
    ]  # fmt: skip


def list_etags(prefix: str) -> dict[str, str]:
    """Relative key and etag of everything below `prefix`."""
    found = storage.list_objects(prefix)
    return {storage.relative(prefix, each.uri): each.etag for each in found}
