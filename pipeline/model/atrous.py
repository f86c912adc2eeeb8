"""Atrous convolution that skips taps falling entirely in the padding, where that is faster.

A k x k convolution is the sum of k x k matrix products, one per tap, of shifted pixels and
weights. At rate 36 on a 65 x 65 map, on average only 3.6 of nine taps fall on the map; the others
multiply padding. `shifted_conv2d` cuts the output into regions whose valid taps are the same, and
multiplies only those. Half precision accumulates in fp32 and is rounded once, as in conv2d.
`is_shifted_cheaper` decides by a table of measurements; training always uses conv2d.
Source: arXiv 1706.05587, Sec. 3.3, on filters that degenerate to 1x1.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pipeline.model.resize import Size

GATHERED_VALUES = 2**24
"""The most values (pixels x taps x channels) that are copied at once: 64 MiB in fp32."""


@dataclass(frozen=True, kw_only=True)
class Region:
    """Outputs `start` to `end` - 1 along an axis, whose valid taps are `first` to `last` - 1."""

    start: int
    end: int
    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class Crossover:
    """Where `shifted_conv2d` was measured to be faster than conv2d, channels last, one thread."""

    min_rate: int
    max_valid_share: float
    min_in_channels: int


CROSSOVERS = {
    # 65 x 65, 2048 to 256 channels, rates 12 / 24 / 36: conv2d 327 to 1,052 ms, shifted 46 / 33 /
    # 22 ms. 512 to 512 channels, rates 2 and 4: conv2d 25 ms, shifted 143 to 190 ms.
    ("amx", torch.bfloat16): Crossover(min_rate=12, max_valid_share=1.0, min_in_channels=1024),
    # Zen 1, 2048 to 256 channels: break-even at a valid share between 0.40 and 0.26; conv2d
    # skips most of the padding itself.
    ("avx2", torch.float32): Crossover(min_rate=12, max_valid_share=0.3, min_in_channels=1024),
}
"""By `devices.engine` and type; conv2d is used for all others.

On Zen 4 (avx512_bf16) conv2d is faster at every rate. GPUs are not measured.
"""


def is_shifted_cheaper(
    engine: str,
    dtype: torch.dtype,
    *,
    in_channels: int,
    groups: int,
    size: Size,
    rate: int,
    stride: int,
) -> bool:
    """Return whether `shifted_conv2d` is faster for a 3x3 convolution of a map of `size` (h, w).

    `engine` is that of `devices.engine`.
    """
    crossover = CROSSOVERS.get((engine, dtype))
    if crossover is None or groups > 1 or stride > 1 or in_channels < crossover.min_in_channels:
        return False
    share = valid_tap_share(size, kernel_size=3, rate=rate, stride=stride, padding=rate)
    return rate >= crossover.min_rate and share <= crossover.max_valid_share


def pack(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """Return weights (k, c / groups, kh, kw) as `shifted_conv2d` takes them.

    The shape is (groups, kh, kw, c / groups, k / groups).
    """
    grouped = weight.detach().reshape(groups, -1, *weight.shape[1:])
    return grouped.permute(0, 3, 4, 2, 1).contiguous()


def shifted_conv2d(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    stride: int,
    padding: Size,
    rate: int,
) -> torch.Tensor:
    """Return the convolution of maps (n, c, h, w) with `pack`ed weights: (n, k, oh, ow).

    The result is channels last, and equals conv2d's except for the order of the sums. `padding`
    (h, w) zeros are on both sides of each axis.
    """
    groups, kernel_height, kernel_width, in_channels, out_channels = packed.shape
    n, _, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1).reshape(n, height, width, groups, in_channels)
    rows = _regions(height, kernel_height, rate=rate, stride=stride, padding=padding[0])
    columns = _regions(width, kernel_width, rate=rate, stride=stride, padding=padding[1])
    out = x.new_empty((n, rows[-1].end, columns[-1].end, groups, out_channels))
    for across in columns:
        taps = max(1, (across.last - across.first) * kernel_height)
        values = taps * groups * in_channels * n * (across.end - across.start)
        for down in _split(rows, max(1, GATHERED_VALUES // values)):
            area = out[:, down.start : down.end, across.start : across.end]
            weights = packed[:, down.first : down.last, across.first : across.last]
            valid = [
                pixels[:, _tap_pixels(down, i, rate, stride, padding[0])][
                    :, :, _tap_pixels(across, j, rate, stride, padding[1])
                ]
                for i in range(down.first, down.last)
                for j in range(across.first, across.last)
            ]
            area.copy_(_sum_of_products(valid, weights, bias, like=area))
    return out.flatten(3).permute(0, 3, 1, 2)


def valid_tap_share(size: Size, *, kernel_size: int, rate: int, stride: int, padding: int) -> float:
    """Return the share of a convolution's taps that fall on the map of `size` (h, w)."""
    share = 1.0
    for length in size:
        regions = _regions(length, kernel_size, rate=rate, stride=stride, padding=padding)
        valid = sum((each.end - each.start) * (each.last - each.first) for each in regions)
        share *= valid / (kernel_size * regions[-1].end)
    return share


