"""Shared fixtures: restore the number of torch threads after each test."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """A job that looks or times in its own process sets their number."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
