"""Tests that need a GPU, which are skipped without one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    """Compute fp32 convolutions in fp32; by default a GPU uses TF32, with a 10-bit mantissa."""
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU on this machine")
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
