"""Which network is exported, and which is kept as the best, also after crashes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.data import storage
from pipeline.evaluation.evaluate import Evaluation, evaluate
from pipeline.evaluation.score import Score
from pipeline.model import weights
from pipeline.train.worker import checkpoints, loop
from pipeline.train.worker.distributed import ProcessGroup, SaveCheckpoint
from tests.train import tiny
from tests.train.crashes import CrashingListener, WorkerCrash, assert_same_end, newest
from tests.train.tiny import RecordingListener

pytestmark = pytest.mark.slow


def test_the_exported_network_is_the_average_and_the_best_has_the_best_score(
    root: Path, uninterrupted: Path
) -> None:
    last = newest(uninterrupted)
    scores = {score.step: score.miou for score in last.history.scores}
    model, classes = weights.load(str(uninterrupted / "model.safetensors"))
    assert classes.names == tiny.CLASSES.names
    for key, value in model.state_dict().items():
        assert torch.equal(value, last.tensors[f"average.module.{key}"])
    best, _ = weights.load(str(uninterrupted / "best.safetensors"))
    best = best.to(memory_format=torch.channels_last)  # as the loop keeps it: rounding differs
    val = tiny.worker_spec(root, uninterrupted, tiny.experiment()).val
    found = evaluate(best, val, read=storage.read).miou
    assert found == pytest.approx(max(scores.values()), abs=1e-12)


def test_the_best_network_is_kept_when_later_scores_are_lower(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mious = iter((0.2, 0.7, 0.7, 0.1))

    def score(_: Evaluation, *, step: int, time: float) -> Score:
        return Score(step, time, next(mious), 0.5, (0.5,) * 4)

    monkeypatch.setattr(Evaluation, "score", score)
    copies: dict[int, bytes] = {}

    class CopyingGroup(ProcessGroup):
        def report(self, *given: Any, name: str, save: SaveCheckpoint | None) -> None:
            super().report(*given, name=name, save=save)
            copies[len(copies) + 1] = (tmp_path / "best.safetensors").read_bytes()

    what = tiny.experiment(ema_decay=0.0)
    what = replace(what, evaluation=replace(what.evaluation, eval_every=1))
    loop.train(tiny.worker_spec(root, tmp_path, what), CopyingGroup(), RecordingListener())
    assert copies[1] != copies[2]
    assert copies[2] == copies[3] == copies[4]


def set_scores(monkeypatch: pytest.MonkeyPatch, mious: dict[int, float]) -> None:
    """Make evaluations return these mIoUs, by step."""

    def score(_: Evaluation, *, step: int, time: float) -> Score:
        return Score(step, time, mious[step], 0.5, (0.5,) * 4)

    monkeypatch.setattr(Evaluation, "score", score)


def test_a_best_network_without_its_checkpoint_is_not_written(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny.worker_spec(root, tmp_path / "out", tiny.experiment())
    set_scores(monkeypatch, {2: 0.5, 4: 0.9})
    with pytest.raises(WorkerCrash):
        loop.train(spec, ProcessGroup(), CrashingListener(4))  # scored, but no checkpoint
    set_scores(monkeypatch, {2: 0.5, 4: 0.4})  # as another number of workers may give
    loop.train(spec, ProcessGroup(), RecordingListener())
    loop.train(
        tiny.worker_spec(root, tmp_path / "whole", tiny.experiment()),
        ProcessGroup(),
        RecordingListener(),
    )
    assert_same_end(tmp_path / "out", tmp_path / "whole")


def test_after_a_crash_between_checkpoint_and_best_network_it_is_written(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise WorkerCrash

    set_scores(monkeypatch, {2: 0.5, 4: 0.4})
    loop.train(
        tiny.worker_spec(root, tmp_path / "whole", tiny.experiment()),
        ProcessGroup(),
        RecordingListener(),
    )
    spec = tiny.worker_spec(root, tmp_path / "out", tiny.experiment())
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_best", crash)
        with pytest.raises(WorkerCrash):
            loop.train(spec, ProcessGroup(), RecordingListener())
    assert newest(tmp_path / "out").step == 2
    assert not (tmp_path / "out" / "best.safetensors").exists()
    loop.train(spec, ProcessGroup(), RecordingListener())
    assert_same_end(tmp_path / "out", tmp_path / "whole")


def test_a_best_network_written_in_the_background_is_the_one_that_was_scored(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deferred: list[SaveCheckpoint] = []

    class DeferringGroup(ProcessGroup):
        def report(self, *given: Any, name: str, save: SaveCheckpoint | None) -> None:
            assert save is not None
            deferred.append(save)

    set_scores(monkeypatch, {2: 0.5, 4: 0.4})
    loop.train(
        tiny.worker_spec(root, tmp_path / "now", tiny.experiment()),
        ProcessGroup(),
        RecordingListener(),
    )
    loop.train(
        tiny.worker_spec(root, tmp_path / "later", tiny.experiment()),
        DeferringGroup(),
        RecordingListener(),
    )
    assert not (tmp_path / "later" / "best.safetensors").exists()
    for save in deferred:
        save()
    assert_same_end(tmp_path / "later", tmp_path / "now")
