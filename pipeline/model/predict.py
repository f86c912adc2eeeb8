"""Inference: class probabilities over scales and flips, and masks of images of any size.

Enters: images and a network in eval mode. Leaves: probabilities, or masks with confidence.
Invariant: one scale goes through the network at a time, and of class x pixel volumes there is
none in `segment` and one in `predict`: logits wait at feature resolution, and become masks in
strips of rows. A large image is looked at through a sliding window.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from pipeline.model.deeplab import DeepLabV3
from pipeline.model.resize import Size, resize


@dataclass(frozen=True, kw_only=True)
class SlidingWindow:
    """How an image of more than `threshold_pixels` (height x width) is segmented: tile by tile.

    Tiles are `size` a side (less where the image is smaller) and share `overlap` with each
    neighbour, of which each keeps its half: a kept pixel has at least overlap / 2 of context,
    except at the image's border. The defaults are ours: 1025 is 16k + 1, and steps of 768 keep
    all tiles but the last on the grid of every output stride; an overlap of 257 costs 1.8 times
    the computation.
    """

    size: int = 1025
    overlap: int = 257
    threshold_pixels: int = 4_000_000

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"window size must be at least 1 pixel, got {self.size}")
        if not 0 <= self.overlap < self.size:
            raise ValueError(
                f"window overlap must be from 0 to below its size {self.size}, got {self.overlap}"
            )
        if self.threshold_pixels < 1:
            raise ValueError(
                f"window threshold_pixels must be at least 1, got {self.threshold_pixels}; 1 "
                "slides over every image"
            )


@dataclass(frozen=True, kw_only=True)
class TileSpan:
    """A tile along one axis: it covers start to end, and keep_start to keep_end of it is kept."""

    start: int
    end: int
    keep_start: int
    keep_end: int


DEFAULT_WINDOW = SlidingWindow()


STRIP_VALUES = {"cpu": 2**18}
"""Classes x pixels of a strip: 1 MiB, which stays in a CPU's cache."""
MANY_STRIP_VALUES = 2**26
"""The same for other devices, which want much to do at once: 256 MiB."""


class ScaleLogits(NamedTuple):
    """What the network says of images of `image_size`, which may be mirrored: (n, k, fh, fw)."""

    logits: torch.Tensor
    image_size: Size
    mirrored: bool


