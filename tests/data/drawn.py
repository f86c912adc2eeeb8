"""Tiny data sets in each layout, drawn from numbers and put anywhere."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from pipeline.data import storage

SIZES = ((5, 7), (9, 4), (6, 6))  # height, width


def encoded(pixels, form="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


def photo(number, form="JPEG", **options):
    height, width = SIZES[number % len(SIZES)]
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return encoded(pixels, form, **options)


def ids(number, classes=3, ignore_index=255):
    """A label's ids (h, w): all classes but one, which depends on the number, and ignored ones."""
    generator = np.random.default_rng(100 + number)
    values = [i for i in range(classes) if i != number % classes] + [ignore_index]
    return generator.choice(np.array(values, dtype=np.uint8), SIZES[number % len(SIZES)])


def put_all(prefix, files):
    """Puts {relative key: bytes or text} below `prefix`."""
    for key, data in files.items():
        data = data.encode() if isinstance(data, str) else data
        storage.write(storage.join(prefix, key), data)


def voc_files(**splits):
    """The files of a VOC with these splits of numbers; SegmentationClass has each label."""
    files = {}
    for split, numbers in splits.items():
        names = "".join(f"{number:04d}\n" for number in numbers)
        files[f"ImageSets/Segmentation/{split}.txt"] = names
        for number in numbers:
            files[f"JPEGImages/{number:04d}.jpg"] = photo(number)
            files[f"SegmentationClass/{number:04d}.png"] = encoded(ids(number))
    return files


def folder_files(**splits):
    """The files of two folders a split."""
    files = {}
    for split, numbers in splits.items():
        for number in numbers:
            files[f"{split}/images/{number % 2}/{number:04d}.jpg"] = photo(number)
            files[f"{split}/labels/{number % 2}/{number:04d}.png"] = encoded(ids(number))
    return files


def cityscapes_files(*endings, split="train", numbers=(0, 1, 2)):
    """Street scenes of two cities with the gtFine files of these endings, and what lies beside."""
    files = {}
    for number in numbers:
        city = ("ulm", "aachen")[number % 2]
        name = f"{city}/{city}_{number:06d}_000019"
        files[f"leftImg8bit/{split}/{name}_leftImg8bit.png"] = photo(number, "PNG")
        files[f"gtFine/{split}/{name}_gtFine_polygons.json"] = "{}"
        for ending in ("color", "instanceIds", *endings):
            files[f"gtFine/{split}/{name}_gtFine_{ending}.png"] = encoded(ids(number))
    return files
