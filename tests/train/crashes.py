"""Workers that crash, and a comparison of two runs at their end."""

from __future__ import annotations

from pathlib import Path

from pipeline.evaluation.score import Score
from pipeline.train.worker import checkpoints
from pipeline.train.worker.history import Step
from pipeline.train.worker.state import Snapshot
from tests.train.tiny import RecordingListener


class WorkerCrash(BaseException):
    """Stands for the end of a worker process."""


class CrashingListener(RecordingListener):
    """A listener that crashes its worker when step `at` is reported."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self._at = at

    def report_step(self, latest: Step, scored: Score | None) -> None:
        super().report_step(latest, scored)
        if latest.step == self._at:
            raise WorkerCrash


def content(snapshot: Snapshot) -> tuple[object, ...]:
    """Return all values of a snapshot except times and speeds."""
    history = snapshot.history
    return (
        {key: value.numpy().tobytes() for key, value in snapshot.tensors.items()},
        snapshot.step,
        [(row.step, row.loss, row.lr) for row in history.steps],
        [(score.step, score.miou, score.pixel_accuracy, score.ious) for score in history.scores],
        dict(snapshot.provenance),
    )


def newest(out: Path) -> Snapshot:
    """Return the newest checkpoint below `out`, which must exist."""
    found = checkpoints.latest(str(out))
    assert found is not None
    return found


def assert_same_end(out: Path, expected: Path) -> None:
    """Check that two finished runs have the same last checkpoint and networks, bit for bit."""
    assert content(newest(out)) == content(newest(expected))
    for name in ("model.safetensors", "best.safetensors"):
        assert (out / name).read_bytes() == (expected / name).read_bytes()
