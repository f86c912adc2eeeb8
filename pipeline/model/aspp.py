"""Atrous spatial pyramid pooling with image-level features, and the heads that end in logits.

Enters: a backbone's feature map (n, c, h, w). Leaves: logits (n, k, h, w) of the same size.
Names are torchvision's: `convs.0` is the 1x1 branch, then the 3x3 branches, pooling last.
Source: arXiv 1706.05587, Sec. 3.3.
"""

from collections.abc import Sequence

import torch
from torch import nn

from pipeline.model.config import ModelConfig
from pipeline.model.convolution import Convolution, convolve

FILTERS = 256

AUXILIARY_DROPOUT = 0.1
"""torchvision's; it belongs to a head that is left out after training."""


class ImagePooling(nn.Sequential):
    """The mean over the map, 1x1 convolved: (n, c, h, w) -> (n, 256, h, w), constant over h, w."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # Bilinear upsampling of one value is that value everywhere.
        pooled = input
        for layer in self:
            pooled = layer(pooled)
        return pooled.expand(-1, -1, *input.shape[-2:])


class ASPP(nn.Module):
    """The branches side by side, concatenated and projected to 256 channels.

    `pooling_first` puts image-level features first in the concatenation (TensorFlow).
    """

    def __init__(
        self,
        inputs: int,
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
            nn.Sequential(*convolve(inputs, FILTERS, kernel, folded=folded), nn.ReLU())
            for kernel in (1, *[3] * branches)
        ]
        if image_pooling:
            pooled = convolve(inputs, FILTERS, folded=folded)
            convs.append(ImagePooling(nn.AdaptiveAvgPool2d(1), *pooled, nn.ReLU()))
        self.convs = nn.ModuleList(convs)
        self.project = nn.Sequential(
            *convolve(FILTERS * len(convs), FILTERS, folded=folded),
            nn.ReLU(),
            nn.Dropout(dropout),
        )

    def arrange(self, rates: Sequence[int]) -> None:
        """Sets the rates of the 3x3 branches; no weight changes."""
        for branch, rate in zip(self.convs[1 : 1 + self.branches], rates, strict=True):
            assert isinstance(branch, nn.Sequential)
            assert isinstance(branch[0], Convolution)
            branch[0].place(stride=1, rate=rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [branch(x) for branch in self.convs]
        if self.pooling_first:
            parts = [parts[-1], *parts[:-1]]
        projected: torch.Tensor = self.project(torch.cat(parts, dim=1))
        return projected


class Head(nn.Sequential):
    """ASPP, in torchvision's style another 3x3 convolution, then 1x1 to logits."""

    def __init__(self, inputs: int, config: ModelConfig) -> None:
        tensorflow = config.style == "tensorflow"
        aspp = ASPP(
            inputs,
            branches=len(config.atrous_rates),
            image_pooling=config.image_pooling,
            dropout=config.dropout,
            folded=tensorflow,
            pooling_first=tensorflow,
        )
        extra: list[nn.Module] = []
        if config.style == "torchvision":
            extra = [*convolve(FILTERS, FILTERS, 3), nn.ReLU()]
        super().__init__(aspp, *extra, Convolution(FILTERS, config.num_classes, bias=True))

    def arrange(self, rates: Sequence[int]) -> None:
        """Sets the rates of the 3x3 branches; no weight changes."""
        aspp = self[0]
        assert isinstance(aspp, ASPP)
        aspp.arrange(rates)


def auxiliary_head(inputs: int, num_classes: int) -> nn.Sequential:
    """torchvision's auxiliary FCN head: 3x3 to a quarter of the channels, then 1x1 to logits."""
    width = inputs // 4
    return nn.Sequential(
        *convolve(inputs, width, 3),
        nn.ReLU(),
        nn.Dropout(AUXILIARY_DROPOUT),
        Convolution(width, num_classes, bias=True),
    )
