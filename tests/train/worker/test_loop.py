"""A worker's loop: killed and resumed, it ends as one that nothing disturbed."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from pipeline.train.worker import loop, state
from pipeline.train.worker.distributed import ProcessGroup
from tests.train import tiny
from tests.train.crashes import CrashingListener, WorkerCrash, assert_same_end, newest
from tests.train.tiny import RecordingListener


def test_four_steps_are_two_a_death_and_two_to_the_last_bit(
    root: Path, tmp_path: Path, undisturbed: Path
) -> None:
    task = tiny.worker_spec(root, tmp_path, tiny.experiment())
    with pytest.raises(WorkerCrash):
        loop.train(task, ProcessGroup(), CrashingListener(3))
    assert newest(tmp_path).step == 2
    assert not (tmp_path / "model.safetensors").exists()
    torch.manual_seed(1000)
    heard = RecordingListener()
    loop.train(task, ProcessGroup(), heard)
    assert [row.step for row in heard.rows] == [3, 4]
    assert_same_end(tmp_path, undisturbed)
    steps = [each.step for each in newest(tmp_path).history.scores]
    assert steps == [2, 4]


def test_a_death_between_two_rows_of_the_history_changes_none_of_them(
    root: Path, tmp_path: Path, undisturbed: Path
) -> None:
    task = tiny.worker_spec(root, tmp_path, tiny.experiment(), checkpoint_every=1)
    with pytest.raises(WorkerCrash):
        loop.train(task, ProcessGroup(), CrashingListener(4))
    died = newest(tmp_path)
    assert (died.step, [each.step for each in died.history.steps]) == (3, [2])
    loop.train(task, ProcessGroup(), RecordingListener())
    assert_same_end(tmp_path, undisturbed)


def test_loader_processes_and_a_broken_checkpoint_change_no_bit_of_the_end(
    root: Path, tmp_path: Path, undisturbed: Path
) -> None:
    task = tiny.worker_spec(root, tmp_path, tiny.experiment(), loaders=1)
    with pytest.raises(WorkerCrash):
        loop.train(task, ProcessGroup(), CrashingListener(3))
    [path] = (tmp_path / "checkpoints").rglob("state.safetensors")
    path.write_bytes(path.read_bytes()[:-1000])
    heard = RecordingListener()
    loop.train(task, ProcessGroup(), heard)
    assert [row.step for row in heard.rows] == [1, 2, 3, 4]  # none is left but the start
    assert_same_end(tmp_path, undisturbed)


def test_a_run_that_dies_before_its_pictures_only_makes_them(
    root: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: object) -> None:
        raise WorkerCrash

    task = tiny.worker_spec(root, tmp_path, tiny.experiment())
    with monkeypatch.context() as patch:
        patch.setattr(loop, "export_run", dies)
        with pytest.raises(WorkerCrash):
            loop.train(task, ProcessGroup(), RecordingListener())
    heard = RecordingListener()
    loop.train(task, ProcessGroup(), heard)
    assert (heard.rows, heard.failures) == ([], [])
    assert_same_end(tmp_path, undisturbed)
    assert Image.open(tmp_path / "samples.png").width > 41
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_going_on_with_other_threads_or_workers_is_warned_of(
    root: Path, tmp_path: Path, undisturbed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = tiny.worker_spec(root, undisturbed, tiny.experiment())
    with caplog.at_level(logging.WARNING):
        loop.restore_state(task, ProcessGroup())
        assert caplog.text == ""
        loop.restore_state(replace(task, threads=2), ProcessGroup())
    assert "but not the same bit for bit" in caplog.text


def test_a_set_that_a_node_cannot_keep_is_warned_of(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.cache.NodeCache.fits", False)
    task = tiny.worker_spec(root, tmp_path, tiny.experiment(max_steps=1), cache_gb=2.5)
    loop.train(task, ProcessGroup(), RecordingListener())
    assert "the photos take more than --cache-gb 2.5: every epoch" in caplog.text


def test_a_worker_that_finds_a_newer_checkpoint_takes_the_first_workers(
    root: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tiny.worker_spec(root, undisturbed, tiny.experiment())
    monkeypatch.setattr(ProcessGroup, "sum", lambda _, values: torch.full_like(values, 2))
    begun = loop.restore_state(task, ProcessGroup(rank=1, world_size=2))
    data = (undisturbed / "checkpoints" / "step-00000002" / "state.safetensors").read_bytes()
    taken = state.read(data, "step 2")
    assert begun.step == 2
    for key, value in begun.model.state_dict().items():
        assert torch.equal(value, taken.tensors[f"model.{key}"])


def test_a_snapshot_says_what_it_was_made_with(undisturbed: Path) -> None:
    last = newest(undisturbed)
    assert last.provenance == {"world": 1, "threads": 1}
    assert sorted(path.name for path in (undisturbed / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000004",
    ]
    said = json.loads((undisturbed / "run.json").read_text())
    assert said["experiment"]["optimiser"]["max_steps"] == last.step
