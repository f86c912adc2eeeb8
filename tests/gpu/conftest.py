"""What only a GPU can show; without one these tests are skipped, and say so."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """fp32 is fp32: not the ten bits of mantissa that a GPU's convolutions take by default."""
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU here")
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
