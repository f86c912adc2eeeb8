"""Scale, crop and mirror: a photo and its label together, from an explicit generator.

A photo never meets another one here, nor any state: the same generator gives the same bytes, in
whatever process. Only the part that the crop keeps is resized.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from pipeline.data.images import Pixels

DRAWS = 4
"""Numbers that `augment` takes from its generator: scale, row, column, mirror. Always all."""


def augment(
    image: Pixels,
    label: Pixels,
    generator: np.random.Generator,
    *,
    crop_size: tuple[int, int],
    min_scale: float,
    max_scale: float,
    mirror: bool,
    fill: Sequence[float],
    ignore_index: int,
) -> tuple[Pixels, Pixels]:
    """A random crop (ch, cw, 3) uint8 of the scaled `image`, and the same of its `label` (ch, cw).

    The scale is uniform in `min_scale` to `max_scale`, the place uniform among those where the
    crop lies inside the photo. Where the photo is smaller it lies anywhere inside the crop, and
    around it the image is `fill` (red, green, blue, 0 to 255, rounded), the label `ignore_index`.
    With `mirror`, every second one is left-right mirrored. Bilinear for the image (with
    antialiasing where it shrinks), nearest for the label. Raises ValueError where the sizes differ.
    Source: arXiv 1706.05587, Sec. 4 (data augmentation, crop size).
    """
    if image.shape != (*label.shape, 3):
        raise ValueError(
            f"image is {image.shape}, but label is {label.shape}; give (h, w, 3), (h, w)"
        )
    scale, row, column, turn = generator.random(DRAWS)
    scale = min_scale + (max_scale - min_scale) * scale
    rows = _Axis(label.shape[0], crop_size[0], scale, row)
    columns = _Axis(label.shape[1], crop_size[1], scale, column)
    mirrored = mirror and turn < 0.5
    crop = np.empty((*crop_size, 3), dtype=np.uint8)
    label_crop = np.empty(crop_size, dtype=np.uint8)
    if rows.size < crop_size[0] or columns.size < crop_size[1]:
        # row by row: numpy fills pixel by pixel 50 times as slowly
        crop[:] = np.tile(np.rint(fill).astype(np.uint8), (crop_size[1], 1))
        label_crop[:] = ignore_index
    inside = rows.inside(), columns.inside()
    crop[inside] = _resized(image, rows, columns, Image.Resampling.BILINEAR, mirrored)
    label_crop[inside] = _resized(label, rows, columns, Image.Resampling.NEAREST, mirrored)
    return crop, label_crop


class _Axis:
    """Where the crop lies along one axis.

    `size` pixels of the crop, from `at` on, show the photo's `start` to `stop`, in its own pixels.
    """

    def __init__(self, length: int, crop: int, scale: float, place: float) -> None:
        scaled = max(1, round(length * scale))
        first, last = sorted((0, scaled - crop))
        offset = first + min(int(place * (last - first + 1)), last - first)
        begin, end = max(offset, 0), min(offset + crop, scaled)
        self.size, self.at = end - begin, begin - offset
        self.start, self.stop = begin * length / scaled, end * length / scaled
        # what a triangle filter sees beyond them
        margin = math.ceil(max(1.0, length / scaled))
        self.low = max(0, math.floor(self.start) - margin)
        self.high = min(length, math.ceil(self.stop) + margin)

    def inside(self) -> slice:
        """The part of the crop that shows the photo."""
        return slice(self.at, self.at + self.size)


def _resized(
    pixels: Pixels, rows: _Axis, columns: _Axis, how: Image.Resampling, mirrored: bool
) -> Pixels:
    """The kept part of `pixels` (h, w) or (h, w, 3), as large as it is in the crop."""
    near = Image.fromarray(pixels[rows.low : rows.high, columns.low : columns.high])
    box = (
        *(columns.start - columns.low, rows.start - rows.low),
        *(columns.stop - columns.low, rows.stop - rows.low),
    )
    part = near.resize((columns.size, rows.size), how, box=box)
    if mirrored:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(part)
