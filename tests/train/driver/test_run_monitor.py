"""The monitor interrupts a run that was taken over or has stalled, and nothing else does."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pipeline.runs.ray_connection import RunStoppedError
from pipeline.train.driver import fit, run_monitor
from pipeline.train.driver.run_monitor import OnStatus, RunMonitor
from pipeline.train.driver.status import Status, StatusActor
from pipeline.train.settings import TrainingSettings
from tests.train import tiny
from tests.train.driver.local_actor import LocalActor


def settings() -> TrainingSettings:
    return TrainingSettings(data="d", out="o", experiment=tiny.experiment(), cpus_per_worker=4)


@pytest.fixture
def interrupted() -> Iterator[threading.Event]:
    """An event that is set when this process is interrupted, instead of the interrupt."""
    event = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: event.set())
    yield event
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_monitor, "POLL_EVERY_S", 0.01)
    monkeypatch.setattr("ray.get", lambda value, **_: value)
    monkeypatch.setattr("ray.nodes", list)


@contextmanager
def monitoring(
    actor: StatusActor,
    *,
    lost: threading.Event | None = None,
    timeout_s: float = 60.0,
    on_status: OnStatus = lambda _: None,
) -> Iterator[RunMonitor]:
    timer = fit._stall_timer(settings())
    timer._start_timeout_s = timer._stall_timeout_s = timeout_s
    with RunMonitor(LocalActor(actor), on_status, lost or threading.Event(), timer) as monitor:
        yield monitor


def test_a_driver_whose_run_was_taken_over_is_interrupted(interrupted: threading.Event) -> None:
    lost = threading.Event()
    with monitoring(StatusActor(), lost=lost) as monitor:
        assert not interrupted.wait(0.1)
        lost.set()
        assert interrupted.wait(10)
    assert monitor.stopped == "another driver took over the run"


def test_a_display_that_fails_does_not_stop_the_monitoring(
    interrupted: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    shown: list[Status] = []

    def broken(status: Status) -> None:
        shown.append(status)
        raise BrokenPipeError("the terminal is closed")

    actor = StatusActor()
    actor.started(2, None)
    with monitoring(actor, timeout_s=0.3, on_status=broken) as monitor:
        assert interrupted.wait(10)
    assert monitor.stopped.startswith("the run stalled: 2 processes are running")
    assert len(shown) > 2
    assert caplog.text.count("cannot display the progress: the terminal is closed") == 1


@pytest.mark.parametrize(
    ("workers", "reason"),
    [
        (2, "2 processes are running, but no step was completed"),
        (0, "waiting for a node with 4 CPUs"),
    ],
)
def test_a_run_without_progress_is_stopped_with_the_reason(
    workers: int, reason: str, interrupted: threading.Event
) -> None:
    actor = StatusActor()
    if workers:
        actor.started(workers, None)
    with monitoring(actor, timeout_s=1.0) as monitor:
        for _ in range(20 if workers else 0):  # two seconds of a long evaluation
            actor.heartbeat()
            assert not interrupted.wait(0.1)
        assert interrupted.wait(10)
    assert reason in monitor.stopped


def test_after_a_crash_a_run_waits_as_long_as_for_its_first_start() -> None:
    now = 0.0
    timer = fit._stall_timer(settings())
    timer._clock = lambda: now
    timer._since = timer._logged_at = now
    actor = StatusActor()

    def check() -> None:
        status = actor.status()
        timer.check(status.workers, status.heartbeats)

    actor.started(2, None)
    check()
    actor.worker_crashed()
    actor.heartbeat()  # a late one, of the group that crashed
    check()
    now = settings().start_timeout - 1.0  # far longer than --stall-timeout
    check()
    actor.started(2, None)
    check()
    now += settings().stall_timeout
    with pytest.raises(RunStoppedError, match="no step was completed for 1800 s"):
        check()
