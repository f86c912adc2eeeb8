"""The backbone's feature maps that the heads consume."""

from typing import NamedTuple

import torch


class Features(NamedTuple):
    """Feature maps (n, c, h, w) of a backbone at three depths.

    `low` is at stride 4, whatever the output stride, and feeds the decoder. `middle` precedes the
    last natural stride of the ImageNet network, and feeds the auxiliary head. `final` is at the
    output stride.
    """

    low: torch.Tensor
    middle: torch.Tensor
    final: torch.Tensor
