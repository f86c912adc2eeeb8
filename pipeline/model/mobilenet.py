"""Atrous MobileNetV2 at output stride 4, 8, 16 or 32, without its last 1x1 convolution.

state_dict names are those of torchvision's ImageNet file (`features.0` to `features.17`); DeepLab
does not use the 1280 features before the classifier. Strides are in a stage's first unit in every
style, as in both published families of weights. With `folded` (TensorFlow's style), padding is
SAME and each convolution has a bias instead of batch normalization.
Source: arXiv 1801.04381, Table 2; Sec. 6.2 on DeepLabv3.
"""

import torch
from torch import nn

from pipeline.model.convolution import Convolution, build_conv_bn
from pipeline.model.features import Features
from pipeline.model.strides import StageSpec, UnitStrides, plan_stride_first

STEM_STRIDE = 2
STEM_CHANNELS = 32

# Expansion, channels, units, stride: Table 2.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
LOW_UNIT, LOW_CHANNELS = 3, 24
"""The last unit at stride 4, which gives `Features.low`."""
MIDDLE_UNIT = 13
"""The last unit before the last natural stride, which gives `Features.middle`."""


class InvertedResidual(nn.Module):
    """1x1 expansion (unless `expansion` is 1), 3x3 depthwise and linear 1x1 convolutions."""

    def __init__(
        self, in_channels: int, out_channels: int, *, expansion: int, folded: bool
    ) -> None:
        super().__init__()
        width = in_channels * expansion
        self.residual = in_channels == out_channels
        layers: list[nn.Module] = []
        if expansion > 1:
            expand = build_conv_bn(in_channels, width, folded=folded)
            layers.append(nn.Sequential(*expand, nn.ReLU6()))
        self.depthwise_index = len(layers)
        depthwise = build_conv_bn(width, width, 3, groups=width, folded=folded)
        layers.append(nn.Sequential(*depthwise, nn.ReLU6()))
        layers += build_conv_bn(width, out_channels, folded=folded)
        self.conv = nn.Sequential(*layers)

    def set_strides(self, unit: UnitStrides) -> None:
        depthwise = self.get_submodule(f"conv.{self.depthwise_index}.0")
        assert isinstance(depthwise, Convolution)
        depthwise.set_stride_and_rate(stride=unit.stride, rate=unit.entry_rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv(x)
        # Every unit with a natural stride changes the number of channels.
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """Images (n, 3, h, w) -> `Features` at about h / output_stride x w / output_stride."""

    def __init__(self, *, folded: bool = False) -> None:
        super().__init__()
        stem = build_conv_bn(3, STEM_CHANNELS, 3, stride=2, folded=folded)
        units: list[nn.Module] = [nn.Sequential(*stem, nn.ReLU6())]
        channels = STEM_CHANNELS
        for expansion, width, repeats, _ in STAGES:
            for _ in range(repeats):
                units.append(InvertedResidual(channels, width, expansion=expansion, folded=folded))
                channels = width
        self.features = nn.Sequential(*units)
        self.low_channels, self.channels = LOW_CHANNELS, channels

    def set_strides(self, *, output_stride: int) -> None:
        """Set every unit's stride and rate; no weight changes."""
        stages = [StageSpec(units=units, stride=stride) for _, _, units, stride in STAGES]
        plan = plan_stride_first(stages, stem=STEM_STRIDE, output_stride=output_stride)
        planned = [unit for stage in plan for unit in stage]
        for block, unit in zip(list(self.features)[1:], planned, strict=True):
            assert isinstance(block, InvertedResidual)
            block.set_strides(unit)

    def forward(self, x: torch.Tensor) -> Features:
        low = middle = x
        for index, unit in enumerate(self.features):
            x = unit(x)
            low = x if index == LOW_UNIT else low
            middle = x if index == MIDDLE_UNIT else middle
        return Features(low, middle, x)