def _sum_of_products(
    valid: list[torch.Tensor],
    weights: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    like: torch.Tensor,
) -> torch.Tensor:
    """Return the sum of each tap's pixels (n, h, w, g, c) times its weights, shaped as `like`."""
    groups, out_channels = like.shape[-2:]
    if not valid:
        empty = torch.zeros_like(like)
        return empty if bias is None else empty.add_(bias.view(groups, out_channels))
    n, height, width = like.shape[:3]
    if like.dtype in (torch.bfloat16, torch.float16):
        # One product for all taps: its sums are fp32 inside and rounded once.
        pixels = torch.stack(valid, dim=4).permute(3, 0, 1, 2, 4, 5).flatten(4).flatten(1, 3)
        matrices = weights.flatten(1, 3)
        if bias is None:
            product = torch.bmm(pixels, matrices)
        else:
            # Added afterwards, the bias would cause a second rounding.
            product = torch.baddbmm(bias.view(groups, 1, out_channels), pixels, matrices)
    else:
        # One product per tap: shorter sums lose less precision.
        pixels = torch.stack(valid).permute(4, 0, 1, 2, 3, 5).flatten(2, 4)
        product = torch.matmul(pixels, weights.flatten(1, 2)).sum(dim=1)
        if bias is not None:
            product.add_(bias.view(groups, 1, out_channels))
    return product.view(groups, n, height, width, out_channels).permute(1, 2, 3, 0, 4)


def _regions(
    length: int, kernel_size: int, *, rate: int, stride: int, padding: int
) -> list[Region]:
    """Return the outputs along an axis of `length`, cut where the valid taps change."""
    count = (length + 2 * padding - (kernel_size - 1) * rate - 1) // stride + 1
    cuts = {0, count}
    for tap in range(kernel_size):
        offset = tap * rate - padding  # the tap's pixel is output * stride + offset
        cuts |= {-(offset // stride), -((offset - length) // stride)}
    edges = sorted(cut for cut in cuts if 0 <= cut <= count)
    regions = []
    for start, end in itertools.pairwise(edges):
        pixels = [start * stride + tap * rate - padding for tap in range(kernel_size)]
        first = sum(pixel < 0 for pixel in pixels)
        last = sum(pixel < length for pixel in pixels)
        regions.append(Region(start=start, end=end, first=first, last=max(first, last)))
    return regions


def _split(regions: list[Region], max_outputs: int) -> Iterator[Region]:
    """Yield the regions in pieces of at most `max_outputs` outputs."""
    for each in regions:
        for start in range(each.start, each.end, max_outputs):
            end = min(start + max_outputs, each.end)
            yield Region(start=start, end=end, first=each.first, last=each.last)


def _tap_pixels(region: Region, tap: int, rate: int, stride: int, padding: int) -> slice:
    """Return the pixels that `tap` multiplies for the outputs of `region`."""
    start = region.start * stride + tap * rate - padding
    return slice(start, start + (region.end - 1 - region.start) * stride + 1, stride)
