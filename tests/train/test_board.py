"""What workers tell the board reaches who watches: scores, and each warning once."""

from __future__ import annotations

import logging
import signal
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from train import tiny

from jobs.training_display import TrainingDisplay
from pipeline.runs import cluster
from pipeline.train import fit
from pipeline.train.board import Board, Teller, Watched
from pipeline.train.history import Score
from pipeline.train.settings import Settings


class Called:
    """A board whose remote calls are calls."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._board, name))


def test_what_two_workers_warn_of_alike_is_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    board = Board()
    log = logging.getLogger("pipeline.a_worker")
    tellers = [Teller(Called(board)), Teller(Called(board))]
    for teller in tellers:
        log.addHandler(teller)
    try:
        log.warning("%s normalise by their own photos", "workers")
        log.info("nothing to tell")
    finally:
        for teller in tellers:
            log.removeHandler(teller)
    what = tiny.experiment()
    display = TrainingDisplay(Settings(data="d", out="o", experiment=what))
    display(board.watched())
    board.warn("another\x1b[2J")
    display(board.watched())
    assert capsys.readouterr().err.splitlines() == [
        "WARNING workers normalise by their own photos",
        "WARNING another\\x1b[2J",
    ]


def test_a_score_names_the_iou_of_every_class_that_val_has(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ious = (0.5, 0.25, None, 0.75)
    score = Score(step=4, time=0.0, miou=0.5, pixel_accuracy=0.9, ious=ious)
    display = TrainingDisplay(Settings(data="d", out="o", experiment=tiny.experiment()))
    display(Watched(row=None, scores=(score,)))
    said = capsys.readouterr().err
    assert "ground 50.0%, square 25.0%, never 75.0%" in said


def test_room_for_workers_is_counted_node_by_node(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 7.0, "GPU": 4.0}},
        {"Alive": True, "Resources": {"CPU": 64.0, "GPU": 1.0}},
        {"Alive": True, "Resources": {"memory": 5.0}},
        {"Alive": False, "Resources": {"CPU": 8.0, "GPU": 8.0}},
    ]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    assert cluster.room(2, 1.0) == 3 + 1
    assert cluster.room(2, 0.0) == 3 + 32


def test_a_driver_whose_run_was_taken_over_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "LOOK_EVERY_S", 0.01)
    raised = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: raised.set())
    monkeypatch.setattr("ray.get", lambda value, **_: value)
    lost = threading.Event()
    try:
        with fit._Watching(Called(Board()), lambda _: None, lost):
            assert not raised.wait(0.1)
            lost.set()
            assert raised.wait(10)
    finally:
        signal.signal(signal.SIGINT, before)
