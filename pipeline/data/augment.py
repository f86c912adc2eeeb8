"""Random scale, crop and mirror, applied to an image and its label together.

There is no hidden state: the same generator state gives the same bytes in any process. Only the
part of the image inside the crop is resized.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from pipeline.data.images import Pixels

DRAWS = 4
"""Random numbers drawn per `augment` call, whatever the options: scale, row, column, mirror."""


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
    """Return a random crop (ch, cw, 3) of the scaled `image` and the same crop (ch, cw) of `label`.

    The scale is uniform in [`min_scale`, `max_scale`], and the position is uniform over the crops
    inside the image. An image smaller than the crop is placed uniformly inside it, padded with
    `fill` (red, green, blue, 0 to 255, rounded) and its label with `ignore_index`. With `mirror`,
    the crop is flipped left to right with probability 1/2. The image is resized bilinearly (with
    antialiasing when shrinking), the label by nearest neighbor. All arrays are uint8.
    Raises ValueError if the sizes of `image` and `label` differ.
    Source: arXiv 1706.05587, Sec. 4 (data augmentation, crop size).
    """
    if image.shape != (*label.shape, 3):
        raise ValueError(
            f"image is {image.shape}, but label is {label.shape}; give (h, w, 3), (h, w)"
        )
    scale, row, column, flip = generator.random(DRAWS)
    scale = min_scale + (max_scale - min_scale) * scale
    rows = _Axis(label.shape[0], crop_size[0], scale, row)
    columns = _Axis(label.shape[1], crop_size[1], scale, column)
    mirrored = mirror and flip < 0.5
    crop = np.empty((*crop_size, 3), dtype=np.uint8)
    label_crop = np.empty(crop_size, dtype=np.uint8)
    if rows.size < crop_size[0] or columns.size < crop_size[1]:
        # assigning whole rows is 50 times faster than broadcasting one pixel
        crop[:] = np.tile(np.rint(fill).astype(np.uint8), (crop_size[1], 1))
        label_crop[:] = ignore_index
    inside = rows.inside(), columns.inside()
    crop[inside] = _resized(image, rows, columns, Image.Resampling.BILINEAR, mirrored)
    label_crop[inside] = _resized(label, rows, columns, Image.Resampling.NEAREST, mirrored)
    return crop, label_crop


class _Axis:
    """The position of the crop along one axis.

    `size` pixels of the crop, starting at `at`, show the image from `start` to `stop`, in pixels
    of the unscaled image.
    """

    def __init__(self, length: int, crop: int, scale: float, place: float) -> None:
        scaled = max(1, round(length * scale))
        first, last = sorted((0, scaled - crop))
        offset = first + min(int(place * (last - first + 1)), last - first)
        begin, end = max(offset, 0), min(offset + crop, scaled)
        self.size, self.at = end - begin, begin - offset
        self.start, self.stop = begin * length / scaled, end * length / scaled
        # bilinear filtering reads this many pixels beyond the crop
        margin = math.ceil(max(1.0, length / scaled))
        self.low = max(0, math.floor(self.start) - margin)
        self.high = min(length, math.ceil(self.stop) + margin)

    def inside(self) -> slice:
        """Return the part of the crop covered by the image."""
        return slice(self.at, self.at + self.size)


def _resized(
    pixels: Pixels, rows: _Axis, columns: _Axis, resampling: Image.Resampling, mirrored: bool
) -> Pixels:
    """Return the part of `pixels` (h, w) or (h, w, 3) inside the crop, resized to the crop."""
    source = Image.fromarray(pixels[rows.low : rows.high, columns.low : columns.high])
    box = (
        *(columns.start - columns.low, rows.start - rows.low),
        *(columns.stop - columns.low, rows.stop - rows.low),
    )
    part = source.resize((columns.size, rows.size), resampling, box=box)
    if mirrored:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(part)
