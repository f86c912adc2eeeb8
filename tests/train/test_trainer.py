"""What Ray Train is told."""

from __future__ import annotations

import pytest
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

from pipeline.train.trainer import _OnOurOwnRay


def callbacks(kind: type[TorchTrainer]) -> list[str]:
    made = kind(lambda: None, scaling_config=ScalingConfig(num_workers=1))
    return [type(each).__name__ for each in made._create_default_callbacks()]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_ray_that_ends_with_its_driver_has_nobody_who_frees_its_cpus() -> None:
    everywhere = callbacks(TorchTrainer)
    here = callbacks(_OnOurOwnRay)
    assert set(everywhere) - set(here) == {"PlacementGroupCleanerCallback"}
    assert len(here) == len(everywhere) - 1
