"""Atrous ResNet 18, 34, 50 and 101 at output stride 4, 8, 16 or 32.

The stem (7x7 convolution and max-pool) always strides by 4, so output stride 4 keeps it and
replaces every later stride by a rate. state_dict names are torchvision's, so its files load as
they are. Source: arXiv 1512.03385 and, for the rates, 1706.05587.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from pipeline.model.config import Style
from pipeline.model.convolution import convolve
from pipeline.model.rates import Stage, Unit, stride_first, stride_last

STEM_STRIDE = 4
WIDTHS = (64, 128, 256, 512)


class Features(NamedTuple):
    """Feature maps (n, c, h, w): before the last stage, and at the end."""

    middle: torch.Tensor
    final: torch.Tensor


class Basic(nn.Module):
    """Two 3x3 convolutions. The stride is in the first, or in the last where `stride_last`."""

    expansion = 1

    def __init__(self, inputs: int, width: int, *, stride_last: bool) -> None:
        super().__init__()
        self.stride_last = stride_last
        self.conv1, self.bn1 = convolve(inputs, width, 3)
        self.conv2, self.bn2 = convolve(width, width, 3)
        self.downsample = _projection(inputs, width)

    def arrange(self, unit: Unit) -> None:
        early, late = (1, unit.stride) if self.stride_last else (unit.stride, 1)
        self.conv1.place(stride=early, rate=unit.entry_rate)
        self.conv2.place(stride=late, rate=unit.entry_rate if self.stride_last else unit.rate)
        self.stride = unit.stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = functional.relu(self.bn1(self.conv1(x)))
        residual = self.bn2(self.conv2(residual))
        return functional.relu(residual + _shortcut(x, self.downsample, self.stride))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions; stride and rate are the 3x3's."""

    expansion = 4

    def __init__(self, inputs: int, width: int, *, stride_last: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = convolve(inputs, width)
        self.conv2, self.bn2 = convolve(width, width, 3)
        self.conv3, self.bn3 = convolve(width, width * self.expansion)
        self.downsample = _projection(inputs, width * self.expansion)

    def arrange(self, unit: Unit) -> None:
        self.conv2.place(stride=unit.stride, rate=unit.entry_rate)
        self.stride = unit.stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = functional.relu(self.bn1(self.conv1(x)))
        residual = functional.relu(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        return functional.relu(residual + _shortcut(x, self.downsample, self.stride))


DEPTHS: dict[str, tuple[type[Basic] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (Basic, (2, 2, 2, 2)),
    "resnet34": (Basic, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}


class ResNet(nn.Module):
    """Images (n, 3, h, w) -> `Features` at about h / output_stride x w / output_stride."""

    def __init__(self, name: str, *, style: Style) -> None:
        super().__init__()
        kind, self.depths = DEPTHS[name]
        self.style = style
        self.conv1, self.bn1 = convolve(3, WIDTHS[0], 7, stride=2)
        widths = [width * kind.expansion for width in WIDTHS]
        inputs = [WIDTHS[0], *widths]
        stages = [
            nn.Sequential(
                kind(inputs[i], width, stride_last=style == "paper"),
                *(kind(widths[i], width, stride_last=style == "paper") for _ in range(units - 1)),
            )
            for i, (width, units) in enumerate(zip(WIDTHS, self.depths, strict=True))
        ]
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.middle_channels, self.channels = widths[-2:]

    def arrange(self, *, output_stride: int, multi_grid: Sequence[int]) -> None:
        """Sets every unit's stride and rate; no weight changes.

        `multi_grid` multiplies the rates of the last stage, unit by unit. In torchvision's
        style the unit before the stride keeps the previous stage's rate.
        """
        strides = (2, 2, 2, 1) if self.style == "paper" else (1, 2, 2, 2)
        stages = [Stage(units=n, stride=s) for n, s in zip(self.depths, strides, strict=True)]
        place = stride_last if self.style == "paper" else stride_first
        plan = place(stages, stem=STEM_STRIDE, output_stride=output_stride)
        plan[-1] = _with_unit_rates(plan[-1], multi_grid)
        for stage, units in zip(self._stages(), plan, strict=True):
            for block, unit in zip(stage, units, strict=True):
                assert isinstance(block, (Basic, Bottleneck))
                block.arrange(unit)

    def _stages(self) -> tuple[nn.Sequential, ...]:
        return self.layer1, self.layer2, self.layer3, self.layer4

    def forward(self, x: torch.Tensor) -> Features:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = functional.max_pool2d(x, 3, stride=2, padding=1)
        x = self.layer2(self.layer1(x))
        middle = self.layer3(x)
        return Features(middle, self.layer4(middle))


def _with_unit_rates(units: list[Unit], multi_grid: Sequence[int]) -> list[Unit]:
    # All ones may be of any length: it means that there is no multi-grid.
    if all(rate == 1 for rate in multi_grid):
        return units
    return [
        dataclasses.replace(unit, entry_rate=unit.entry_rate * grid, rate=unit.rate * grid)
        for unit, grid in zip(units, multi_grid, strict=True)
    ]


def _projection(inputs: int, outputs: int) -> nn.Sequential | None:
    # Only where the number of channels changes: a stride alone samples the identity.
    return nn.Sequential(*convolve(inputs, outputs)) if inputs != outputs else None


def _shortcut(x: torch.Tensor, projection: nn.Sequential | None, stride: int) -> torch.Tensor:
    # A 1x1 convolution with a stride is the same convolution of the sampled map.
    x = x[..., ::stride, ::stride] if stride > 1 else x
    return x if projection is None else projection(x)
