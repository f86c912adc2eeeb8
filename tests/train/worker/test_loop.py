"""The training loop of one worker: crashed and resumed, it ends as an uninterrupted one."""

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
from pipeline.train.worker.task import restore_state
from tests.train import tiny
from tests.train.crashes import CrashingListener, WorkerCrash, assert_same_end, newest
from tests.train.tiny import RecordingListener

pytestmark = pytest.mark.slow


def test_a_run_that_crashed_and_resumed_ends_bit_identical(
    root: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    spec = tiny.worker_spec(root, tmp_path, tiny.experiment())
    with pytest.raises(WorkerCrash):
        loop.train(spec, ProcessGroup(), CrashingListener(3))
    assert newest(tmp_path).step == 2
    assert not (tmp_path / "model.safetensors").exists()
    torch.manual_seed(1000)
    listener = RecordingListener()
    loop.train(spec, ProcessGroup(), listener)
    assert [row.step for row in listener.rows] == [3, 4]
    assert_same_end(tmp_path, uninterrupted)
    steps = [score.step for score in newest(tmp_path).history.scores]
    assert steps == [2, 4]


def test_a_crash_between_two_rows_of_the_history_does_not_change_them(
    root: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    spec = tiny.worker_spec(root, tmp_path, tiny.experiment(), checkpoint_every=1)
    with pytest.raises(WorkerCrash):
        loop.train(spec, ProcessGroup(), CrashingListener(4))
    last = newest(tmp_path)
    assert (last.step, [row.step for row in last.history.steps]) == (3, [2])
    loop.train(spec, ProcessGroup(), RecordingListener())
    assert_same_end(tmp_path, uninterrupted)


def test_loader_processes_and_a_broken_checkpoint_do_not_change_the_end(
    root: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    spec = tiny.worker_spec(root, tmp_path, tiny.experiment(), loaders=1)
    with pytest.raises(WorkerCrash):
        loop.train(spec, ProcessGroup(), CrashingListener(3))
    [path] = (tmp_path / "checkpoints").rglob("state.safetensors")
    path.write_bytes(path.read_bytes()[:-1000])
    listener = RecordingListener()
    loop.train(spec, ProcessGroup(), listener)
    assert [row.step for row in listener.rows] == [1, 2, 3, 4]  # there is no other checkpoint
    assert_same_end(tmp_path, uninterrupted)


def test_a_run_that_crashes_before_its_export_only_exports_when_resumed(
    root: Path, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise WorkerCrash

    spec = tiny.worker_spec(root, tmp_path, tiny.experiment())
    with monkeypatch.context() as patch:
        patch.setattr(loop, "export_run", crash)
        with pytest.raises(WorkerCrash):
            loop.train(spec, ProcessGroup(), RecordingListener())
    listener = RecordingListener()
    loop.train(spec, ProcessGroup(), listener)
    assert (listener.rows, listener.failures) == ([], [])
    assert_same_end(tmp_path, uninterrupted)
    assert Image.open(tmp_path / "samples.png").width > 41
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_resuming_with_another_number_of_threads_is_logged(
    root: Path, tmp_path: Path, uninterrupted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = tiny.worker_spec(root, uninterrupted, tiny.experiment())
    with caplog.at_level(logging.WARNING):
        restore_state(spec, ProcessGroup())
        assert caplog.text == ""
        restore_state(replace(spec, threads=2), ProcessGroup())
    assert "but not bit-identical" in caplog.text


def test_a_data_set_larger_than_the_node_cache_is_logged(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.cache.NodeCache.fits", False)
    spec = tiny.worker_spec(root, tmp_path, tiny.experiment(max_steps=1), cache_gb=2.5)
    loop.train(spec, ProcessGroup(), RecordingListener())
    assert "the images need more than --cache-gb 2.5: " in caplog.text


def test_a_worker_resumes_from_the_checkpoint_of_the_main_one_not_a_newer_one(
    root: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny.worker_spec(root, uninterrupted, tiny.experiment())
    monkeypatch.setattr(ProcessGroup, "sum", lambda _, values: torch.full_like(values, 2))
    restored = restore_state(spec, ProcessGroup(rank=1, world_size=2))
    data = (uninterrupted / "checkpoints" / "step-00000002" / "state.safetensors").read_bytes()
    expected = state.read(data, "step 2")
    assert restored.step == 2
    for key, value in restored.model.state_dict().items():
        assert torch.equal(value, expected.tensors[f"model.{key}"])


def test_a_checkpoint_holds_its_provenance(uninterrupted: Path) -> None:
    last = newest(uninterrupted)
    assert last.provenance == {"world": 1, "threads": 1}
    assert sorted(path.name for path in (uninterrupted / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000004",
    ]
    identity = json.loads((uninterrupted / "run.json").read_text())
    assert identity["experiment"]["optimiser"]["max_steps"] == last.step
