"""Heads: a backbone's features -> logits (n, k, h, w) at the output stride, or 4 with a decoder.

Names are those of published files: torchvision's for the ASPP and auxiliary heads; `project`,
`aspp` and `classifier` for the decoder. The last layer of each head computes the logits.
"""

from collections.abc import Sequence

import torch
from torch import nn

from pipeline.model.aspp import ASPP, ASPP_CHANNELS
from pipeline.model.config import ModelConfig
from pipeline.model.convolution import Convolution, build_conv_bn
from pipeline.model.features import Features
from pipeline.model.resize import resize

LOW_LEVEL_CHANNELS = 48
"""Few, so that they do not outweigh the encoder's 256 (arXiv 1802.02611, Table 1)."""

LOGITS_STD = 0.01
"""Of the initial weights of the last layer: the authors' code; the paper does not state it."""

AUXILIARY_DROPOUT = 0.1
"""torchvision's value; the auxiliary head is dropped after training."""


class AsppHead(nn.Sequential):
    """ASPP, the config's 3x3 convolutions, and a 1x1 convolution to logits."""

    def __init__(self, in_channels: int, config: ModelConfig) -> None:
        super().__init__(
            _build_aspp(in_channels, config),
            *_build_3x3_convs(ASPP_CHANNELS, config.convs),
            _build_logits(ASPP_CHANNELS, config),
        )

    def set_rates(self, rates: Sequence[int]) -> None:
        """Set the rates of the 3x3 branches; no weight changes."""
        aspp = self[0]
        assert isinstance(aspp, ASPP)
        aspp.set_rates(rates)

    def forward(self, input: Features) -> torch.Tensor:
        x = input.final
        for layer in self:
            x = layer(x)
        return x


class CascadeHead(nn.Sequential):
    """Dropout and a 1x1 convolution to logits. Source: arXiv 1706.05587, Sec. 3.2."""

    def __init__(self, in_channels: int, config: ModelConfig) -> None:
        super().__init__(nn.Dropout(config.dropout), _build_logits(in_channels, config))

    def set_rates(self, rates: Sequence[int]) -> None:
        """Do nothing: the rates of a cascade are set in its backbone."""
        assert not rates

    def forward(self, input: Features) -> torch.Tensor:
        x = input.final
        for layer in self:
            x = layer(x)
        return x


class DecoderHead(nn.Module):
    """DeepLabv3+: ASPP, upsampled to stride 4 and refined with low-level features, to logits.

    The low-level features are reduced to 48 channels and come first in the concatenation.
    Source: arXiv 1802.02611, Sec. 3.1 and 4.1.
    """

    def __init__(self, in_channels: int, low_channels: int, config: ModelConfig) -> None:
        super().__init__()
        self.project = nn.Sequential(*build_conv_bn(low_channels, LOW_LEVEL_CHANNELS), nn.ReLU())
        self.aspp = _build_aspp(in_channels, config)
        width = LOW_LEVEL_CHANNELS + ASPP_CHANNELS
        self.classifier = nn.Sequential(
            *_build_3x3_convs(width, config.convs),
            _build_logits(ASPP_CHANNELS if config.convs else width, config),
        )

    def set_rates(self, rates: Sequence[int]) -> None:
        """Set the rates of the 3x3 branches; no weight changes."""
        self.aspp.set_rates(rates)

    def forward(self, features: Features) -> torch.Tensor:
        low = self.project(features.low)
        size = (low.shape[-2], low.shape[-1])
        encoded = resize(self.aspp(features.final), size, align_corners=False)
        logits: torch.Tensor = self.classifier(torch.cat([low, encoded], dim=1))
        return logits


Head = AsppHead | CascadeHead | DecoderHead


def initialize_logits(head: nn.Module) -> None:
    """Give the head's last layer small weights, so that all classes start equally likely.

    He's initialization would make the first losses several times larger, and their gradients
    would undo the backbone's training.
    """
    *_, last = head.modules()
    assert isinstance(last, Convolution)
    nn.init.normal_(last.weight, std=LOGITS_STD)
    if last.bias is not None:
        nn.init.zeros_(last.bias)


def build_head(channels: int, low_channels: int, config: ModelConfig) -> Head:
    """Return the head of `config` for a backbone of `channels`, with `low_channels` at stride 4."""
    if config.head == "cascade":
        return CascadeHead(channels, config)
    if config.decoder:
        return DecoderHead(channels, low_channels, config)
    return AsppHead(channels, config)


def build_auxiliary_head(in_channels: int, num_classes: int) -> nn.Sequential:
    """Return torchvision's auxiliary FCN head: 3x3 to a quarter of the channels, 1x1 to logits."""
    width = in_channels // 4
    return nn.Sequential(
        *build_conv_bn(in_channels, width, 3),
        nn.ReLU(),
        nn.Dropout(AUXILIARY_DROPOUT),
        Convolution(width, num_classes, bias=True),
    )


def _build_aspp(in_channels: int, config: ModelConfig) -> ASPP:
    tensorflow = config.style == "tensorflow"
    return ASPP(
        in_channels,
        branches=len(config.atrous_rates),
        image_pooling=config.image_pooling,
        dropout=config.dropout,
        folded=tensorflow,
        pooling_first=tensorflow,
    )


def _build_3x3_convs(in_channels: int, convs: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for index in range(convs):
        channels = ASPP_CHANNELS if index else in_channels
        layers += [*build_conv_bn(channels, ASPP_CHANNELS, 3), nn.ReLU()]
    return layers


def _build_logits(in_channels: int, config: ModelConfig) -> Convolution:
    return Convolution(in_channels, config.num_classes, bias=True)
