"""The convolution that every room of the network is built of, and its normalisation.

A `Convolution` pads so that stride 1 keeps the size, and can be given another stride and rate
after it is built: neither changes a weight.
"""

import torch
from torch import nn
from torch.nn import functional

from pipeline.model import depthwise_atrous
from pipeline.model.fused import Activation, Fused


class Convolution(nn.Conv2d):
    """A k x k convolution, k odd, padded by rate x (k // 2) zeros on every side.

    Where it is `fused` (by `speed.prepare`, for inference), it also adds and activates.
    """

    fused: Fused | None = None

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

    def forward(
        self,
        input: torch.Tensor,
        *,
        activation: Activation | None = None,
        other: torch.Tensor | None = None,
    ) -> torch.Tensor:
        input, padding = self._padded(input)
        stride, rate = self.stride[0], self.dilation[0]
        if self.fused is None:
            assert activation is None
            assert other is None
            if padding == (rate, rate) and depthwise_atrous.is_cheaper(
                input, self.weight, stride=stride, rate=rate
            ):
                return depthwise_atrous.by_phases(input, self.weight, self.bias, rate=rate)
            return functional.conv2d(
                input, self.weight, self.bias, stride, padding, rate, self.groups
            )
        return self.fused(
            input,
            self.weight,
            self.bias,
            stride=stride,
            padding=padding,
            rate=rate,
            groups=self.groups,
            activation=activation or self.fused.activation,
            other=other,
        )

    def _padded(self, input: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """The input, and the zeros still to be put on every side of its rows and columns."""
        padding = self.dilation[0] * (self.kernel_size[0] // 2)
        return input, (padding, padding)


class SameConvolution(Convolution):
    """A convolution padded like TensorFlow's SAME: ceil(n / stride) outputs, odd pixel last."""

    def _padded(self, input: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        top, bottom = self._padding(input.shape[-2])
        left, right = self._padding(input.shape[-1])
        if (top, left) == (bottom, right):
            return input, (top, left)
        return functional.pad(input, (left, right, top, bottom)), (0, 0)

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


def activate(
    conv: Convolution, norm: nn.Module, x: torch.Tensor, other: torch.Tensor | None = None
) -> torch.Tensor:
    """relu(norm(conv(x)) + other), in one pass where the convolution is fused."""
    if conv.fused is not None:
        return norm(conv(x, activation="relu", other=other))  # type: ignore[no-any-return]
    y = norm(conv(x))
    return functional.relu(y if other is None else y + other)


def initialise(module: nn.Module) -> None:
    """Sets fresh weights: He's normal by fan-out for convolutions, zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
