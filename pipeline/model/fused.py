"""A convolution for inference: with bias, addition and activation in one pass over its result.

Enters: a map, folded weights and what comes after the convolution. Leaves: the result. A
`Fused` on a `Convolution` makes it compute so; `speed.prepare` puts it there, training never.
On CPUs oneDNN does all in one pass: most of what compilation would save, for any size.
"""

import functools
import logging
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.nn import functional

from pipeline.model import atrous
from pipeline.model.resize import Size
from pipeline.text import first_line

Activation = Literal["none", "relu", "relu6"]

_ONEDNN: dict[Activation, tuple[str, list[float]]] = {
    "none": ("none", []), "relu": ("relu", []), "relu6": ("hardtanh", [0.0, 6.0])
}  # fmt: skip

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Fused:
    """How a convolution computes: `on` is the `atrous.engine`, `activation` what comes after.

    The weights must not change any more: where taps are shifted, a packed copy of them is kept.
    """

    on: str
    one_pass: bool
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
        other: torch.Tensor | None,
    ) -> torch.Tensor:
        """activation(convolution of `x` + bias + `other`), in the type of the weights."""
        x = x.to(weight.dtype)
        if weight.shape[-1] == 3 and atrous.is_shifted_cheaper(
            self.on, x.dtype, inputs=x.shape[1], groups=groups, size=(x.shape[2], x.shape[3]),
            rate=rate, stride=stride,
        ):  # fmt: skip
            self._packed = atrous.pack(weight, groups) if self._packed is None else self._packed
            y = atrous.shifted(x, self._packed, bias, stride=stride, padding=padding, rate=rate)
            return _finish(y, activation, other)
        place = ([stride, stride], list(padding), [rate, rate], groups)
        if self.one_pass:
            return _one_pass(x, weight, bias, place, activation, other)
        return _finish(functional.conv2d(x, weight, bias, *place), activation, other)


@functools.cache
def has_one_pass(dtype: torch.dtype) -> bool:
    """Whether this torch's oneDNN convolves with an activation, tried on a small map."""
    x = torch.linspace(-1, 1, 2 * 25, dtype=dtype).view(1, 2, 5, 5)
    weight = torch.linspace(1, -1, 2 * 2 * 9, dtype=dtype).view(2, 2, 3, 3)
    x, weight = (each.contiguous(memory_format=torch.channels_last) for each in (x, weight))
    place = ([1, 1], [1, 1], [1, 1], 1)
    try:
        found = _one_pass(x, weight, None, place, "relu6", None)
        added = _one_pass(x, weight, None, place, "relu", x)
    except (AttributeError, RuntimeError) as error:
        reason = first_line(error)
        logger.warning("activations are separate passes: oneDNN does not fuse them (%s)", reason)
        return False
    plain = functional.conv2d(x.float(), weight.float(), padding=1)
    close = functools.partial(torch.allclose, rtol=0.02, atol=0.02)
    if close(found.float(), plain.clamp(0, 6)) and close(added.float(), (plain + x.float()).relu()):
        return True
    logger.warning("activations are separate passes: oneDNN fuses them with a wrong result")
    return False


def _one_pass(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    place: tuple[list[int], list[int], list[int], int],
    activation: Activation,
    other: torch.Tensor | None,
) -> torch.Tensor:
    # As all maps are here; with channels first it has no addition in bf16.
    x = x.contiguous(memory_format=torch.channels_last)
    # What torch's own compiler calls; it has no public name.
    convolve: Any = torch.ops.mkldnn._convolution_pointwise
    stride, padding, rate, groups = place
    name, scalars = _ONEDNN[activation]
    where = (padding, stride, rate, groups)
    result: torch.Tensor
    if other is None:
        result = convolve(x, weight, bias, *where, name, scalars, "")
    else:
        unary = name if name != "none" else None
        result = convolve.binary(
            x, other, weight, bias, *where, "add", 1.0, unary, scalars, ""
        )  # fmt: skip
    return result


def _finish(y: torch.Tensor, activation: Activation, other: torch.Tensor | None) -> torch.Tensor:
    """`other` and the activation, in place."""
    if other is not None:
        y += other
    if activation == "relu":
        return y.relu_()
    return y.clamp_(0, 6) if activation == "relu6" else y
