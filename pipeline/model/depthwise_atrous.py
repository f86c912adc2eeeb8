"""Depthwise atrous convolution by space-to-batch, which CPUs train several times faster.

At rate r a pixel is combined only with pixels whose row and column differ from its own by
multiples of r. The map therefore splits into r x r phases, each of which an undilated convolution
computes. oneDNN has a fast backward pass for undilated depthwise convolutions only.
"""

import torch
from torch.nn import functional


def is_cheaper(x: torch.Tensor, weight: torch.Tensor, *, stride: int, rate: int) -> bool:
    """Return whether `space_to_batch_conv2d` is faster for a 3x3 convolution of `x` (n, c, h, w).

    In training on a CPU it takes a quarter to a third of conv2d's time (AVX2, one thread). For
    the forward pass alone conv2d is faster; GPUs are not measured.
    """
    depthwise = weight.shape[1] == 1 and weight.shape[0] == x.shape[1]
    on_cpu = x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last)
    return torch.is_grad_enabled() and depthwise and on_cpu and stride == 1 and rate > 1


def space_to_batch_conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, rate: int
) -> torch.Tensor:
    """Return the convolution of maps (n, c, h, w) with (c, 1, 3, 3), padded by `rate`: same shape.

    Zeros that complete the last phases lie where conv2d has its padding.
    """
    n, c, height, width = x.shape
    x = functional.pad(x, (0, -width % rate, 0, -height % rate))
    rows, columns = x.shape[2] // rate, x.shape[3] // rate
    # axes: n, y, phase of y, x, phase of x, c: channels last throughout
    split = x.permute(0, 2, 3, 1).reshape(n, rows, rate, columns, rate, c)
    phases = split.permute(0, 2, 4, 1, 3, 5).reshape(n * rate * rate, rows, columns, c)
    done = functional.conv2d(phases.permute(0, 3, 1, 2), weight, bias, padding=1, groups=c)
    split = done.permute(0, 2, 3, 1).reshape(n, rate, rate, rows, columns, c)
    whole = split.permute(0, 3, 1, 4, 2, 5).reshape(n, rows * rate, columns * rate, c)
    return whole[:, :height, :width].permute(0, 3, 1, 2)
