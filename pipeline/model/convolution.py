"""The convolution that every room of the network is built of, and its normalisation.

A `Convolution` pads so that stride 1 keeps the size, and can be given another stride and rate
after it is built: neither changes a weight.
"""

import torch
from torch import nn
from torch.nn import functional


class Convolution(nn.Conv2d):
    """A k x k convolution, k odd, padded by rate x (k // 2) zeros on every side."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        *,
        stride: int = 1,
        rate: int = 1,
        groups: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__(inputs, outputs, kernel, groups=groups, bias=bias)
        self.place(stride=stride, rate=rate)

    def place(self, *, stride: int, rate: int) -> None:
        """Sets stride and rate, and the padding that belongs to them."""
        size = self.kernel_size[0]
        self.stride = (stride, stride)
        self.dilation = (rate, rate)
        self.padding = (rate * (size // 2), rate * (size // 2))


class SameConvolution(Convolution):
    """A convolution padded like TensorFlow's SAME: ceil(n / stride) outputs, odd pixel last."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        top, bottom = self._padding(input.shape[-2])
        left, right = self._padding(input.shape[-1])
        padding = (top, left)
        if (top, left) != (bottom, right):
            input = functional.pad(input, (left, right, top, bottom))
            padding = (0, 0)
        return functional.conv2d(
            input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups
        )

    def _padding(self, size: int) -> tuple[int, int]:
        stride, reach = self.stride[0], (self.kernel_size[0] - 1) * self.dilation[0] + 1
        total = max((-(-size // stride) - 1) * stride + reach - size, 0)
        return total // 2, total - total // 2


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation that says what is wrong with a batch of one value a channel."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.training and input.shape[0] * input.shape[2] * input.shape[3] == 1:
            raise ValueError(
                f"batch normalisation in training needs more than one value a channel, got a "
                f"feature map of shape {tuple(input.shape)} (image pooling makes it 1 x 1): give "
                "each worker a batch of at least 2, freeze batch normalisation, or call eval()"
            )
        return super().forward(input)


def convolve(
    inputs: int,
    outputs: int,
    kernel: int = 1,
    *,
    stride: int = 1,
    rate: int = 1,
    groups: int = 1,
    folded: bool = False,
) -> tuple[Convolution, nn.Module]:
    """A convolution and its batch normalisation.

    Where `folded` (TensorFlow's style), the normalisation is in the convolution's bias, padding
    is SAME, and an `Identity` keeps the numbering of the layers.
    """
    kind = SameConvolution if folded else Convolution
    layer = kind(inputs, outputs, kernel, stride=stride, rate=rate, groups=groups, bias=folded)
    return layer, nn.Identity() if folded else BatchNorm(outputs)


def initialise(module: nn.Module) -> None:
    """Sets fresh weights: He's normal by fan-out for convolutions, zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
