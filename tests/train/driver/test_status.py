"""What workers tell the board reaches who watches: scores, and each warning once."""

from __future__ import annotations

import logging
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.cli.training_progress import TrainingDisplay
from pipeline.evaluation.score import Score
from pipeline.runs import ray_connection
from pipeline.train.driver import fit
from pipeline.train.driver.status import Status, StatusActor, StatusReporter
from pipeline.train.recipes.experiment import AugmentConfig
from pipeline.train.settings import TrainingSettings
from pipeline.train.worker.history import Step
from tests.train import tiny


class Called:
    """A board whose remote calls are calls."""

    def __init__(self, board: StatusActor) -> None:
        self._board = board

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._board, name))


def test_what_two_workers_warn_of_alike_is_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    board = StatusActor()
    log = logging.getLogger("pipeline.a_worker")
    tellers = [StatusReporter(Called(board)), StatusReporter(Called(board))]
    for teller in tellers:
        log.addHandler(teller)
    try:
        log.warning("%s normalise by their own photos", "workers")
        log.info("nothing to tell")
    finally:
        for teller in tellers:
            log.removeHandler(teller)
    what = tiny.experiment()
    display = TrainingDisplay(TrainingSettings(data="d", out="o", experiment=what))
    display(board.status())
    board.warn("another\x1b[2J")
    display(board.status())
    assert capsys.readouterr().err.splitlines() == [
        "WARNING workers normalise by their own photos",
        "WARNING another\\x1b[2J",
    ]


def test_a_score_names_the_iou_of_every_class_that_val_has(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ious = (0.5, 0.25, None, 0.75)
    score = Score(step=4, time=0.0, miou=0.5, pixel_accuracy=0.9, ious=ious)
    display = TrainingDisplay(TrainingSettings(data="d", out="o", experiment=tiny.experiment()))
    display(Status(latest=None, scores=(score,)))
    said = capsys.readouterr().err
    assert "ground 50.0%, square 25.0%, never 75.0%" in said
    assert "mIoU 50.00% (best 50.00%)" in said


def test_after_a_resume_the_best_is_that_of_the_whole_run_and_time_left_knows_late_crops(
    capsys: pytest.CaptureFixture[str],
) -> None:
    what = tiny.experiment(max_steps=100, batch_size=4)
    augment = AugmentConfig(crop_size=(100, 100), late_crop_size=(200, 200), late_from=0.9)
    display = TrainingDisplay(
        TrainingSettings(data="d", out="o", experiment=replace(what, augment=augment))
    )
    board = StatusActor()
    board.started(1, Score(step=40, time=0.0, miou=0.75, pixel_accuracy=0.9, ious=(0.5,) * 4))
    scored = Score(step=80, time=0.0, miou=0.5, pixel_accuracy=0.9, ious=(0.5,) * 4)
    board.report_step(Step(80, 0.0, 0.1, 0.01, images_per_second=2.0, wait_share=0.0), scored)
    display(board.status())
    said = capsys.readouterr().err
    assert "mIoU 50.00% (best 75.00%)" in said
    # ten steps of 2 s, and ten that take four times as long
    assert "1 min 40 s left" in said


def test_room_for_workers_is_counted_node_by_node(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 7.0, "GPU": 4.0}},
        {"Alive": True, "Resources": {"CPU": 64.0, "GPU": 1.0}},
        {"Alive": True, "Resources": {"memory": 5.0}},
        {"Alive": False, "Resources": {"CPU": 8.0, "GPU": 8.0}},
    ]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    assert ray_connection.worker_slots(2, 1.0) == 3 + 1
    assert ray_connection.worker_slots(2, 0.0) == 3 + 32


def test_a_driver_whose_run_was_taken_over_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "POLL_EVERY_S", 0.01)
    raised = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: raised.set())
    monkeypatch.setattr("ray.get", lambda value, **_: value)
    lost = threading.Event()
    try:
        with watching(lost) as told:
            assert not raised.wait(0.1)
            lost.set()
            assert raised.wait(10)
        assert told.stopped == "another driver took the run over"
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_display_that_fails_does_not_keep_the_watch_from_its_work(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fit, "POLL_EVERY_S", 0.01)
    monkeypatch.setattr("ray.get", lambda value, **_: value)
    shown: list[Status] = []

    def broken(seen: Status) -> None:
        shown.append(seen)
        raise BrokenPipeError("nobody reads")

    board = StatusActor()
    board.started(2, None)
    raised = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: raised.set())
    try:
        with watching(threading.Event(), board, seconds=0.3, watch=broken) as told:
            assert raised.wait(10)
        assert told.stopped.startswith("the run stalled: 2 processes are running")
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(shown) > 2
    assert caplog.text.count("how the run goes cannot be shown: nobody reads") == 1


