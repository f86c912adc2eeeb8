"""Atrous ResNet 18, 34, 50 and 101, optionally with the cascade of block5 to block7.

The stem (7x7 convolution and max-pool) always has stride 4, so output stride 4 replaces every
later stride by a rate; each block of a cascade doubles the largest output stride, from 32 to 256.
state_dict names are torchvision's, so its files load unchanged; block5 to block7 are `layer5` to
`layer7`. Source: arXiv 1512.03385; 1706.05587 for rates and cascade.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from pipeline.model.convolution import build_conv_bn, conv_bn_relu
from pipeline.model.features import Features
from pipeline.model.strides import StageSpec, UnitStrides, plan_stride_first, plan_stride_last

STEM_STRIDE = 4
WIDTHS = (64, 128, 256, 512)

CASCADE_PREFIXES = ("layer5.", "layer6.", "layer7.")
"""Prefixes of the weights that an ImageNet network does not have."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, with the stride in the first, or in the last with `stride_last`."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, *, stride_last: bool) -> None:
        super().__init__()
        self.stride_last = stride_last
        self.conv1, self.bn1 = build_conv_bn(in_channels, width, 3)
        self.conv2, self.bn2 = build_conv_bn(width, width, 3)
        self.downsample = _build_projection(in_channels, width)

    def set_strides(self, unit: UnitStrides) -> None:
        early, late = (1, unit.stride) if self.stride_last else (unit.stride, 1)
        late_rate = unit.entry_rate if self.stride_last else unit.rate
        self.conv1.set_stride_and_rate(stride=early, rate=unit.entry_rate)
        self.conv2.set_stride_and_rate(stride=late, rate=late_rate)
        self.stride = unit.stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = conv_bn_relu(self.conv1, self.bn1, x)
        shortcut = _shortcut(x, self.downsample, self.stride)
        return conv_bn_relu(self.conv2, self.bn2, residual, shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions; the 3x3 convolution has the stride and rate."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, *, stride_last: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = build_conv_bn(in_channels, width)
        self.conv2, self.bn2 = build_conv_bn(width, width, 3)
        self.conv3, self.bn3 = build_conv_bn(width, width * self.expansion)
        self.downsample = _build_projection(in_channels, width * self.expansion)

    def set_strides(self, unit: UnitStrides) -> None:
        self.conv2.set_stride_and_rate(stride=unit.stride, rate=unit.entry_rate)
        self.stride = unit.stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = conv_bn_relu(self.conv1, self.bn1, x)
        residual = conv_bn_relu(self.conv2, self.bn2, residual)
        shortcut = _shortcut(x, self.downsample, self.stride)
        return conv_bn_relu(self.conv3, self.bn3, residual, shortcut)


DEPTHS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}
"""Kind of unit, and units per block."""


class ResNet(nn.Module):
    """Images (n, 3, h, w) -> `Features` at about h / output_stride x w / output_stride.

    `stride_last` puts a block's stride in its last unit (the paper's ResNet) instead of its first
    (torchvision's). Of `blocks` (4 to 7), those after the fourth are copies of it: the same
    units, at its width. Source: arXiv 1706.05587, Sec. 3.2.
    """

    def __init__(self, name: str, *, stride_last: bool, blocks: int = 4) -> None:
        super().__init__()
        kind, depths = DEPTHS[name]
        copies = blocks - len(depths)
        self.depths = (*depths, *[depths[-1]] * copies)
        self.stride_last = stride_last
        self.conv1, self.bn1 = build_conv_bn(3, WIDTHS[0], 7, stride=2)
        channels, stages = WIDTHS[0], []
        for width, units in zip((*WIDTHS, *[WIDTHS[-1]] * copies), self.depths, strict=True):
            stages.append(_build_stage(kind, channels, width, units=units, stride_last=stride_last))
            channels = width * kind.expansion
        self.layer1, self.layer2, self.layer3, self.layer4 = stages[:4]
        for number, stage in enumerate(stages[4:], start=5):
            self.add_module(f"layer{number}", stage)
        self.low_channels = WIDTHS[0] * kind.expansion
        self.middle_channels = WIDTHS[2] * kind.expansion
        self.channels = channels

    def set_strides(self, *, output_stride: int, multi_grid: Sequence[int]) -> None:
        """Set every unit's stride and rate; no weight changes.

        `multi_grid` multiplies the rates of the fourth block and of its copies, unit by unit. With
        the stride in the first unit, that unit keeps the previous block's rate.
        """
        twos = [2] * (len(self.depths) - 1)
        strides = [*twos, 1] if self.stride_last else [1, *twos]
        stages = [StageSpec(units=n, stride=s) for n, s in zip(self.depths, strides, strict=True)]
        plan_strides = plan_stride_last if self.stride_last else plan_stride_first
        plan = plan_strides(stages, stem=STEM_STRIDE, output_stride=output_stride)
        # block4 and its copies
        plan[3:] = [_multiply_rates(units, multi_grid) for units in plan[3:]]
        for stage, units in zip(self._stages(), plan, strict=True):
            for block, unit in zip(stage, units, strict=True):
                assert isinstance(block, (BasicBlock, Bottleneck))
                block.set_strides(unit)

    def _stages(self) -> list[nn.Sequential]:
        children = (child for name, child in self.named_children() if name.startswith("layer"))
        return [child for child in children if isinstance(child, nn.Sequential)]

    def forward(self, x: torch.Tensor) -> Features:
        x = conv_bn_relu(self.conv1, self.bn1, x)
        x = functional.max_pool2d(x, 3, stride=2, padding=1)
        before_last = x
        for unit in self.layer1:
            before_last, x = x, unit(x)
        # The paper's layer1 may have a stride in its last unit, whose input is at stride 4.
        low = before_last if self.stride_last else x
        middle = self.layer3(self.layer2(x))
        x = middle
        for stage in self._stages()[3:]:
            x = stage(x)
        return Features(low, middle, x)


def _build_stage(
    kind: type[BasicBlock] | type[Bottleneck],
    in_channels: int,
    width: int,
    *,
    units: int,
    stride_last: bool,
) -> nn.Sequential:
    channels = [in_channels] + [width * kind.expansion] * (units - 1)
    return nn.Sequential(*(kind(each, width, stride_last=stride_last) for each in channels))


def _multiply_rates(units: list[UnitStrides], multi_grid: Sequence[int]) -> list[UnitStrides]:
    # All ones turn multi-grid off, whatever their number.
    if all(rate == 1 for rate in multi_grid):
        return units
    return [
        dataclasses.replace(unit, entry_rate=unit.entry_rate * grid, rate=unit.rate * grid)
        for unit, grid in zip(units, multi_grid, strict=True)
    ]


def _build_projection(in_channels: int, out_channels: int) -> nn.Sequential | None:
    # Only if the number of channels changes: a stride alone samples the identity.
    if in_channels == out_channels:
        return None
    return nn.Sequential(*build_conv_bn(in_channels, out_channels))


def _shortcut(x: torch.Tensor, projection: nn.Sequential | None, stride: int) -> torch.Tensor:
    # A 1x1 convolution with a stride equals the convolution of the sampled map.
    x = x[..., ::stride, ::stride] if stride > 1 else x
    return x if projection is None else projection(x)
