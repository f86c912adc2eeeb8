"""The estimate of a dry run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.train.driver.estimate import estimate
from tests.train import tiny


def test_a_dry_run_for_gpus_is_refused_on_a_machine_without_one(root: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    settings = tiny.settings(root, tmp_path / "out", tiny.experiment())
    with pytest.raises(ValueError, match="run it on a machine with one"):
        estimate(replace(settings, gpus_per_worker=1.0), print)


def test_an_estimate_times_steps_and_writes_nothing(root: Path, tmp_path: Path) -> None:
    settings = tiny.settings(root, tmp_path / "out", tiny.experiment(), dry_run=True)
    found = estimate(settings, print)
    assert found.step_s > 0
    assert found.seconds == pytest.approx(4 * found.step_s)
    assert 0 <= found.wait_share <= 1
    assert not (tmp_path / "out").exists()
