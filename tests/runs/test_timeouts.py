"""A run waits for nodes up to one timeout, and for progress up to another."""

from __future__ import annotations

import logging

import pytest
import ray

from pipeline.runs.ray_connection import RunStoppedError
from pipeline.runs.timeouts import StallTimer


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def timer(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> StallTimer:
    """600 s for a node with 2 CPUs and 1 GPU, which does not exist, and 300 s for progress."""
    head = {"Alive": True, "Resources": {"CPU": 64.0}}
    gone = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [head, gone])
    return StallTimer(
        cpus=2,
        gpus=1,
        start_timeout_s=600,
        stall_timeout_s=300,
        details=lambda: "; shard 7",
        clock=clock,
    )


def test_waiting_is_logged_every_half_minute_and_ends_at_the_timeout(
    timer: StallTimer, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(599):
            clock.now += 1
            timer.check(running=0)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 19
    assert messages[3] == (
        "waiting for a node with 2 CPUs and 1 GPUs, 120 s so far (--start-timeout 600)"
    )
    clock.now += 1
    with pytest.raises(RunStoppedError, match=r"gave up waiting for a node .* after 600 s"):
        timer.check(running=0)


def test_the_message_tells_a_busy_node_from_a_missing_one(
    timer: StallTimer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = {"Alive": True, "Resources": {"CPU": 2.0, "GPU": 1.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [node])
    clock.now += 600
    with pytest.raises(RunStoppedError, match=r"exists, busy or loading"):
        timer.check(running=0)


def test_a_run_continues_while_its_processes_make_progress(timer: StallTimer, clock: Clock) -> None:
    clock.now += 599
    timer.check(running=1, progress=0)  # the wait is over
    for progress in range(10):
        clock.now += 299
        timer.check(running=1, progress=progress + 1)
    clock.now += 299
    timer.check(running=2, progress=10)  # another process started
    clock.now += 299
    timer.check(running=2, progress=10)
    clock.now += 1
    with pytest.raises(
        RunStoppedError, match=r"2 processes are running, but .* for 300 s .*; shard 7"
    ):
        timer.check(running=2, progress=10)


def test_the_start_timeout_starts_over_when_all_processes_are_lost(
    timer: StallTimer, clock: Clock
) -> None:
    timer.check(running=3, progress=5)
    clock.now += 299
    timer.check(running=0, progress=5)
    clock.now += 599
    timer.check(running=0, progress=6)  # a late report is not a process
    clock.now += 1
    with pytest.raises(RunStoppedError, match="--start-timeout"):
        timer.check(running=0, progress=6)
