"""Small real images with labels, by number; the same number gives the same bytes everywhere.

They are the demo's images, each cropped a little differently and scaled down, so that the committed
checkpoint sees real cats, persons and motorbikes.
"""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path

from PIL import Image

from jobs.demo.images import demo_images

DEMO = Path(__file__).parents[1] / "jobs" / "demo"
SIZES = ((96, 128), (128, 96), (97, 129), (96, 96))  # height, width


@cache
def _originals() -> tuple[tuple[str, Image.Image, Image.Image], ...]:
    """(stem, image, label) of the demo's images."""
    found = []
    for name, data in demo_images().items():
        stem = Path(name).stem
        label = Image.open(DEMO / "labels" / f"{stem}.png")
        found.append((stem, Image.open(io.BytesIO(data)).convert("RGB"), label))
    return tuple(found)


def encode(image: Image.Image, kind: str) -> bytes:
    """Return the image as the bytes of a file of that kind."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 90} if kind == "JPEG" else {}))
    return buffer.getvalue()


@cache
def small_image(number: int) -> tuple[str, bytes, bytes]:
    """Return name, image and label (PNG) of that number; every third image is a PNG."""
    stem, image, label = _originals()[number % len(_originals())]
    height, width = SIZES[number % len(SIZES)]
    left, top = (7 * number) % 40, (5 * number) % 30
    box = (left, top, image.width - left // 2, image.height - top // 2)
    small = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    ids = label.resize((width, height), Image.Resampling.NEAREST, box=box)
    kind = "PNG" if number % 3 == 0 else "JPEG"
    name = f"{number % 2}/{number:04d}-{stem}.{'png' if kind == 'PNG' else 'jpg'}"
    return name, encode(small, kind), encode(ids, "PNG")
