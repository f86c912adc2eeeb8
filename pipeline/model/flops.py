"""Counts the operations of a network on an image size, layer by layer, without computing it."""

import copy
from typing import NamedTuple

import torch
from torch import nn

from pipeline.model.atrous import valid_tap_share
from pipeline.model.convolution import Convolution
from pipeline.model.deeplab import DeepLabV3
from pipeline.model.resize import Size


class OperationCount(NamedTuple):
    """Floating-point operations of all convolutions, two per multiply-accumulate.

    `nominal` counts every tap at every output, `executed` only the taps that fall on the map.
    """

    nominal: float
    executed: float


def count(model: DeepLabV3, size: Size) -> OperationCount:
    """Return the operations of `model.logits` on one image of `size` (h, w)."""
    counts: list[OperationCount] = []

    def add(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        assert isinstance(layer, Convolution)
        nominal = 2.0 * output.numel() * layer.weight[0].numel()
        rate, kernel_size = layer.dilation[0], layer.kernel_size[0]
        height, width = inputs[0].shape[-2:]
        share = valid_tap_share(
            (height, width),
            kernel_size=kernel_size,
            rate=rate,
            stride=layer.stride[0],
            padding=rate * (kernel_size // 2),
        )
        counts.append(OperationCount(nominal, nominal * share))

    shell = copy.deepcopy(model).to("meta").eval()
    for layer in shell.modules():
        if isinstance(layer, Convolution):
            layer.register_forward_hook(add)
    with torch.no_grad():
        shell.logits(torch.empty((1, 3, *size), device="meta"))
    return OperationCount(
        sum(each.nominal for each in counts), sum(each.executed for each in counts)
    )
