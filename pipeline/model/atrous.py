"""Atrous convolution that computes only what its taps see, where that is the cheaper form.

A k x k convolution is k x k products of pixels and weights, added at shifted places; at rate 36 on
a 65 x 65 map only 3.6 of nine taps see the map, the others see padding. `shifted` cuts the output
into regions whose taps see the map all over, and multiplies matrices there. Half precision adds
up in fp32 and is rounded once, as in conv2d. `is_shifted_cheaper` says from a table of measured
crossovers when to take it; training always takes conv2d.
Source: arXiv 1706.05587, Sec. 3.3, on filters that degenerate to 1x1.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pipeline.model.resize import Size

GATHERED_VALUES = 2**24
"""Pixels x taps x channels that are copied at once: 64 MiB in fp32."""


@dataclass(frozen=True, kw_only=True)
class Region:
    """Outputs `start` to `end` along an axis, all of which the taps `first` to `last` - 1 see."""

    start: int
    end: int
    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class Crossover:
    """From where on `shifted` took less time than conv2d, channels last, one thread."""

    min_rate: int
    max_share: float
    min_inputs: int


CROSSOVERS = {
    # AMX, 65 x 65, 2048 to 256, rates 12 / 24 / 36: conv2d 327 to 1,052 ms, shifted 46 / 33 / 22;
    # 512 to 512 at rates 2 and 4: conv2d 25 ms, shifted 143 to 190. Not measured by this form,
    # but by nine products that add up in fp32.
    ("amx", torch.bfloat16): Crossover(min_rate=12, max_share=1.0, min_inputs=1024),
    # EPYC (Zen 1), 2048 to 256, conv2d against shifted, ms, by the share of taps that see the map:
    # 0.57: 714, 726; 0.40: 510, 557; 0.26: 206, 198; 0.11: 42, 36. conv2d skips most padding.
    ("avx2", torch.float32): Crossover(min_rate=12, max_share=0.3, min_inputs=1024),
}
"""By `engine` and type; where there is none, conv2d is taken.

EPYC (Zen 4, AVX-512 with bf16), 65 x 65, 2048 to 256, rates 12 / 24 / 36, ms: conv2d 146 / 111 / 80
in bf16 and 320 / 219 / 158 in fp32, shifted 178 / 139 / 92 and 459 / 261 / 202: conv2d at every
rate. GPUs are not measured.
"""


def engine(device: torch.device) -> str:
    """What multiplies matrices on that device: 'cuda', 'amx', 'avx512', 'avx2' or another name.

    'amx' and 'avx512_bf16' have instructions for bf16; the others compute it by hand. Where
    ATEN_CPU_CAPABILITY holds torch to less than AVX-512, that is the answer on any CPU.
    """
    if device.type != "cpu":
        return device.type
    capability = torch.backends.cpu.get_cpu_capability().lower()
    if capability != "avx512":
        return capability
    if torch.cpu._is_amx_tile_supported():
        return "amx"
    return "avx512_bf16" if torch.cpu._is_avx512_bf16_supported() else capability


def is_shifted_cheaper(
    on: str, dtype: torch.dtype, *, inputs: int, groups: int, size: Size, rate: int, stride: int
) -> bool:
    """Whether a 3x3 convolution of a map of `size` (h, w) is cheaper as `shifted`.

    `on` is an `engine`; `inputs` are the channels that come in.
    """
    crossover = CROSSOVERS.get((on, dtype))
    if crossover is None or groups > 1 or stride > 1 or inputs < crossover.min_inputs:
        return False
    share = seen_share(size, kernel=3, rate=rate, stride=stride, padding=rate)
    return rate >= crossover.min_rate and share <= crossover.max_share


def pack(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """Weights (k, c / groups, kh, kw) as `shifted` wants them: (groups, kh, kw, c / groups, k)."""
    grouped = weight.detach().reshape(groups, -1, *weight.shape[1:])
    return grouped.permute(0, 3, 4, 2, 1).contiguous()


def shifted(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    stride: int,
    padding: Size,
    rate: int,
) -> torch.Tensor:
    """The convolution of maps (n, c, h, w) by `packed` weights, (n, k, oh, ow) channels last.

    `padding` zeros are above and left, and as many below and right. Equal to conv2d but for the
    order of sums.
    """
    groups, high, wide, inputs, outputs = packed.shape
    n, _, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1).reshape(n, height, width, groups, inputs)
    rows = _regions(height, high, rate=rate, stride=stride, padding=padding[0])
    columns = _regions(width, wide, rate=rate, stride=stride, padding=padding[1])
    out = x.new_empty((n, rows[-1].end, columns[-1].end, groups, outputs))
    for across in columns:
        taps = max(1, (across.last - across.first) * high)
        values = taps * groups * inputs * n * (across.end - across.start)
        for down in _cut(rows, max(1, GATHERED_VALUES // values)):
            area = out[:, down.start : down.end, across.start : across.end]
            weights = packed[:, down.first : down.last, across.first : across.last]
            seen = [
                pixels[:, _inputs(down, i, rate, stride, padding[0])][
                    :, :, _inputs(across, j, rate, stride, padding[1])
                ]
                for i in range(down.first, down.last)
                for j in range(across.first, across.last)
            ]
            area.copy_(_product(seen, weights, bias, like=area))
    return out.flatten(3).permute(0, 3, 1, 2)


def seen_share(size: Size, *, kernel: int, rate: int, stride: int, padding: int) -> float:
    """The share of a convolution's products whose pixel is in the map of `size` (h, w)."""
    share = 1.0
    for length in size:
        regions = _regions(length, kernel, rate=rate, stride=stride, padding=padding)
        seen = sum((each.end - each.start) * (each.last - each.first) for each in regions)
        share *= seen / (kernel * regions[-1].end)
    return share


