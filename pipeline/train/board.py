"""Where a run's workers write how it goes, and its driver reads it: a small actor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray

from pipeline.train.history import Score, Step


@dataclass(frozen=True, kw_only=True)
class Watched:
    """The newest step and the scores so far; None and () before the first."""

    row: Step | None
    scores: tuple[Score, ...]


class Board:
    """The actor."""

    def __init__(self) -> None:
        self._row: Step | None = None
        self._scores: dict[int, Score] = {}
        self._failure: str | None = None

    def now(self, row: Step, scored: Score | None) -> None:
        self._row = row
        if scored is not None:  # a resume may score a step again
            self._scores[scored.step] = scored

    def fail(self, message: str) -> None:
        """The first worker that cannot go on says why; the others only follow."""
        self._failure = self._failure or message

    def watched(self) -> Watched:
        return Watched(row=self._row, scores=tuple(self._scores.values()))

    def failure(self) -> str | None:
        return self._failure


class Teller:
    """A worker's words to the board: how it goes without waiting, a failure for certain."""

    def __init__(self, board: Any) -> None:
        self._board = board

    def now(self, row: Step, scored: Score | None) -> None:
        self._board.now.remote(row, scored)

    def fail(self, message: str) -> None:
        ray.get(self._board.fail.remote(message))
