"""Heads: a backbone's features -> logits (n, k, h, w), at the output stride or, decoded, at 4.

Names are those of published files: torchvision's for the ASPP head and the auxiliary one,
`project`, `aspp` and `classifier` for the decoder. The last layer of each head makes the logits.
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
"""Of a fresh last layer's weights; the paper states none, the authors' code has this."""

AUXILIARY_DROPOUT = 0.1
"""torchvision's; it belongs to a head that is left out after training."""


class AsppHead(nn.Sequential):
    """ASPP, the config's 3x3 convolutions, then 1x1 to logits."""

    def __init__(self, inputs: int, config: ModelConfig) -> None:
        super().__init__(
            _aspp(inputs, config),
            *_refine(ASPP_CHANNELS, config.convs),
            _logits(ASPP_CHANNELS, config),
        )

    def set_rates(self, rates: Sequence[int]) -> None:
        """Sets the rates of the 3x3 branches; no weight changes."""
        aspp = self[0]
        assert isinstance(aspp, ASPP)
        aspp.set_rates(rates)

    def forward(self, input: Features) -> torch.Tensor:
        x = input.final
        for layer in self:
            x = layer(x)
        return x


class CascadeHead(nn.Sequential):
    """1x1 to logits; dropout before it, as in the ASPP head. Source: arXiv 1706.05587, Sec. 3.2."""

    def __init__(self, inputs: int, config: ModelConfig) -> None:
        super().__init__(nn.Dropout(config.dropout), _logits(inputs, config))

    def set_rates(self, rates: Sequence[int]) -> None:
        """Does nothing: the rates of a cascade are its backbone's."""
        assert not rates

    def forward(self, input: Features) -> torch.Tensor:
        x = input.final
        for layer in self:
            x = layer(x)
        return x


class DecoderHead(nn.Module):
    """ASPP, upsampled to stride 4, refined together with low-level features there, to logits.

    The low-level features are reduced to 48 channels before the concatenation, and come first
    in it. Source: arXiv 1802.02611, Sec. 3.1 and 4.1.
    """

    def __init__(self, inputs: int, low: int, config: ModelConfig) -> None:
        super().__init__()
        self.project = nn.Sequential(*build_conv_bn(low, LOW_LEVEL_CHANNELS), nn.ReLU())
        self.aspp = _aspp(inputs, config)
        width = LOW_LEVEL_CHANNELS + ASPP_CHANNELS
        self.classifier = nn.Sequential(
            *_refine(width, config.convs), _logits(ASPP_CHANNELS if config.convs else width, config)
        )

    def set_rates(self, rates: Sequence[int]) -> None:
        """Sets the rates of the 3x3 branches; no weight changes."""
        self.aspp.set_rates(rates)

    def forward(self, features: Features) -> torch.Tensor:
        low = self.project(features.low)
        size = (low.shape[-2], low.shape[-1])
        encoded = resize(self.aspp(features.final), size, align_corners=False)
        logits: torch.Tensor = self.classifier(torch.cat([low, encoded], dim=1))
        return logits


Head = AsppHead | CascadeHead | DecoderHead


def initialize_logits(head: nn.Module) -> None:
    """Gives the head's last layer small fresh weights, so that every class begins as likely.

    He's would make the first losses several times that, and their gradients undo the backbone.
    """
    *_, last = head.modules()
    assert isinstance(last, Convolution)
    nn.init.normal_(last.weight, std=LOGITS_STD)
    if last.bias is not None:
        nn.init.zeros_(last.bias)


def build_head(channels: int, low_channels: int, config: ModelConfig) -> Head:
    """The head of `config` on a backbone's `channels`, and `low_channels` at stride 4."""
    if config.head == "cascade":
        return CascadeHead(channels, config)
    if config.decoder:
        return DecoderHead(channels, low_channels, config)
    return AsppHead(channels, config)


def build_auxiliary_head(inputs: int, num_classes: int) -> nn.Sequential:
    """torchvision's auxiliary FCN head: 3x3 to a quarter of the channels, then 1x1 to logits."""
    width = inputs // 4
    return nn.Sequential(
        *build_conv_bn(inputs, width, 3),
        nn.ReLU(),
        nn.Dropout(AUXILIARY_DROPOUT),
        Convolution(width, num_classes, bias=True),
    )


def _aspp(inputs: int, config: ModelConfig) -> ASPP:
    tensorflow = config.style == "tensorflow"
    return ASPP(
        inputs,
        branches=len(config.atrous_rates),
        image_pooling=config.image_pooling,
        dropout=config.dropout,
        folded=tensorflow,
        pooling_first=tensorflow,
    )


def _refine(inputs: int, convs: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for index in range(convs):
        layers += [*build_conv_bn(ASPP_CHANNELS if index else inputs, ASPP_CHANNELS, 3), nn.ReLU()]
    return layers


def _logits(inputs: int, config: ModelConfig) -> Convolution:
    return Convolution(inputs, config.num_classes, bias=True)
