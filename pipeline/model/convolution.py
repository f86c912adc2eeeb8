"""The convolution that every part of the network is built of, and its batch normalization.

A `Convolution` pads so that stride 1 keeps the size. Its stride and rate can be changed after it
is built, which changes no weight.
"""

import torch
from torch import nn
from torch.nn import functional

from pipeline.model import depthwise_atrous
from pipeline.model.fused import FusedKernel
from pipeline.model.torch_compat import Activation


class Convolution(nn.Conv2d):
    """A k x k convolution, k odd, padded by rate x (k // 2) zeros on every side.

    With a `fused` kernel (set by `optimize_for_inference`) it also adds and activates.
    """

    fused: FusedKernel | None = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        *,
        stride: int = 1,
        rate: int = 1,
        groups: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, groups=groups, bias=bias)
        self.set_stride_and_rate(stride=stride, rate=rate)

    def set_stride_and_rate(self, *, stride: int, rate: int) -> None:
        """Set stride and rate, and the padding that follows from them."""
        size = self.kernel_size[0]
        self.stride = (stride, stride)
        self.dilation = (rate, rate)
        self.padding = (rate * (size // 2), rate * (size // 2))

    def forward(
        self,
        input: torch.Tensor,
        *,
        activation: Activation | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the convolution of maps (n, c, h, w).

        `activation` and `residual` are for fused convolutions only.
        """
        input, padding = self._pad(input)
        stride, rate = self.stride[0], self.dilation[0]
        if self.fused is None:
            assert activation is None
            assert residual is None
            if padding == (rate, rate) and depthwise_atrous.is_cheaper(
                input, self.weight, stride=stride, rate=rate
            ):
                return depthwise_atrous.space_to_batch_conv2d(
                    input, self.weight, self.bias, rate=rate
                )
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
            residual=residual,
        )

    def _pad(self, input: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """Return the input, and the zeros that are still to be added on each side (h, w)."""
        padding = self.dilation[0] * (self.kernel_size[0] // 2)
        return input, (padding, padding)


class SameConvolution(Convolution):
    """A convolution with TensorFlow's SAME padding: ceil(n / stride) outputs.

    An odd number of zeros puts the extra one below and on the right.
    """

    def _pad(self, input: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        top, bottom = self._same_padding(input.shape[-2])
        left, right = self._same_padding(input.shape[-1])
        if (top, left) == (bottom, right):
            return input, (top, left)
        return functional.pad(input, (left, right, top, bottom)), (0, 0)

    def _same_padding(self, size: int) -> tuple[int, int]:
        stride, reach = self.stride[0], (self.kernel_size[0] - 1) * self.dilation[0] + 1
        total = max((-(-size // stride) - 1) * stride + reach - size, 0)
        return total // 2, total - total // 2


class BatchNorm(nn.BatchNorm2d):
    """Batch normalization that explains how to avoid a batch of one value per channel."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.training and input.shape[0] * input.shape[2] * input.shape[3] == 1:
            raise ValueError(
                f"batch normalization in training needs more than one value per channel, got a "
                f"feature map of shape {tuple(input.shape)} (image pooling makes it 1 x 1): give "
                "each worker a batch of at least 2, freeze batch normalization, or call eval()"
            )
        return super().forward(input)


def build_conv_bn(
    in_channels: int,
    out_channels: int,
    kernel_size: int = 1,
    *,
    stride: int = 1,
    rate: int = 1,
    groups: int = 1,
    folded: bool = False,
) -> tuple[Convolution, nn.Module]:
    """Return a convolution and its batch normalization.

    With `folded` (TensorFlow's style) the convolution has SAME padding and a bias that stands for
    the normalization, whose place an `Identity` takes to keep the numbering of the layers.
    """
    kind = SameConvolution if folded else Convolution
    conv = kind(
        in_channels, out_channels, kernel_size, stride=stride, rate=rate, groups=groups, bias=folded
    )
    return conv, nn.Identity() if folded else BatchNorm(out_channels)


def conv_bn_relu(
    conv: Convolution, bn: nn.Module, x: torch.Tensor, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """Return relu(bn(conv(x)) + residual), in one pass if the convolution is fused."""
    if conv.fused is not None:
        return bn(conv(x, activation="relu", residual=residual))  # type: ignore[no-any-return]
    y = bn(conv(x))
    return functional.relu(y if residual is None else y + residual)


def initialize_weights(module: nn.Module) -> None:
    """Initialize all convolutions: He's normal by fan-out (arXiv 1502.01852), zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
