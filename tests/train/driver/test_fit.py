"""The size of workers is fitted to the cluster."""

from __future__ import annotations

import pytest

from pipeline.runs import ray_connection
from pipeline.train.driver import fit
from pipeline.train.settings import TrainingSettings
from tests.train import tiny


def test_worker_slots_are_counted_node_by_node(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 7.0, "GPU": 4.0}},
        {"Alive": True, "Resources": {"CPU": 64.0, "GPU": 1.0}},
        {"Alive": True, "Resources": {"memory": 5.0}},
        {"Alive": False, "Resources": {"CPU": 8.0, "GPU": 8.0}},
    ]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    assert ray_connection.worker_slots(2, 1.0) == 3 + 1
    assert ray_connection.worker_slots(2, 0.0) == 3 + 32


def fake_cluster(monkeypatch: pytest.MonkeyPatch, nodes: list[tuple[int, int]]) -> None:
    """Make Ray report a cluster whose nodes have these CPUs and GPUs."""
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    found = [{"Alive": True, "Resources": {"CPU": c, "GPU": g}} for c, g in nodes]
    monkeypatch.setattr("ray.nodes", lambda: found)


@pytest.mark.parametrize(
    ("given", "nodes", "gpus", "cpus"),
    [
        (None, [(2, 0)], 0.0, 1),  # the default would be 4
        (None, [(2, 0), (4, 0)], 0.0, 2),
        (None, [(64, 0)], 0.0, 4),
        (None, [(32, 4)], 1.0, 16),
        (None, [(13, 2), (13, 2)], 1.0, 13),
        (None, [(1, 0)], 0.0, 4),  # it may scale up
        (3, [(2, 0)], 0.0, 3),
        (2, [(64, 0)], 0.0, 2),
    ],
)
def test_workers_get_as_many_cpus_as_the_cluster_has_room_for(
    monkeypatch: pytest.MonkeyPatch,
    given: int | None,
    nodes: list[tuple[int, int]],
    gpus: float,
    cpus: int,
) -> None:
    fake_cluster(monkeypatch, nodes)
    lines: list[str] = []
    settings = TrainingSettings(
        data="d", out="o", experiment=tiny.experiment(), workers=(2,),
        cpus_per_worker=given, gpus_per_worker=gpus,
    )  # fmt: skip
    assert fit._fit_to_cluster(settings, lines.append).cpus == cpus
    waits = ray_connection.worker_slots(cpus, gpus) < 2
    assert len(lines) == waits
    assert all("--cpus-per-worker" in line for line in lines)


@pytest.mark.parametrize(
    ("workers", "nodes", "gpus", "cpus"),
    [
        ((1, 2), [(16, 2)], 1.0, 8),  # one of 16 would leave a GPU idle
        ((1, 2), [(16, 1)], 1.0, 16),  # a second one never fits
        ((1, 2), [(16, 1), (16, 1)], 1.0, 16),
        ((1, 4), [(32, 8)], 1.0, 8),  # at most four are wanted
        ((1, 3), [(6, 0)], 0.0, 2),
        ((2, 3), [(1, 0)], 0.0, 4),  # it may scale up
    ],
)
def test_cpus_are_chosen_for_as_many_workers_of_a_range_as_fit(
    monkeypatch: pytest.MonkeyPatch,
    workers: tuple[int, int],
    nodes: list[tuple[int, int]],
    gpus: float,
    cpus: int,
) -> None:
    fake_cluster(monkeypatch, nodes)
    settings = TrainingSettings(
        data="d", out="o", experiment=tiny.experiment(batch_size=4), workers=workers,
        gpus_per_worker=gpus,
    )  # fmt: skip
    assert fit._fit_to_cluster(settings, print).cpus == cpus
