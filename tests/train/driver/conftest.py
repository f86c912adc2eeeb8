"""Shared by the tests of the driver: a small dataset that each test may change."""

from pathlib import Path

import pytest

from tests.train import tiny


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a dataset of three training images and two of val."""
    tiny.write_dataset(tmp_path / "set", train=3, val=2)
    return tmp_path / "set"