def _product(
    seen: list[torch.Tensor],
    weights: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    like: torch.Tensor,
) -> torch.Tensor:
    """The sum of each tap's pixels (n, h, w, g, c) times its weights, in the shape of `like`."""
    groups, outputs = like.shape[-2:]
    if not seen:
        empty = torch.zeros_like(like)
        return empty if bias is None else empty.add_(bias.view(groups, outputs))
    n, height, width = like.shape[:3]
    if like.dtype in (torch.bfloat16, torch.float16):
        # One product for all taps: its sums are fp32 inside, and rounded once.
        pixels = torch.stack(seen, dim=4).permute(3, 0, 1, 2, 4, 5).flatten(4).flatten(1, 3)
        # The bias too: added afterwards, it would be rounded a second time.
        matrices = weights.flatten(1, 3)
        if bias is None:
            product = torch.bmm(pixels, matrices)
        else:
            product = torch.baddbmm(bias.view(groups, 1, outputs), pixels, matrices)
    else:
        # One for each: sums of few terms lose less, and the products add up in the same type.
        pixels = torch.stack(seen).permute(4, 0, 1, 2, 3, 5).flatten(2, 4)
        product = torch.matmul(pixels, weights.flatten(1, 2)).sum(dim=1)
        if bias is not None:
            product.add_(bias.view(groups, 1, outputs))
    return product.view(groups, n, height, width, outputs).permute(1, 2, 3, 0, 4)


def _regions(length: int, kernel: int, *, rate: int, stride: int, padding: int) -> list[Region]:
    """The outputs along an axis of `length`, cut where the taps that see the map change."""
    count = (length + 2 * padding - (kernel - 1) * rate - 1) // stride + 1
    cuts = {0, count}
    for tap in range(kernel):
        offset = tap * rate - padding  # the tap sees pixel output * stride + offset
        cuts |= {-(offset // stride), -((offset - length) // stride)}
    edges = sorted(cut for cut in cuts if 0 <= cut <= count)
    regions = []
    for start, end in itertools.pairwise(edges):
        pixels = [start * stride + tap * rate - padding for tap in range(kernel)]
        first = sum(pixel < 0 for pixel in pixels)
        last = sum(pixel < length for pixel in pixels)
        regions.append(Region(start=start, end=end, first=first, last=max(first, last)))
    return regions


def _cut(regions: list[Region], most: int) -> Iterator[Region]:
    """The regions, in pieces of at most `most` outputs."""
    for each in regions:
        for start in range(each.start, each.end, most):
            end = min(start + most, each.end)
            yield Region(start=start, end=end, first=each.first, last=each.last)


def _inputs(region: Region, tap: int, rate: int, stride: int, padding: int) -> slice:
    """The pixels that the tap sees from the region's outputs."""
    start = region.start * stride + tap * rate - padding
    return slice(start, start + (region.end - 1 - region.start) * stride + 1, stride)
