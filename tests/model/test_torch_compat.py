"""Contracts with torch's private names: an upgrade that changes one of them fails here."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from pipeline.model import torch_compat

ADVICE = (
    f"torch {torch.__version__} changed a private name that pipeline/model/torch_compat.py uses: "
    "adapt that module, or pin the previous version in pyproject.toml and constraints.txt"
)


@pytest.mark.parametrize("probe", [torch_compat.has_amx, torch_compat.has_avx512_bf16])
def test_cpu_features_are_reported_as_a_bool(probe: Callable[[], bool]) -> None:
    try:
        found = probe()
    except (AttributeError, TypeError) as error:
        pytest.fail(f"{ADVICE} ({error})")
    assert isinstance(found, bool), ADVICE


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")
@pytest.mark.parametrize(
    ("activation", "added"),
    # oneDNN cannot add a residual before relu6
    [("none", False), ("relu", False), ("relu6", False), ("none", True), ("relu", True)],
)
def test_onednn_convolution_equals_conv2d_with_its_activation(
    activation: torch_compat.Activation, added: bool
) -> None:
    # Integers, which fp32 adds exactly in any order.
    draw = functools.partial(torch.randint, generator=torch.Generator().manual_seed(0))
    x, weight = draw(-3, 4, (2, 4, 9, 7)).float(), draw(-3, 4, (6, 2, 3, 3)).float()
    bias, residual = draw(-3, 4, (6,)).float(), draw(-9, 10, (2, 6, 5, 3)).float()
    wanted = functional.conv2d(x, weight, bias, stride=2, padding=(2, 1), dilation=2, groups=2)
    wanted = wanted + residual if added else wanted
    expected = {"none": wanted, "relu": wanted.relu(), "relu6": wanted.clamp(0, 6)}[activation]
    try:
        found = torch_compat.onednn_convolution(
            x,
            weight,
            bias,
            stride=2,
            padding=(2, 1),
            rate=2,
            groups=2,
            activation=activation,
            residual=residual.contiguous(memory_format=torch.channels_last) if added else None,
        )
    except (AttributeError, RuntimeError, TypeError) as error:
        pytest.fail(f"{ADVICE} ({error})")
    assert torch.equal(found, expected), ADVICE
    assert found.is_contiguous(memory_format=torch.channels_last)
