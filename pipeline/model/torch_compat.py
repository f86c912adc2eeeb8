"""Every private name of torch that this project uses, with a contract test for each.

An upgrade of torch that changes one of them fails in `tests/model/test_torch_compat.py`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

Activation = Literal["none", "relu", "relu6"]

_ONEDNN_ACTIVATIONS: dict[Activation, tuple[str, list[float]]] = {
    "none": ("none", []),
    "relu": ("relu", []),
    "relu6": ("hardtanh", [0.0, 6.0]),
}
"""oneDNN's name of each activation, and its scalar arguments."""


def has_amx() -> bool:
    """Return whether this CPU has AMX tiles."""
    return bool(torch.cpu._is_amx_tile_supported())


def has_avx512_bf16() -> bool:
    """Return whether this CPU has the bf16 instructions of AVX-512."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def onednn_convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    stride: int,
    padding: tuple[int, int],
    rate: int,
    groups: int,
    activation: Activation,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """Return activation(conv2d(x) + bias + residual), computed by oneDNN in one pass, on a CPU.

    The result is channels last. Raises AttributeError if this torch lacks the operator,
    RuntimeError if oneDNN cannot compute it (a residual before relu6 it cannot).
    """
    # With channels first, oneDNN has no fused addition in bf16.
    x = x.contiguous(memory_format=torch.channels_last)
    # torch.compile calls these operators; they have no public name.
    convolve: Any = torch.ops.mkldnn._convolution_pointwise
    name, scalars = _ONEDNN_ACTIVATIONS[activation]
    geometry = (list(padding), [stride, stride], [rate, rate], groups)
    result: torch.Tensor
    if residual is None:
        result = convolve(x, weight, bias, *geometry, name, scalars, "")
    else:
        unary = name if name != "none" else None
        result = convolve.binary(
            x, residual, weight, bias, *geometry, "add", 1.0, unary, scalars, ""
        )
    return result
