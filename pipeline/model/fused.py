"""Fused convolution for inference: bias, residual and activation in one pass over the result.

`optimize_for_inference` sets a `FusedKernel` on every `Convolution`; training never uses it. On
CPUs oneDNN computes everything in one pass, which gives most of what compilation would save, for
images of any size.
"""

import functools
import logging
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from pipeline.model import atrous
from pipeline.model.resize import Size
from pipeline.model.torch_compat import Activation, onednn_convolution
from pipeline.text import first_line

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class FusedKernel:
    """How a convolution is computed at inference, and the activation that follows it.

    `engine` is that of `devices.engine`; `onednn` selects oneDNN's fused operator. The weights
    must not change afterwards: the kernel keeps a packed copy of those it uses tap by tap.
    """

    engine: str
    onednn: bool
    activation: Activation = "none"
    _packed: torch.Tensor | None = field(default=None, repr=False)

    def __call__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        stride: int,
        padding: Size,
        rate: int,
        groups: int,
        activation: Activation,
        residual: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return activation(conv2d(x) + bias + residual), in the type of the weights."""
        x = x.to(weight.dtype)
        if weight.shape[-1] == 3 and atrous.is_shifted_cheaper(
            self.engine,
            x.dtype,
            in_channels=x.shape[1],
            groups=groups,
            size=(x.shape[2], x.shape[3]),
            rate=rate,
            stride=stride,
        ):
            if self._packed is None:
                self._packed = atrous.pack(weight, groups)
            y = atrous.shifted_conv2d(
                x, self._packed, bias, stride=stride, padding=padding, rate=rate
            )
            return _add_and_activate(y, activation, residual)
        if self.onednn:
            return onednn_convolution(
                x,
                weight,
                bias,
                stride=stride,
                padding=padding,
                rate=rate,
                groups=groups,
                activation=activation,
                residual=residual,
            )
        y = functional.conv2d(x, weight, bias, stride, padding, rate, groups)
        return _add_and_activate(y, activation, residual)


@functools.cache
def onednn_fuses(dtype: torch.dtype) -> bool:
    """Return whether oneDNN fuses activations into convolutions of `dtype`, correctly.

    Tried on a small map; the reason is logged if not.
    """
    x = torch.linspace(-1, 1, 2 * 25, dtype=dtype).view(1, 2, 5, 5)
    weight = torch.linspace(1, -1, 2 * 2 * 9, dtype=dtype).view(2, 2, 3, 3)
    x, weight = (each.contiguous(memory_format=torch.channels_last) for each in (x, weight))
    convolve = functools.partial(
        onednn_convolution, x, weight, None, stride=1, padding=(1, 1), rate=1, groups=1
    )
    try:
        clipped = convolve(activation="relu6", residual=None)
        added = convolve(activation="relu", residual=x)
    except (AttributeError, RuntimeError) as error:
        logger.warning(
            "oneDNN does not fuse activations into convolutions; they take a pass of their own: %s",
            first_line(error),
        )
        return False
    plain = functional.conv2d(x.float(), weight.float(), padding=1)
    close = functools.partial(torch.allclose, rtol=0.02, atol=0.02)
    if close(clipped.float(), plain.clamp(0, 6)) and close(
        added.float(), (plain + x.float()).relu()
    ):
        return True
    logger.warning(
        "oneDNN fuses activations into convolutions with a wrong result; they take a pass of "
        "their own"
    )
    return False


def _add_and_activate(
    y: torch.Tensor, activation: Activation, residual: torch.Tensor | None
) -> torch.Tensor:
    """Add `residual` and apply the activation, in place."""
    if residual is not None:
        y += residual
    if activation == "relu":
        return y.relu_()
    return y.clamp_(0, 6) if activation == "relu6" else y
