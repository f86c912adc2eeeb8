"""The training loop on several workers, and on broken data."""

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
from pipeline.train.worker.task import WorkerSpec, restore_state
from tests.train import tiny
from tests.train.crashes import newest
from tests.train.tiny import RecordingListener

pytestmark = pytest.mark.slow


def worker(group: ProcessGroup, spec: WorkerSpec) -> RecordingListener:
    listener = RecordingListener()
    loop.train(spec, group, listener)
    return listener


def broken_worker(group: ProcessGroup, spec: WorkerSpec) -> RecordingListener:
    """As `worker`, but the loss of the second one is NaN from the third step on."""
    calls = 0

    def forward(self: step.Objective, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        summed = before(self, images, labels)
        return summed * float("nan") if group.rank == 1 and calls > 2 else summed

    before = step.Objective.forward
    step.Objective.forward = forward  # type: ignore[method-assign]  # in this process only
    return worker(group, spec)


def test_a_loss_of_nan_stops_all_workers_and_the_message_names_its_images(
    root: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    spec = tiny.worker_spec(
        root, out, tiny.experiment(batch_size=4, max_steps=5), checkpoint_every=1
    )
    first, second = tiny.run_workers(2, tmp_path, broken_worker, spec)
    assert first.failures == []  # its own loss is finite
    [message] = second.failures
    assert "the loss is nan at step 3 on the images " in message
    assert "use a lower --base-lr, or correct their labels, with a new --out" in message
    assert sum(f"images/{number:02d}.jpg" in message for number in range(6)) == 2
    assert [row.step for row in first.rows] == [1, 2]
    assert newest(out).step == 2  # the broken state is not saved
    assert not (out / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["train/labels/04.png", "val/images/03.jpg"])
def test_a_file_that_one_worker_cannot_read_stops_all_of_them(name: str, tmp_path: Path) -> None:
    tiny.write_dataset(tmp_path / "set")
    out = tmp_path / "out"
    spec = tiny.worker_spec(tmp_path / "set", out, tiny.experiment(batch_size=6))
    path = tmp_path / "set" / name
    path.write_bytes(path.read_bytes()[:60])
    listeners = tiny.run_workers(2, tmp_path, worker, spec)
    messages = [message for listener in listeners for message in listener.failures]
    assert len(messages) == 1
    assert messages[0].startswith(f"{path}: ")
    assert "after changing images or labels, start a new run with another --out" in messages[0]
    assert not (out / "model.safetensors").exists()


@pytest.mark.parametrize("what", ["train image", "val label", "initial"])
def test_a_path_that_a_node_does_not_see_stops_the_run_before_training(
    what: str, root: Path, tmp_path: Path
) -> None:
    spec = tiny.worker_spec(root, tmp_path, tiny.experiment())
    if what == "initial":
        spec = replace(spec, initial="/not/here")
    else:
        name, part = what.split()
        split = getattr(spec, name)
        gone = replace(split.pairs[0], **{part: "/not/here"})
        spec = replace(spec, **{name: replace(split, pairs=(gone, *split.pairs[1:]))})
    listener = worker(ProcessGroup(), spec)
    assert listener.rows == []
    assert "/not/here: node " in listener.failures[0]
    assert f"give --{'out' if what == 'initial' else 'data'} as s3://" in listener.failures[0]
    assert "another run" not in listener.failures[0]  # the data set has not changed


@pytest.mark.parametrize("at", [3, 4])  # within the run, and at its end
def test_weights_with_inf_are_never_saved(
    at: int, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = step.Trainer.step
    results: list[step.StepResult] = []

    def overflow(self: step.Trainer, *batch: torch.Tensor) -> step.StepResult:
        results.append(before(self, *batch))  # the loss is that of finite weights
        if len(results) == at:
            next(self._state.model.parameters()).data.fill_(torch.inf)
        return results[-1]

    monkeypatch.setattr(step.Trainer, "step", overflow)
    spec = tiny.worker_spec(root, tmp_path, tiny.experiment(), checkpoint_every=1)
    listener = worker(ProcessGroup(), spec)
    assert f"weights contain NaN or inf after step {at}" in listener.failures[0]
    assert "use a lower --base-lr and a new --out" in listener.failures[0]
    assert newest(tmp_path).step == at - 1
    assert not (tmp_path / "model.safetensors").exists()


def test_a_val_split_without_labels_is_refused_before_training(tmp_path: Path) -> None:
    tiny.write_dataset(tmp_path / "set")
    for path in (tmp_path / "set" / "val" / "labels").iterdir():
        Image.fromarray(np.full_like(np.array(Image.open(path)), 255)).save(path)
    with pytest.raises(ValueError, match="no pixel of the 5 images of val is labeled"):
        tiny.worker_spec(tmp_path / "set", tmp_path / "out", tiny.experiment())


def evaluating_worker(group: ProcessGroup, spec: WorkerSpec) -> list[tuple[np.ndarray, int]]:
    """Train, and return the confusion matrix and number of images of each score."""
    evaluations: list[tuple[np.ndarray, int]] = []

    def score(self: Evaluation, **given: Any) -> Score:
        evaluations.append((self.confusion.copy(), self.images))
        return before(self, **given)

    before = Evaluation.score
    Evaluation.score = score  # type: ignore[method-assign]  # in this process only
    worker(group, spec)
    return evaluations


def test_any_number_of_workers_counts_the_same_pixels_and_images(
    root: Path, tmp_path: Path
) -> None:
    # weights that do not change, so that all networks are the same
    what = tiny.experiment(max_steps=2, base_lr=1e-30, freeze_bn=True, ema_decay=0.0)
    what = replace(what, evaluation=replace(what.evaluation, eval_every=0))
    spec = tiny.worker_spec(root, tmp_path / "1", what)
    model, _ = weights.load(spec.initial)
    # as in the loop: rounding depends on the memory format
    model = model.to(memory_format=torch.channels_last)
    expected = evaluate(model, spec.val, read=storage.read)
    assert expected.images == 5
    for world_size in (1, 2, 3):
        out = tmp_path / str(world_size)
        spec = tiny.worker_spec(root, out, what)
        for evaluations in tiny.run_workers(world_size, tmp_path, evaluating_worker, spec):
            [(confusion, images)] = evaluations
            assert images == 5
            assert confusion.dtype == np.int64
            assert (confusion == expected.confusion).all()
        assert newest(out).provenance == {"world": world_size, "threads": 1}


def test_training_batch_norm_on_several_cpus_is_logged_once(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny.worker_spec(root, tmp_path, tiny.experiment())
    frozen = replace(spec, experiment=tiny.experiment(freeze_bn=True))
    # there are no other processes to sum over
    monkeypatch.setattr(ProcessGroup, "sum", lambda _, values: values)
    counts = {}
    for name, group, which in (
        ("main", ProcessGroup(world_size=2), spec),
        ("second", ProcessGroup(rank=1, world_size=2), spec),
        ("alone", ProcessGroup(), spec),
        ("frozen", ProcessGroup(world_size=2), frozen),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            restore_state(which, group)
        counts[name] = caplog.text.count("each worker normalizes by its own images only")
    assert counts == {"main": 1, "second": 0, "alone": 0, "frozen": 0}