@pytest.mark.parametrize(
    ("workers", "said"),
    [
        (2, "2 processes are running, but no step was completed"),
        (0, "waiting for a node with 4 CPUs"),
    ],
)
def test_a_run_that_does_not_move_ends_and_says_what_it_waited_for(
    workers: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "POLL_EVERY_S", 0.01)
    monkeypatch.setattr("ray.get", lambda value, **_: value)
    monkeypatch.setattr("ray.nodes", list)
    board = StatusActor()
    if workers:
        board.started(workers, None)
    raised = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: raised.set())
    try:
        with watching(threading.Event(), board, seconds=1.0) as told:
            for _ in range(20 if workers else 0):  # two seconds of a long evaluation
                board.heartbeat()
                assert not raised.wait(0.1)
            assert raised.wait(10)
        assert re.search(said, told.stopped)
    finally:
        signal.signal(signal.SIGINT, before)


def test_after_a_death_a_run_waits_as_long_as_for_its_first_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ray.nodes", list)
    now = 0.0
    settings = TrainingSettings(data="d", out="o", experiment=tiny.experiment(), cpus_per_worker=4)
    timer = fit._stall_timer(settings)
    timer._clock = lambda: now
    timer._since = timer._logged_at = now
    board = StatusActor()

    def looks() -> None:
        seen = board.status()
        timer.check(seen.workers, seen.heartbeats)

    board.started(2, None)
    looks()
    board.worker_crashed()
    board.heartbeat()  # what the dead one's group still had to say
    looks()
    now = settings.start_timeout - 1.0  # far longer than --stall-timeout
    looks()
    board.started(2, None)
    looks()
    now += settings.stall_timeout
    with pytest.raises(
        ray_connection.RunStoppedError,
        match="2 processes are running, but no step was completed for 1800 s",
    ):
        looks()


@contextmanager
def watching(
    lost: threading.Event,
    board: StatusActor | None = None,
    *,
    seconds: float = 60.0,
    watch: fit.OnStatus = lambda _: None,
) -> Iterator[fit._RunMonitor]:
    settings = TrainingSettings(data="d", out="o", experiment=tiny.experiment(), cpus_per_worker=4)
    timer = fit._stall_timer(settings)
    timer._start_timeout_s = timer._stall_timeout_s = seconds
    watches = fit._RunMonitor(Called(board or StatusActor()), watch, lost, timer)
    with watches:
        yield watches


def a_cluster_of(monkeypatch: pytest.MonkeyPatch, nodes: list[tuple[int, int]]) -> None:
    """A cluster, as Ray tells of it, whose nodes have so many CPUs and GPUs."""
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    found = [{"Alive": True, "Resources": {"CPU": c, "GPU": g}} for c, g in nodes]
    monkeypatch.setattr("ray.nodes", lambda: found)


@pytest.mark.parametrize(
    ("given", "nodes", "gpus", "cpus"),
    [
        (None, [(2, 0)], 0.0, 1),  # by default it would be 4
        (None, [(2, 0), (4, 0)], 0.0, 2),
        (None, [(64, 0)], 0.0, 4),
        (None, [(32, 4)], 1.0, 16),
        (None, [(13, 2), (13, 2)], 1.0, 13),
        (None, [(1, 0)], 0.0, 4),  # it may grow
        (3, [(2, 0)], 0.0, 3),
        (2, [(64, 0)], 0.0, 2),
    ],
)
def test_workers_have_as_many_cpus_as_the_cluster_has_room_for(
    monkeypatch: pytest.MonkeyPatch,
    given: int | None,
    nodes: list[tuple[int, int]],
    gpus: float,
    cpus: int,
) -> None:
    a_cluster_of(monkeypatch, nodes)
    lines: list[str] = []
    settings = TrainingSettings(
        data="d", out="o", experiment=tiny.experiment(), workers=(2,),
        cpus_per_worker=given, gpus_per_worker=gpus,
    )  # fmt: skip
    assert fit._fit_to_cluster(settings, lines.append).cpus == cpus
    few = ray_connection.worker_slots(cpus, gpus) < 2
    assert len(lines) == few
    assert all("--cpus-per-worker" in line for line in lines)


@pytest.mark.parametrize(
    ("workers", "nodes", "gpus", "cpus"),
    [
        ((1, 2), [(16, 2)], 1.0, 8),  # one of 16 would leave a GPU idle
        ((1, 2), [(16, 1)], 1.0, 16),  # no size has room for a second
        ((1, 2), [(16, 1), (16, 1)], 1.0, 16),
        ((1, 4), [(32, 8)], 1.0, 8),  # more than four are not wanted
        ((1, 3), [(6, 0)], 0.0, 2),
        ((2, 3), [(1, 0)], 0.0, 4),  # it may grow
    ],
)
def test_of_a_range_as_many_workers_train_as_the_cluster_has_room_for(
    monkeypatch: pytest.MonkeyPatch,
    workers: tuple[int, int],
    nodes: list[tuple[int, int]],
    gpus: float,
    cpus: int,
) -> None:
    a_cluster_of(monkeypatch, nodes)
    settings = TrainingSettings(
        data="d", out="o", experiment=tiny.experiment(batch_size=4), workers=workers,
        gpus_per_worker=gpus,
    )  # fmt: skip
    assert fit._fit_to_cluster(settings, print).cpus == cpus
