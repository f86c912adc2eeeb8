"""Atrous spatial pyramid pooling with image-level features.

Source: arXiv 1706.05587, Sec. 3.3. Names are torchvision's: `convs.0` is the 1x1 branch, followed
by the 3x3 branches and, last, image pooling.
"""

from collections.abc import Sequence

import torch
from torch import nn

from pipeline.model.convolution import Convolution, build_conv_bn

ASPP_CHANNELS = 256


class ImagePooling(nn.Sequential):
    """The map's mean, 1x1 convolved: (n, c, h, w) -> (n, 256, h, w), constant over h and w."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # Bilinear upsampling of a single value gives that value everywhere.
        pooled = input
        for layer in self:
            pooled = layer(pooled)
        return pooled.expand(-1, -1, *input.shape[-2:])


class ASPP(nn.Module):
    """Parallel branches, concatenated and projected: (n, c, h, w) -> (n, 256, h, w).

    `branches` is the number of 3x3 branches besides the 1x1 branch. `pooling_first` puts
    image-level features first in the concatenation (TensorFlow).
    """

    def __init__(
        self,
        in_channels: int,
        *,
        branches: int,
        image_pooling: bool,
        dropout: float,
        folded: bool,
        pooling_first: bool,
    ) -> None:
        super().__init__()
        self.branches = branches
        self.pooling_first = pooling_first and image_pooling
        convs: list[nn.Module] = [
            nn.Sequential(
                *build_conv_bn(in_channels, ASPP_CHANNELS, kernel_size, folded=folded), nn.ReLU()
            )
            for kernel_size in (1, *[3] * branches)
        ]
        if image_pooling:
            pooled = build_conv_bn(in_channels, ASPP_CHANNELS, folded=folded)
            convs.append(ImagePooling(nn.AdaptiveAvgPool2d(1), *pooled, nn.ReLU()))
        self.convs = nn.ModuleList(convs)
        self.project = nn.Sequential(
            *build_conv_bn(ASPP_CHANNELS * len(convs), ASPP_CHANNELS, folded=folded),
            nn.ReLU(),
            nn.Dropout(dropout),
        )

    def set_rates(self, rates: Sequence[int]) -> None:
        """Set the rates of the 3x3 branches; no weight changes."""
        for branch, rate in zip(self.convs[1 : 1 + self.branches], rates, strict=True):
            assert isinstance(branch, nn.Sequential)
            assert isinstance(branch[0], Convolution)
            branch[0].set_stride_and_rate(stride=1, rate=rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = [branch(x) for branch in self.convs]
        if self.pooling_first:
            outputs = [outputs[-1], *outputs[:-1]]
        projected: torch.Tensor = self.project(torch.cat(outputs, dim=1))
        return projected
