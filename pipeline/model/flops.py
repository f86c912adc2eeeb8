"""How much a network computes on images of a size: counted layer by layer, computing nothing."""

import copy
from typing import NamedTuple

import torch
from torch import nn

from pipeline.model.atrous import seen_share
from pipeline.model.convolution import Convolution
from pipeline.model.deeplab import DeepLabV3
from pipeline.model.resize import Size


class Work(NamedTuple):
    """Floating point operations, two a multiply-accumulate, of all convolutions.

    `nominal` counts every tap at every place, `executed` those taps that see the map alone.
    """

    nominal: float
    executed: float


def count(model: DeepLabV3, size: Size) -> Work:
    """The work of `model.logits` on one image of `size` (h, w)."""
    found: list[Work] = []

    def add(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        assert isinstance(layer, Convolution)
        nominal = 2.0 * output.numel() * layer.weight[0].numel()
        rate, kernel = layer.dilation[0], layer.kernel_size[0]
        height, width = inputs[0].shape[-2:]
        share = seen_share(
            (height, width),
            kernel=kernel,
            rate=rate,
            stride=layer.stride[0],
            padding=rate * (kernel // 2),
        )
        found.append(Work(nominal, nominal * share))

    shell = copy.deepcopy(model).to("meta").eval()
    for layer in shell.modules():
        if isinstance(layer, Convolution):
            layer.register_forward_hook(add)
    with torch.no_grad():
        shell.logits(torch.empty((1, 3, *size), device="meta"))
    return Work(sum(each.nominal for each in found), sum(each.executed for each in found))
