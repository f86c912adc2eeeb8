"""What a backbone gives to a head: feature maps of three depths."""

from typing import NamedTuple

import torch


class Features(NamedTuple):
    """Feature maps (n, c, h, w) of a backbone.

    `low` is at stride 4, whatever the output stride, and feeds the decoder; `middle` is before
    the last natural stride of an ImageNet network, and feeds the auxiliary head; `final` is at
    the output stride.
    """

    low: torch.Tensor
    middle: torch.Tensor
    final: torch.Tensor
