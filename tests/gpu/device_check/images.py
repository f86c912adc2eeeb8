"""Write a data set in VOC's layout: random scenes in VOC's sizes, with labels.

python -m tests.gpu.device_check.images FOLDER COUNT
"""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = {
    (375, 500): 0.39,
    (333, 500): 0.125,
    (500, 375): 0.075,
    (334, 500): 0.03,
    (332, 500): 0.02,
    (500, 333): 0.03,
}
"""Shares of the most frequent sizes (h, w) in VOC; the others have one side of 500."""


def write_dataset(root: Path, count: int) -> None:
    """Write `count` images with labels, three quarters of them for training."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        list(pool.map(_write_image, [root] * count, range(count), chunksize=8))
    names = [_name(number) for number in range(count)]
    train, val = names[: count * 3 // 4], names[count * 3 // 4 :]
    for split, part in (("train", train), ("trainaug", train), ("val", val)):
        path = root / "ImageSets" / "Segmentation" / f"{split}.txt"
        path.write_text("\n".join(part) + "\n")


def _write_image(root: Path, number: int) -> None:
    generator = np.random.default_rng(number)
    height, width = _draw_size(generator)
    colors = Image.fromarray(generator.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    soft = colors.resize((width, height), Image.Resampling.BICUBIC)
    image, label = np.asarray(soft).astype(np.int16), np.zeros((height, width), np.uint8)
    y, x = np.mgrid[:height, :width]
    for _ in range(int(generator.integers(1, 4))):
        class_id = int(generator.integers(1, 21))
        top, left = generator.integers(0, height), generator.integers(0, width)
        tall, wide = generator.integers(30, 150, 2)
        inside = ((y - top) / tall) ** 2 + ((x - left) / wide) ** 2 < 1
        color = np.array([class_id * 12, 255 - class_id * 9, class_id * 37 % 255])
        image[inside] = (image[inside] + color) // 2
        label[inside] = class_id
    noisy = np.clip(image + generator.normal(0, 9, image.shape), 0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(root / "JPEGImages" / f"{_name(number)}.jpg", quality=92)
    Image.fromarray(label).save(root / "SegmentationClass" / f"{_name(number)}.png")


def _draw_size(generator: np.random.Generator) -> tuple[int, int]:
    draw = generator.random()
    for size, share in SIZES.items():
        draw -= share
        if draw < 0:
            return size
    other = int(generator.integers(280, 500))
    return (500, other) if generator.random() < 0.3 else (other, 500)


def _name(number: int) -> str:
    return f"p{number:05d}"


if __name__ == "__main__":
    write_dataset(Path(sys.argv[1]), int(sys.argv[2]))
