"""The status of a training run: workers report to a small actor, and the driver polls it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import ray

from pipeline.evaluation.score import Score
from pipeline.train.worker.history import Step


@dataclass(frozen=True, kw_only=True)
class Status:
    """The latest step, all scores and warnings so far; `latest` is None before the first step.

    `best` is the best score of the whole run, including earlier drivers'. `workers` is the number
    of workers training since the last start: 0 before the first start and after a crash.
    `heartbeats` grows with every report.
    """

    latest: Step | None
    scores: tuple[Score, ...]
    warnings: tuple[str, ...] = ()
    best: Score | None = None
    workers: int = 0
    heartbeats: int = 0


class StatusActor:
    """The actor that holds the status."""

    def __init__(self) -> None:
        self._latest: Step | None = None
        self._scores: dict[int, Score] = {}
        self._failure: str | None = None
        self._warnings: dict[str, None] = {}
        self._best: Score | None = None
        self._workers = self._heartbeats = 0

    def started(self, workers: int, best: Score | None) -> None:
        self._workers, self._best = workers, best
        self._heartbeats += 1

    def worker_crashed(self) -> None:
        """Record that no worker trains until a new group starts; the driver waits for a start."""
        self._workers = 0

    def heartbeat(self) -> None:
        self._heartbeats += 1

    def report_step(self, latest: Step, scored: Score | None) -> None:
        self._heartbeats += 1
        self._latest = latest
        if scored is not None:  # a resumed run may score a step again
            self._scores[scored.step] = scored
            if self._best is None or scored.miou > self._best.miou:
                self._best = scored

    def fail(self, message: str) -> None:
        """Keep the first failure: the other workers only stop because of it."""
        self._failure = self._failure or message

    def warn(self, message: str) -> None:
        """Keep each message once, however many workers send it."""
        self._warnings[message] = None

    def status(self) -> Status:
        return Status(
            latest=self._latest,
            scores=tuple(self._scores.values()),
            warnings=tuple(self._warnings),
            best=self._best,
            workers=self._workers,
            heartbeats=self._heartbeats,
        )

    def failure(self) -> str | None:
        return self._failure


class StatusReporter(logging.Handler):
    """A client of the status actor, for the progress of one worker.

    As a logging handler it sends warnings too. Only `fail` waits until the actor has the message.
    """

    def __init__(self, actor: Any) -> None:
        super().__init__(logging.WARNING)
        self._actor = actor

    def emit(self, record: logging.LogRecord) -> None:
        self._actor.warn.remote(record.getMessage())

    def started(self, workers: int, best: Score | None) -> None:
        self._actor.started.remote(workers, best)

    def heartbeat(self) -> None:
        self._actor.heartbeat.remote()

    def report_step(self, latest: Step, scored: Score | None) -> None:
        self._actor.report_step.remote(latest, scored)

    def fail(self, message: str) -> None:
        ray.get(self._actor.fail.remote(message))