def predict(
    model: DeepLabV3,
    images: torch.Tensor,
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> torch.Tensor:
    """Class probabilities (n, k, h, w) fp32, averaged over scales and mirrored copies.

    `images` are (n, 3, h, w) float, normalised with the checkpoint's mean and std; the result is
    on the model's device. The mean is of probabilities.
    Raises ValueError where `scales` is empty or holds a scale <= 0, or the model is in training.
    Source: arXiv 1706.05587, Sec. 4.1, inference strategy.
    """
    _check_scales(scales)
    _check_eval(model)
    size = _size(images)
    with torch.inference_mode():
        looks = _looks(model, images, scales=scales, flip=flip)
        first = looks[0].logits
        total = torch.empty((*first.shape[:2], *size), device=first.device)
        for rows in _strips(looks, size, slice(0, size[0])):
            total[:, :, rows] = _probabilities(model, looks, size, rows)
        return total


def segment(
    model: DeepLabV3,
    images: torch.Tensor | np.ndarray,
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    window: SlidingWindow = DEFAULT_WINDOW,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks (n, h, w) uint8 of class ids and confidence (n, h, w) float32, both on the CPU.

    `images` are (n, h, w, 3) uint8, red first. Confidence is the winning class's probability.
    An image of more than `window.threshold_pixels` is predicted tile by tile, at all scales
    alike. Raises ValueError as `predict` does, or where `images` are of another type or shape.
    """
    _check_scales(scales)
    _check_eval(model)
    _check_images(images)
    device = next(model.parameters()).device
    mask = torch.empty(images.shape[:3], dtype=torch.uint8, device=device)
    confidence = torch.empty(images.shape[:3], dtype=torch.float32, device=device)
    for down, across in _tiles((images.shape[1], images.shape[2]), window):
        tile = images[:, down.start : down.end, across.start : across.end]
        size = (down.end - down.start, across.end - across.start)
        with torch.inference_mode():
            looks = _looks(model, _normalised(model, tile), scales=scales, flip=flip)
            for rows in _strips(looks, size, _kept(down)):
                strip = _probabilities(model, looks, size, rows)[..., _kept(across)]
                best, ids = strip.max(dim=1)
                at = slice(down.start + rows.start, down.start + rows.stop)
                mask[:, at, across.keep_start : across.keep_end] = ids
                confidence[:, at, across.keep_start : across.keep_end] = best
    return mask.cpu(), confidence.cpu()


def _looks(
    model: DeepLabV3, images: torch.Tensor, *, scales: Sequence[float], flip: bool
) -> list[ScaleLogits]:
    """The logits at each scale of images (n, 3, h, w), and where `flip` of their mirror images."""
    parameter = next(model.parameters())
    images = images.to(parameter.device)
    looks = []
    for scale in scales:
        size = scaled_size(model, _size(images), scale)
        scaled = resize(images, size, align_corners=model.align_corners).to(parameter.dtype)
        # Measured on a CPU: two images together took 0.97 to 1.09 times as long as one by one.
        if flip and parameter.device.type != "cpu":
            logits, mirrored = model.logits(torch.cat([scaled, scaled.flip(3)])).float().chunk(2)
            looks += [ScaleLogits(logits, size, False), ScaleLogits(mirrored, size, True)]
            continue
        looks.append(ScaleLogits(model.logits(scaled).float(), size, False))
        if flip:
            looks.append(ScaleLogits(model.logits(scaled.flip(3)).float(), size, True))
    return looks


def _strips(looks: list[ScaleLogits], size: Size, rows: slice) -> Iterator[slice]:
    """`rows` (from, to) of images of `size`, cut so that a strip's probabilities stay small."""
    first = looks[0].logits
    values = STRIP_VALUES.get(first.device.type, MANY_STRIP_VALUES)
    most = max(1, values // (first.shape[0] * first.shape[1] * size[1]))
    for start in range(rows.start, rows.stop, most):
        yield slice(start, min(start + most, rows.stop))


def _probabilities(
    model: DeepLabV3, looks: list[ScaleLogits], size: Size, rows: slice
) -> torch.Tensor:
    """The mean probabilities (n, k, rows, w) of all looks, the mirrored ones mirrored back."""
    total: torch.Tensor | None = None
    for logits, image_size, mirrored in looks:
        strip = model.upsample(logits, image_size=image_size, size=size, rows=rows)
        strip = torch.softmax(strip, dim=1)
        strip = strip.flip(3) if mirrored else strip
        total = strip if total is None else total.add_(strip)
    assert total is not None
    return total.div_(len(looks))


def scaled_size(model: DeepLabV3, size: Size, scale: float) -> Size:
    """`size` at `scale`, at least one pixel. TensorFlow's style keeps the corners' distance."""
    if model.align_corners:
        return int((size[0] - 1) * scale) + 1, int((size[1] - 1) * scale) + 1
    height, width = (max(1, math.floor(side * scale + 0.5)) for side in size)
    return height, width


def _normalised(model: DeepLabV3, images: torch.Tensor | np.ndarray) -> torch.Tensor:
    """Images (n, h, w, 3) uint8 as the model wants them: (n, 3, h, w) float32 on its device."""
    if isinstance(images, np.ndarray):
        # A copy: Pillow's arrays are read-only, which PyTorch warns of.
        images = torch.from_numpy(np.array(images))
    device = next(model.parameters()).device
    # On the grid of 0..255, so that mean and std need no division of each pixel.
    mean = torch.tensor(model.config.mean, device=device).mul(255)[:, None, None]
    std = torch.tensor(model.config.std, device=device).mul(255)[:, None, None]
    # In memory still (n, h, w, 3), channels last: convolutions are faster so.
    pixels = images.to(device).permute(0, 3, 1, 2).float()
    return pixels.sub_(mean).div_(std)


def _tiles(size: Size, window: SlidingWindow) -> Iterator[tuple[TileSpan, TileSpan]]:
    height, width = size
    if height * width <= window.threshold_pixels:
        yield _whole(height), _whole(width)
        return
    for rows in tile_spans(height, window):
        for columns in tile_spans(width, window):
            yield rows, columns


def _whole(length: int) -> TileSpan:
    return TileSpan(start=0, end=length, keep_start=0, keep_end=length)


def tile_spans(length: int, window: SlidingWindow) -> list[TileSpan]:
    """The tiles along an axis of `length`: what is kept of them covers it, nothing twice.

    All tiles have the window's size; the last is moved back to end with the image.
    """
    if length <= window.size:
        return [_whole(length)]
    last = length - window.size
    starts = [*range(0, last, window.size - window.overlap), last]
    # Between two tiles the cut is in the middle of what they share.
    cuts = [(b + a + window.size) // 2 for a, b in itertools.pairwise(starts)]
    edges = [0, *cuts, length]
    return [
        TileSpan(start=a, end=a + window.size, keep_start=edges[i], keep_end=edges[i + 1])
        for i, a in enumerate(starts)
    ]


def _kept(span: TileSpan) -> slice:
    return slice(span.keep_start - span.start, span.keep_end - span.start)


def _size(images: torch.Tensor) -> Size:
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"images must be (n, 3, h, w) float, got {tuple(images.shape)} {images.dtype}; "
            "segment takes (n, h, w, 3) uint8"
        )
    return images.shape[2], images.shape[3]


def _check_scales(scales: Sequence[float]) -> None:
    if not scales:
        raise ValueError("scales is empty; (1.0,) looks at each image once, at its own size")
    wrong = [scale for scale in scales if not (scale > 0 and math.isfinite(scale))]
    if wrong:
        raise ValueError(f"scales must be over 0 and finite, got {wrong[0]} in {tuple(scales)}")


def _check_eval(model: DeepLabV3) -> None:
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() before predicting")


def _check_images(images: torch.Tensor | np.ndarray) -> None:
    wanted = torch.uint8 if isinstance(images, torch.Tensor) else np.uint8
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != wanted or 0 in images.shape:
        raise ValueError(
            f"images must be (n, h, w, 3) uint8, got {tuple(images.shape)} {images.dtype}; "
            "predict takes normalised (n, 3, h, w) floats"
        )
