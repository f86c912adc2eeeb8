"""Tiny generated data sets in every layout, written to any storage."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from pipeline.data import storage

SIZES = ((5, 7), (9, 4), (6, 6))  # height, width


def encode(pixels, form="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


def image_file(number, form="JPEG", **options):
    height, width = SIZES[number % len(SIZES)]
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return encode(pixels, form, **options)


def ids(number, classes=3, ignore_index=255):
    """Return label ids (h, w): all classes but `number % classes`, and ignored pixels."""
    generator = np.random.default_rng(100 + number)
    values = [i for i in range(classes) if i != number % classes] + [ignore_index]
    return generator.choice(np.array(values, dtype=np.uint8), SIZES[number % len(SIZES)])


def put_all(prefix, files):
    """Write {relative key: bytes or text} under `prefix`."""
    for key, data in files.items():
        data = data.encode() if isinstance(data, str) else data
        storage.write(storage.join(prefix, key), data)


def voc_files(**splits):
    """Return the files of a VOC with these image numbers by split, all official labels."""
    files = {}
    for split, numbers in splits.items():
        names = "".join(f"{number:04d}\n" for number in numbers)
        files[f"ImageSets/Segmentation/{split}.txt"] = names
        for number in numbers:
            files[f"JPEGImages/{number:04d}.jpg"] = image_file(number)
            files[f"SegmentationClass/{number:04d}.png"] = encode(ids(number))
    return files


def folder_files(**splits):
    """Return the files of layout folders with these image numbers by split."""
    files = {}
    for split, numbers in splits.items():
        for number in numbers:
            files[f"{split}/images/{number % 2}/{number:04d}.jpg"] = image_file(number)
            files[f"{split}/labels/{number % 2}/{number:04d}.png"] = encode(ids(number))
    return files


def cityscapes_files(*endings, split="train", numbers=(0, 1, 2)):
    """Return the files of two Cityscapes cities with gtFine files of these endings and others."""
    files = {}
    for number in numbers:
        city = ("ulm", "aachen")[number % 2]
        name = f"{city}/{city}_{number:06d}_000019"
        files[f"leftImg8bit/{split}/{name}_leftImg8bit.png"] = image_file(number, "PNG")
        files[f"gtFine/{split}/{name}_gtFine_polygons.json"] = "{}"
        for ending in ("color", "instanceIds", *endings):
            files[f"gtFine/{split}/{name}_gtFine_{ending}.png"] = encode(ids(number))
    return files
