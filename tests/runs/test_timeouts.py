"""A run waits for nodes as long as it was told, and for a sign of life less long."""

from __future__ import annotations

import logging

import pytest
import ray

from pipeline.runs.ray_connection import RunStoppedError
from pipeline.runs.timeouts import Patience


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def patience(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Patience:
    """600 s for a node with 2 CPUs and 1 GPU, of which there is none, and 300 s for a sign."""
    head = {"Alive": True, "Resources": {"CPU": 64.0}}
    gone = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [head, gone])
    return Patience(
        cpus=2,
        gpus=1,
        start_timeout_s=600,
        stall_timeout_s=300,
        stuck=lambda: "; shard 7",
        clock=clock,
    )


def test_waiting_is_said_every_half_minute_and_ends_when_it_was_told_to(
    patience: Patience, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(599):
            clock.now += 1
            patience.look(running=0)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 19
    assert (
        said[3] == "waiting for a node with 2 CPUs and 1 GPUs, 120 s so far (--start-timeout 600)"
    )
    clock.now += 1
    with pytest.raises(RunStoppedError, match=r"waiting for a node .* 600 s were in vain"):
        patience.look(running=0)


def test_a_node_that_is_there_but_has_no_process_yet_is_said_to_be(
    patience: Patience, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = {"Alive": True, "Resources": {"CPU": 2.0, "GPU": 1.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [node])
    clock.now += 600
    with pytest.raises(RunStoppedError, match=r"is there, busy or loading"):
        patience.look(running=0)


def test_processes_that_run_are_waited_for_as_long_as_something_moves(
    patience: Patience, clock: Clock
) -> None:
    clock.now += 599
    patience.look(running=1, moved=0)  # the wait is over
    for moved in range(10):
        clock.now += 299
        patience.look(running=1, moved=moved + 1)
    clock.now += 299
    patience.look(running=2, moved=10)  # another one came
    clock.now += 299
    patience.look(running=2, moved=10)
    clock.now += 1
    with pytest.raises(RunStoppedError, match=r"2 processes run, and for 300 s .*; shard 7"):
        patience.look(running=2, moved=10)


def test_processes_that_went_with_their_nodes_are_waited_for_anew(
    patience: Patience, clock: Clock
) -> None:
    patience.look(running=3, moved=5)
    clock.now += 299
    patience.look(running=0, moved=5)
    clock.now += 599
    patience.look(running=0, moved=6)  # a word that came late is no process
    clock.now += 1
    with pytest.raises(RunStoppedError, match="--start-timeout"):
        patience.look(running=0, moved=6)
