"""The loop of a worker among others, and with data that is broken."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data import storage
from pipeline.evaluation.evaluate import Evaluation, evaluate
from pipeline.evaluation.score import Score
from pipeline.model import weights
from pipeline.train.worker import loop, step
from pipeline.train.worker.distributed import ProcessGroup
from pipeline.train.worker.task import WorkerSpec
from tests.train import tiny
from tests.train.crashes import newest
from tests.train.tiny import RecordingListener


def worker(group: ProcessGroup, task: WorkerSpec) -> RecordingListener:
    heard = RecordingListener()
    loop.train(task, group, heard)
    return heard


def broken_worker(group: ProcessGroup, task: WorkerSpec) -> RecordingListener:
    """As `worker`; the loss of the second is no number from the third step on."""
    done = 0

    def forward(self: step.Objective, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        nonlocal done
        done += 1
        summed = before(self, images, labels)
        return summed * float("nan") if group.rank == 1 and done > 2 else summed

    before = step.Objective.forward
    step.Objective.forward = forward  # type: ignore[method-assign]  # of this process alone
    return worker(group, task)


def test_a_loss_that_is_no_number_ends_all_workers_and_names_the_photos(
    root: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    task = tiny.worker_spec(
        root, out, tiny.experiment(batch_size=4, max_steps=5), checkpoint_every=1
    )
    first, second = tiny.run_workers(2, tmp_path, broken_worker, task)
    assert first.failures == []  # its photos are not to blame
    [message] = second.failures
    assert "the loss is nan at step 3" in message
    assert "give a lower --base-lr, or mend these labels, under a new --out" in message
    assert sum(f"images/{number:02d}.jpg" in message for number in range(6)) == 2
    assert [row.step for row in first.rows] == [1, 2]
    assert newest(out).step == 2  # what is broken is not put away
    assert not (out / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["train/labels/04.png", "val/images/03.jpg"])
def test_a_file_that_one_worker_cannot_read_ends_all_of_them(name: str, tmp_path: Path) -> None:
    tiny.write_dataset(tmp_path / "set")
    out = tmp_path / "out"
    task = tiny.worker_spec(tmp_path / "set", out, tiny.experiment(batch_size=6))
    path = tmp_path / "set" / name
    path.write_bytes(path.read_bytes()[:60])
    heard = tiny.run_workers(2, tmp_path, worker, task)
    messages = [message for each in heard for message in each.failures]
    assert len(messages) == 1
    assert messages[0].startswith(f"{path}: ")
    assert "with other photos or labels it is another run: give that a new --out" in messages[0]
    assert not (out / "model.safetensors").exists()


@pytest.mark.parametrize("what", ["train image", "val label", "initial"])
def test_a_worker_that_does_not_find_what_it_needs_says_so_and_none_trains(
    what: str, root: Path, tmp_path: Path
) -> None:
    task = tiny.worker_spec(root, tmp_path, tiny.experiment())
    if what == "initial":
        task = replace(task, initial="/not/here")
    else:
        name, part = what.split()
        split = getattr(task, name)
        gone = replace(split.pairs[0], **{part: "/not/here"})
        task = replace(task, **{name: replace(split, pairs=(gone, *split.pairs[1:]))})
    heard = worker(ProcessGroup(), task)
    assert heard.rows == []
    assert "/not/here: it is not on node" in heard.failures[0]
    assert f"give --{'out' if what == 'initial' else 'data'} as s3://" in heard.failures[0]
    assert "another run" not in heard.failures[0]  # it is where these photos are


@pytest.mark.parametrize("at", [3, 4])  # in mid-run, and at its end
def test_weights_that_are_no_numbers_are_never_put_away(
    at: int, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = step.Trainer.step
    done: list[step.StepResult] = []

    def overflows(self: step.Trainer, *batch: torch.Tensor) -> step.StepResult:
        done.append(before(self, *batch))  # its loss is that of sound weights
        if len(done) == at:
            next(self._state.model.parameters()).data.fill_(torch.inf)
        return done[-1]

    monkeypatch.setattr(step.Trainer, "step", overflows)
    task = tiny.worker_spec(root, tmp_path, tiny.experiment(), checkpoint_every=1)
    heard = worker(ProcessGroup(), task)
    assert f"weights are no longer numbers after step {at}" in heard.failures[0]
    assert "give a lower --base-lr and a new --out" in heard.failures[0]
    assert newest(tmp_path).step == at - 1
    assert not (tmp_path / "model.safetensors").exists()


def test_a_val_split_without_labels_is_refused_before_training(tmp_path: Path) -> None:
    tiny.write_dataset(tmp_path / "set")
    for path in (tmp_path / "set" / "val" / "labels").iterdir():
        Image.fromarray(np.full_like(np.array(Image.open(path)), 255)).save(path)
    with pytest.raises(ValueError, match="no pixel of the 5 images of val is labeled"):
        tiny.worker_spec(tmp_path / "set", tmp_path / "out", tiny.experiment())


def seen_worker(group: ProcessGroup, task: WorkerSpec) -> list[tuple[np.ndarray, int]]:
    """What each score was made of."""
    seen: list[tuple[np.ndarray, int]] = []

    def score(self: Evaluation, **given: Any) -> Score:
        seen.append((self.confusion.copy(), self.images))
        return before(self, **given)

    before = Evaluation.score
    Evaluation.score = score  # type: ignore[method-assign]  # of this process alone
    worker(group, task)
    return seen


def test_one_two_and_three_workers_count_the_same_pixels_and_photos(
    root: Path, tmp_path: Path
) -> None:
    # weights that do not move, so that the networks are the same
    what = tiny.experiment(max_steps=2, base_lr=1e-30, freeze_bn=True, ema_decay=0.0)
    what = replace(what, evaluation=replace(what.evaluation, eval_every=0))
    task = tiny.worker_spec(root, tmp_path / "1", what)
    model, _ = weights.load(task.initial)
    # as the loop keeps it: another memory format rounds differently
    model = model.to(memory_format=torch.channels_last)
    expected = evaluate(model, task.val, read=storage.read)
    assert expected.images == 5
    for world in (1, 2, 3):
        out = tmp_path / str(world)
        task = tiny.worker_spec(root, out, what)
        for seen in tiny.run_workers(world, tmp_path, seen_worker, task):
            [(confusion, images)] = seen
            assert images == 5
            assert confusion.dtype == np.int64
            assert (confusion == expected.confusion).all()
        assert newest(out).provenance == {"world": world, "threads": 1}


def test_trained_normalisation_on_several_cpus_is_warned_of_once(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tiny.worker_spec(root, tmp_path, tiny.experiment())
    frozen = replace(task, experiment=tiny.experiment(freeze_bn=True))
    monkeypatch.setattr(ProcessGroup, "sum", lambda _, values: values)  # no others are there
    said = {}
    for name, group, which in (
        ("first", ProcessGroup(world_size=2), task),
        ("second", ProcessGroup(rank=1, world_size=2), task),
        ("alone", ProcessGroup(), task),
        ("frozen", ProcessGroup(world_size=2), frozen),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            loop.restore_state(which, group)
        said[name] = caplog.text.count("each worker normalises by its own photos alone")
    assert said == {"first": 1, "second": 0, "alone": 0, "frozen": 0}
