"""Depthwise atrous convolution by space-to-batch against dilated conv2d."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from pipeline.model import depthwise_atrous
from pipeline.model.convolution import Convolution


@pytest.mark.parametrize("rate", [2, 3, 4])
@pytest.mark.parametrize("size", [(5, 7), (8, 8), (21, 13), (1, 3)])
def test_space_to_batch_equals_dilated_conv2d_forward_and_backward(
    rate: int, size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, *size, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    weight = torch.randn(6, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    ours = depthwise_atrous.space_to_batch_conv2d(x, weight, bias, rate=rate)
    theirs = functional.conv2d(x, weight, bias, padding=rate, dilation=rate, groups=6)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    upstream = torch.randn_like(theirs)
    for mine, other in zip(
        torch.autograd.grad(ours, (x, weight, bias), upstream),
        torch.autograd.grad(theirs, (x, weight, bias), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def test_a_convolution_uses_space_to_batch_only_in_training() -> None:
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    layer = Convolution(4, 4, 3, rate=2, groups=4).double()
    taken = depthwise_atrous.is_cheaper(x, layer.weight, stride=1, rate=2)
    with torch.inference_mode():
        kept = depthwise_atrous.is_cheaper(x, layer.weight, stride=1, rate=2)
    assert (taken, kept) == (True, False)
    torch.testing.assert_close(layer(x), layer(x.contiguous()), rtol=0, atol=1e-12)
    assert not depthwise_atrous.is_cheaper(x, layer.weight, stride=1, rate=1)
    assert not depthwise_atrous.is_cheaper(x, torch.randn(4, 4, 3, 3), stride=1, rate=2)
