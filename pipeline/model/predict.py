"""Inference: class probabilities over scales and flips, and masks of images of any size.

Memory stays bounded: one scale goes through the network at a time, and logits are kept at feature
resolution. `segment` turns them into masks in strips of rows and never holds a whole class x
pixel volume; `predict` holds one, its result. Large images are processed in a sliding window.
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
    """Sliding-window settings, for images of more than `threshold_pixels` (height x width).

    Tiles have sides of `size` pixels (fewer if the image is smaller). Neighbors share `overlap`
    pixels, of which each keeps its half, so that a kept pixel has at least overlap / 2 pixels of
    context, except at the image's border. The defaults are ours: 1025 is 16k + 1, and steps of
    768 keep all tiles but the last on the grid of every output stride; an overlap of 257 costs
    1.8 times the computation.
    """

    size: int = 1025
    overlap: int = 257
    threshold_pixels: int = 4_000_000

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"window size {self.size}: must be at least 1 pixel")
        if not 0 <= self.overlap < self.size:
            raise ValueError(
                f"window overlap {self.overlap}: must be at least 0 and less than the size "
                f"{self.size}"
            )
        if self.threshold_pixels < 1:
            raise ValueError(
                f"window threshold_pixels {self.threshold_pixels}: must be at least 1, which uses "
                "the window for every image"
            )


@dataclass(frozen=True, kw_only=True)
class TileSpan:
    """A tile along one axis, from `start` to `end`; `keep_start` to `keep_end` of it is kept."""

    start: int
    end: int
    keep_start: int
    keep_end: int


DEFAULT_WINDOW = SlidingWindow()


STRIP_VALUES = {"cpu": 2**18}
"""Classes x pixels of a strip: 1 MiB, which stays in a CPU's cache."""
STRIP_VALUES_ELSEWHERE = 2**26
"""The same on other devices, which need large batches of work: 256 MiB."""


class ScaleLogits(NamedTuple):
    """Logits (n, k, fh, fw) of images resized to `image_size`, and mirrored if `mirrored`."""

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
    """Return class probabilities (n, k, h, w) fp32, averaged over scales and mirrored copies.

    `images` are (n, 3, h, w) float, normalized with the checkpoint's mean and std. The result is
    on the model's device. Probabilities are averaged, not logits.

    Raises ValueError if `scales` is empty or holds a scale <= 0, or the model is in training mode.
    Source: arXiv 1706.05587, Sec. 4.1, inference strategy.
    """
    _check_scales(scales)
    _check_eval(model)
    size = _size(images)
    with torch.inference_mode():
        all_logits = compute_logits(model, images, scales=scales, flip=flip)
        first = all_logits[0].logits
        total = torch.empty((*first.shape[:2], *size), device=first.device)
        for rows in row_strips(all_logits, size, slice(0, size[0])):
            total[:, :, rows] = mean_probabilities(model, all_logits, size, rows)
        return total


