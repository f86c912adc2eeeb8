"""Workers that die, and what two runs must have alike at their end."""

from __future__ import annotations

from pathlib import Path

from pipeline.evaluation.score import Score
from pipeline.train.worker import checkpoints
from pipeline.train.worker.history import Step
from pipeline.train.worker.state import Snapshot
from tests.train.tiny import RecordingListener


class WorkerCrash(BaseException):
    """What a worker dies of."""


class CrashingListener(RecordingListener):
    """A listener whose worker dies when it tells of step `at`."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self._at = at

    def report_step(self, row: Step, scored: Score | None) -> None:
        super().report_step(row, scored)
        if row.step == self._at:
            raise WorkerCrash


def content(snapshot: Snapshot) -> tuple[object, ...]:
    """All of it but the times."""
    history = snapshot.history
    return (
        {key: value.numpy().tobytes() for key, value in snapshot.tensors.items()},
        snapshot.step,
        [(each.step, each.loss, each.lr) for each in history.steps],
        [(each.step, each.miou, each.pixel_accuracy, each.ious) for each in history.scores],
        dict(snapshot.provenance),
    )


def newest(out: Path) -> Snapshot:
    found = checkpoints.latest(str(out))
    assert found is not None
    return found


def assert_same_end(out: Path, expected: Path) -> None:
    assert content(newest(out)) == content(newest(expected))
    for name in ("model.safetensors", "best.safetensors"):
        assert (out / name).read_bytes() == (expected / name).read_bytes()
