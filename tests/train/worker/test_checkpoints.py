"""Checkpoints below a URI: the newest readable one is used, the last two are kept."""

from __future__ import annotations

import logging

import pytest
import torch

from pipeline.data import storage
from pipeline.train.worker import checkpoints
from pipeline.train.worker.history import History
from pipeline.train.worker.state import Snapshot


def snapshot(step: int) -> Snapshot:
    return Snapshot(
        tensors={"model.a": torch.full((40,), float(step))},
        step=step,
        history=History(),
        provenance={},
    )


def uri(out: str, step: int) -> str:
    return storage.join(out, f"checkpoints/step-{step:08d}/state.safetensors")


def steps(out: str) -> list[int]:
    listed = storage.list_objects(storage.join(out, "checkpoints"))
    return sorted(int(found.uri.split("/")[-2].removeprefix("step-")) for found in listed)


def test_the_newest_checkpoint_is_used_and_the_last_two_are_kept(prefix: str) -> None:
    assert checkpoints.latest(prefix) is None
    for step in (9, 10, 200):
        checkpoints.save(prefix, snapshot(step))
        found = checkpoints.latest(prefix)
        assert found is not None
        assert found.step == step
        assert (found.tensors["model.a"] == step).all()
    assert steps(prefix) == [10, 200]
    checkpoints.save(prefix, snapshot(200))  # a resumed run may save a step again
    assert steps(prefix) == [10, 200]


@pytest.mark.parametrize("keep", [0, 1, 8, 9, 60, 0.5, -1])
def test_a_truncated_checkpoint_is_skipped_with_a_warning(
    keep: float, tmp_path, caplog: pytest.LogCaptureFixture
) -> None:
    out = str(tmp_path)
    for step in (4, 8):
        checkpoints.save(out, snapshot(step))
    data = storage.read(uri(out, 8))
    storage.write(uri(out, 8), data[: int(keep * len(data)) if keep == 0.5 else int(keep)])
    with caplog.at_level(logging.WARNING):
        found = checkpoints.latest(out)
    assert found is not None
    assert found.step == 4
    assert "step-00000008" in caplog.text
    assert "resuming from the checkpoint before it" in caplog.text
    checkpoints.save(out, snapshot(8))
    again = checkpoints.latest(out)
    assert again is not None
    assert again.step == 8


def test_a_checkpoint_with_a_flipped_bit_is_skipped(tmp_path) -> None:
    out = str(tmp_path)
    for step in (4, 8):
        checkpoints.save(out, snapshot(step))
    data = bytearray(storage.read(uri(out, 8)))
    data[-7] ^= 4  # in a weight
    storage.write(uri(out, 8), bytes(data))
    found = checkpoints.latest(out)
    assert found is not None
    assert found.step == 4


def test_leftovers_of_a_killed_writer_and_of_ray_are_not_checkpoints(tmp_path) -> None:
    out = str(tmp_path)
    folder = tmp_path / "checkpoints" / "step-00000012"
    folder.mkdir(parents=True)
    (folder / ".state.safetensors.0123456789abcdef.tmp").write_bytes(snapshot(12).to_bytes())
    (folder / "other.safetensors").write_bytes(snapshot(12).to_bytes())
    (tmp_path / "checkpoints" / "checkpoint_manager_snapshot.json").write_text("{")
    assert checkpoints.latest(out) is None
    checkpoints.save(out, snapshot(3))
    found = checkpoints.latest(out)
    assert found is not None
    assert found.step == 3
    where = checkpoints.ray_storage(out)
    assert (where.path, where.filesystem) == (out, None)
    assert not (tmp_path / "checkpoints" / "checkpoint_manager_snapshot.json").exists()
