"""Which network ships, and which is kept as the best, whatever dies on the way."""

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


def test_the_network_that_ships_is_the_average_and_the_best_is_that_of_the_best_score(
    root: Path, undisturbed: Path
) -> None:
    last = newest(undisturbed)
    scores = {each.step: each.miou for each in last.history.scores}
    model, classes = weights.load(str(undisturbed / "model.safetensors"))
    assert classes.names == tiny.CLASSES.names
    for key, value in model.state_dict().items():
        assert torch.equal(value, last.tensors[f"average.module.{key}"])
    best, _ = weights.load(str(undisturbed / "best.safetensors"))
    best = best.to(memory_format=torch.channels_last)  # as the loop keeps it: rounding differs
    val = tiny.worker_spec(root, undisturbed, tiny.experiment()).val
    found = evaluate(best, val, read=storage.read).miou
    assert found == pytest.approx(max(scores.values()), abs=1e-12)


def test_the_best_is_kept_where_later_scores_are_lower(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mious = iter((0.2, 0.7, 0.7, 0.1))

    def score(_: Evaluation, *, step: int, time: float) -> Score:
        return Score(step, time, next(mious), 0.5, (0.5,) * 4)

    monkeypatch.setattr(Evaluation, "score", score)
    kept: dict[int, bytes] = {}

    class Keeps(ProcessGroup):
        def report(self, *given: Any, name: str, save: SaveCheckpoint | None) -> None:
            super().report(*given, name=name, save=save)
            kept[len(kept) + 1] = (tmp_path / "best.safetensors").read_bytes()

    what = tiny.experiment(ema_decay=0.0)
    what = replace(what, evaluation=replace(what.evaluation, eval_every=1))
    loop.train(tiny.worker_spec(root, tmp_path, what), Keeps(), RecordingListener())
    assert kept[1] != kept[2]
    assert kept[2] == kept[3] == kept[4]


def score_so(monkeypatch: pytest.MonkeyPatch, mious: dict[int, float]) -> None:
    """Scores are these, by step."""

    def score(_: Evaluation, *, step: int, time: float) -> Score:
        return Score(step, time, mious[step], 0.5, (0.5,) * 4)

    monkeypatch.setattr(Evaluation, "score", score)


def test_a_best_whose_checkpoint_was_never_put_does_not_replace_that_of_the_history(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tiny.worker_spec(root, tmp_path / "out", tiny.experiment())
    score_so(monkeypatch, {2: 0.5, 4: 0.9})
    with pytest.raises(WorkerCrash):
        loop.train(task, ProcessGroup(), CrashingListener(4))  # it has its score, and no checkpoint
    score_so(monkeypatch, {2: 0.5, 4: 0.4})  # as another number of workers may score
    loop.train(task, ProcessGroup(), RecordingListener())
    loop.train(
        tiny.worker_spec(root, tmp_path / "whole", tiny.experiment()),
        ProcessGroup(),
        RecordingListener(),
    )
    assert_same_end(tmp_path / "out", tmp_path / "whole")


def test_a_death_between_a_checkpoint_and_its_best_is_made_good(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: object) -> None:
        raise WorkerCrash

    score_so(monkeypatch, {2: 0.5, 4: 0.4})
    loop.train(
        tiny.worker_spec(root, tmp_path / "whole", tiny.experiment()),
        ProcessGroup(),
        RecordingListener(),
    )
    task = tiny.worker_spec(root, tmp_path / "out", tiny.experiment())
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_best", dies)
        with pytest.raises(WorkerCrash):
            loop.train(task, ProcessGroup(), RecordingListener())
    assert newest(tmp_path / "out").step == 2
    assert not (tmp_path / "out" / "best.safetensors").exists()
    loop.train(task, ProcessGroup(), RecordingListener())
    assert_same_end(tmp_path / "out", tmp_path / "whole")


def test_a_best_that_is_put_while_training_goes_on_is_the_network_that_was_scored(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later: list[SaveCheckpoint] = []

    class PutsLater(ProcessGroup):
        def report(self, *given: Any, name: str, save: SaveCheckpoint | None) -> None:
            assert save is not None
            later.append(save)

    score_so(monkeypatch, {2: 0.5, 4: 0.4})
    loop.train(
        tiny.worker_spec(root, tmp_path / "now", tiny.experiment()),
        ProcessGroup(),
        RecordingListener(),
    )
    loop.train(
        tiny.worker_spec(root, tmp_path / "later", tiny.experiment()),
        PutsLater(),
        RecordingListener(),
    )
    assert not (tmp_path / "later" / "best.safetensors").exists()
    for save in later:
        save()
    assert_same_end(tmp_path / "later", tmp_path / "now")
