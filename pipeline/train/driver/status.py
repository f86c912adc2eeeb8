"""Where a run's workers write how it goes, and its driver reads it: a small actor."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import ray

from pipeline.evaluation.score import Score
from pipeline.train.worker.history import Step


@dataclass(frozen=True, kw_only=True)
class Watched:
    """The newest step, the scores and the warnings so far; None and () before the first.

    `best` is the best score of the whole run, earlier drivers' included. `workers` train since the
    newest start, 0 before the first and after a death, and `signs` grows with whatever they do.
    """

    row: Step | None
    scores: tuple[Score, ...]
    warnings: tuple[str, ...] = ()
    best: Score | None = None
    workers: int = 0
    signs: int = 0


class Board:
    """The actor."""

    def __init__(self) -> None:
        self._row: Step | None = None
        self._scores: dict[int, Score] = {}
        self._failure: str | None = None
        self._warnings: dict[str, None] = {}
        self._best: Score | None = None
        self._workers = self._signs = 0

    def begins(self, workers: int, best: Score | None) -> None:
        self._workers, self._best = workers, best
        self._signs += 1

    def died(self) -> None:
        """None trains until a new group begins: what is waited for is a start, not a step."""
        self._workers = 0

    def lives(self) -> None:
        self._signs += 1

    def now(self, row: Step, scored: Score | None) -> None:
        self._signs += 1
        self._row = row
        if scored is not None:  # a resume may score a step again
            self._scores[scored.step] = scored
            if self._best is None or scored.miou > self._best.miou:
                self._best = scored

    def fail(self, message: str) -> None:
        """The first worker that cannot go on says why; the others only follow."""
        self._failure = self._failure or message

    def warn(self, message: str) -> None:
        """What several workers say alike is kept once."""
        self._warnings[message] = None

    def watched(self) -> Watched:
        return Watched(
            row=self._row,
            scores=tuple(self._scores.values()),
            warnings=tuple(self._warnings),
            best=self._best,
            workers=self._workers,
            signs=self._signs,
        )

    def failure(self) -> str | None:
        return self._failure


class Teller(logging.Handler):
    """A worker's words to the board: how it goes without waiting, a failure for certain.

    As a handler of the log it tells warnings too.
    """

    def __init__(self, board: Any) -> None:
        super().__init__(logging.WARNING)
        self._board = board

    def emit(self, record: logging.LogRecord) -> None:
        self._board.warn.remote(record.getMessage())

    def begins(self, workers: int, best: Score | None) -> None:
        self._board.begins.remote(workers, best)

    def lives(self) -> None:
        self._board.lives.remote()

    def now(self, row: Step, scored: Score | None) -> None:
        self._board.now.remote(row, scored)

    def fail(self, message: str) -> None:
        ray.get(self._board.fail.remote(message))
