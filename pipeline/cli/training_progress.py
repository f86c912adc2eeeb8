"""Progress display of a training run: a step every few seconds, and each score on val."""

from __future__ import annotations

import contextlib
import sys
import time

from pipeline.cli.progress import duration
from pipeline.cli.sanitize import visible
from pipeline.data import labels
from pipeline.evaluation.score import Score
from pipeline.train.driver.status import Status
from pipeline.train.settings import TrainingSettings
from pipeline.train.worker.history import Step

LINE_EVERY_S = 5.0


class TrainingDisplay:
    """A display of a run's status on stderr; call it with every status."""

    def __init__(self, settings: TrainingSettings) -> None:
        self._augment = settings.experiment.augment
        self._max_steps = settings.experiment.optimizer.max_steps
        self._batch_size = settings.experiment.optimizer.batch_size
        self._classes = settings.experiment.data.classes
        self._scored = self._warned = 0
        self._step = -1
        self._next = 0.0

    def __enter__(self) -> TrainingDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError):  # the reader is gone
            sys.stderr.flush()

    def __call__(self, status: Status) -> None:
        for warning in status.warnings[self._warned :]:
            print(f"WARNING {visible(warning)}", file=sys.stderr)
        self._warned = len(status.warnings)
        for score in status.scores[self._scored :]:
            best = status.best or score
            print(
                f"val after step {score.step}: mIoU {score.miou:.2%} (best {best.miou:.2%}), "
                f"pixel accuracy {score.pixel_accuracy:.2%}",
                file=sys.stderr,
            )
            print(f"  {self._ious(score)}", file=sys.stderr)
        self._scored = len(status.scores)
        row, now = status.latest, time.monotonic()
        if row is None or row.step == self._step or now < self._next:
            return
        self._step, self._next = row.step, now + LINE_EVERY_S
        print(self._line(row), file=sys.stderr, flush=True)

    def _ious(self, score: Score) -> str:
        """Return the IoU of every class in val."""
        known = zip(labels.get_classes(self._classes).names, score.ious, strict=True)
        return ", ".join(f"{name} {iou:.1%}" for name, iou in known if iou is not None)

    def _line(self, row: Step) -> str:
        # its speed was measured on the previous step
        steps = self._augment.steps_like(row.step - 1, self._max_steps) - 1
        left = steps * self._batch_size / max(row.images_per_second, 1e-9)
        return (
            f"step {row.step} of {self._max_steps} ({row.step / self._max_steps:.0%}), "
            f"loss {row.loss:.4f}, lr {row.lr:.5f}, {row.images_per_second:.1f} images/s, "
            f"{row.wait_share:.0%} waiting for data, {duration(left)} left"
        )