def segment(
    model: DeepLabV3,
    images: torch.Tensor | np.ndarray,
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    window: SlidingWindow = DEFAULT_WINDOW,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return masks (n, h, w) uint8 of class ids and confidence (n, h, w) float32, on the CPU.

    `images` are (n, h, w, 3) uint8 RGB. Confidence is the winning class's probability. Images of
    more than `window.threshold_pixels` are predicted tile by tile, at every scale.

    Raises ValueError as `predict` does, or if `images` have another type or shape.
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
            all_logits = compute_logits(model, normalize(model, tile), scales=scales, flip=flip)
            for rows in row_strips(all_logits, size, _kept(down)):
                strip = mean_probabilities(model, all_logits, size, rows)[..., _kept(across)]
                best, ids = strip.max(dim=1)
                at = slice(down.start + rows.start, down.start + rows.stop)
                mask[:, at, across.keep_start : across.keep_end] = ids
                confidence[:, at, across.keep_start : across.keep_end] = best
    return mask.cpu(), confidence.cpu()


def compute_logits(
    model: DeepLabV3, images: torch.Tensor, *, scales: Sequence[float], flip: bool
) -> list[ScaleLogits]:
    """Return the logits of normalized images (n, 3, h, w) at each scale, and mirrored if `flip`."""
    parameter = next(model.parameters())
    images = images.to(parameter.device)
    found = []
    for scale in scales:
        size = scaled_size(model, _size(images), scale)
        scaled = resize(images, size, align_corners=model.align_corners).to(parameter.dtype)
        # On a CPU both together take as long as one after the other.
        if flip and parameter.device.type != "cpu":
            logits, mirrored = model.logits(torch.cat([scaled, scaled.flip(3)])).float().chunk(2)
            found += [ScaleLogits(logits, size, False), ScaleLogits(mirrored, size, True)]
            continue
        found.append(ScaleLogits(model.logits(scaled).float(), size, False))
        if flip:
            found.append(ScaleLogits(model.logits(scaled.flip(3)).float(), size, True))
    return found


def row_strips(all_logits: list[ScaleLogits], size: Size, rows: slice) -> Iterator[slice]:
    """Yield `rows` (start, stop) of images of `size` in strips whose probabilities are small."""
    first = all_logits[0].logits
    values = STRIP_VALUES.get(first.device.type, STRIP_VALUES_ELSEWHERE)
    height = max(1, values // (first.shape[0] * first.shape[1] * size[1]))
    for start in range(rows.start, rows.stop, height):
        yield slice(start, min(start + height, rows.stop))


def mean_probabilities(
    model: DeepLabV3, all_logits: list[ScaleLogits], size: Size, rows: slice
) -> torch.Tensor:
    """Return the mean of the probabilities (n, k, rows, w), with mirrored ones mirrored back."""
    total: torch.Tensor | None = None
    for logits, image_size, mirrored in all_logits:
        strip = model.upsample(logits, image_size=image_size, size=size, rows=rows)
        strip = torch.softmax(strip, dim=1)
        strip = strip.flip(3) if mirrored else strip
        total = strip if total is None else total.add_(strip)
    assert total is not None
    return total.div_(len(all_logits))


def scaled_size(model: DeepLabV3, size: Size, scale: float) -> Size:
    """Return `size` x `scale`, at least one pixel; TensorFlow's style scales size - 1."""
    if model.align_corners:
        return int((size[0] - 1) * scale) + 1, int((size[1] - 1) * scale) + 1
    height, width = (max(1, math.floor(side * scale + 0.5)) for side in size)
    return height, width


def normalize(model: DeepLabV3, images: torch.Tensor | np.ndarray) -> torch.Tensor:
    """Return images (n, h, w, 3) uint8 as (n, 3, h, w) float32 normalized for the model."""
    if isinstance(images, np.ndarray):
        # A copy: Pillow's arrays are read-only, which PyTorch warns about.
        images = torch.from_numpy(np.array(images))
    device = next(model.parameters()).device
    # Scaled to 0..255, so that pixels need not be divided by 255.
    mean = torch.tensor(model.config.mean, device=device).mul(255)[:, None, None]
    std = torch.tensor(model.config.std, device=device).mul(255)[:, None, None]
    # In memory still (n, h, w, 3), channels last, which makes convolutions faster.
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
    """Return the tiles along an axis of `length`; their kept parts cover it exactly once.

    All tiles have the window's size; the last one is moved back to end with the image.
    """
    if length <= window.size:
        return [_whole(length)]
    last = length - window.size
    starts = [*range(0, last, window.size - window.overlap), last]
    # Between two tiles the cut is in the middle of their overlap.
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
        raise ValueError("scales must not be empty; (1.0,) uses each image's own size")
    wrong = [scale for scale in scales if not (scale > 0 and math.isfinite(scale))]
    if wrong:
        raise ValueError(f"scales must be finite and over 0, got {wrong[0]} in {tuple(scales)}")


def _check_eval(model: DeepLabV3) -> None:
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() before predicting")


def _check_images(images: torch.Tensor | np.ndarray) -> None:
    wanted = torch.uint8 if isinstance(images, torch.Tensor) else np.uint8
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != wanted or 0 in images.shape:
        raise ValueError(
            f"images must be (n, h, w, 3) uint8, got {tuple(images.shape)} {images.dtype}; "
            "predict takes normalized (n, 3, h, w) floats"
        )
