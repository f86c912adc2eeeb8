"""Snapshots of the training state: exact copies, and refusal of broken ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.model import weights
from pipeline.model.formats import CheckpointError, parse
from pipeline.train.driver.preflight import initial_model
from pipeline.train.recipes.experiment import OptimizerConfig
from pipeline.train.worker import state
from pipeline.train.worker.distributed import ProcessGroup
from pipeline.train.worker.history import History, Step
from pipeline.train.worker.loss import PixelLoss
from pipeline.train.worker.state import Snapshot, TrainingState
from pipeline.train.worker.step import Trainer, build_average, build_optimizer
from tests.train import tiny

CONFIG = OptimizerConfig(max_steps=9, base_lr=0.01, ema_decay=0.5, bn_momentum=0.1, bf16=False)
PROVENANCE = {"world": 1, "threads": 1}


def create_trainer(config: OptimizerConfig = CONFIG) -> tuple[TrainingState, Trainer]:
    model = tiny.network().to(memory_format=torch.channels_last)
    training = TrainingState(
        model=model, optimizer=build_optimizer(model, config), average=build_average(model, config)
    )
    loss = PixelLoss(4, ignore_index=255)
    return training, Trainer(training, loss, config, ProcessGroup(), seed=1)


def run(trainer: Trainer, training: TrainingState, steps: int) -> None:
    for _ in range(steps):
        generator = torch.Generator().manual_seed(training.step)
        images = torch.randint(0, 256, (2, 33, 33, 3), generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, 4, (2, 33, 33), generator=generator, dtype=torch.uint8)
        loss = trainer.step(images, labels).loss
        training.history.steps.append(Step(training.step, 1.5, loss, 0.1, 3.0, 0.0))


def content(snapshot: Snapshot) -> tuple[object, ...]:
    tensors = {key: value.numpy().tobytes() for key, value in snapshot.tensors.items()}
    return tensors, snapshot.step, snapshot.history.to_json(), dict(snapshot.provenance)


def small_snapshot() -> Snapshot:
    """Return a snapshot of few bytes, so that a test can break each of them."""
    return Snapshot(
        tensors={
            "model.a": torch.arange(5.0).reshape(1, 5),
            "model.b": torch.tensor(3),
            "momentum.0000": torch.full((2,), -1.5, dtype=torch.bfloat16),
        },
        step=12,
        history=History(steps=[Step(10, 1.25, 0.1 + 0.2, 0.007, 31.5, 0.02)]),
        provenance=PROVENANCE,
    )


def test_training_does_not_change_an_earlier_snapshot() -> None:
    training, trainer = create_trainer()
    run(trainer, training, 1)
    snapshot = state.snapshot(training, PROVENANCE)
    before = content(snapshot)
    live = training.model.state_dict()
    assert all(
        value.data_ptr() != live[key.removeprefix("model.")].data_ptr()
        for key, value in snapshot.tensors.items()
        if key.startswith("model.")
    )
    run(trainer, training, 1)
    assert content(snapshot) == before
    other, other_trainer = create_trainer()
    state.load(other, snapshot)
    run(other_trainer, other, 1)
    assert content(snapshot) == before


def test_steps_after_loading_a_file_are_bit_identical() -> None:
    uninterrupted, trainer = create_trainer()
    run(trainer, uninterrupted, 4)
    first, trainer = create_trainer()
    run(trainer, first, 2)
    data = state.snapshot(first, PROVENANCE).to_bytes()
    second, trainer = create_trainer()
    run(trainer, second, 1)  # any other state
    state.load(second, state.read(data, "a file"))
    assert second.step == 2
    run(trainer, second, 2)
    found, expected = state.snapshot(second, PROVENANCE), state.snapshot(uninterrupted, PROVENANCE)
    assert content(found) == content(expected)
    kinds = {key.partition(".")[0] for key in found.tensors}
    assert kinds == {"model", "momentum", "average"}


def test_a_file_preserves_a_snapshot_exactly() -> None:
    data = small_snapshot().to_bytes()
    found = state.read(data, "a file")
    expected = small_snapshot()
    assert found.to_bytes() == data
    assert (found.step, found.history, found.provenance) == (12, expected.history, PROVENANCE)
    for key, value in expected.tensors.items():
        assert torch.equal(found.tensors[key], value)
        assert found.tensors[key].dtype == value.dtype


def test_files_are_those_of_earlier_versions() -> None:
    file = parse(small_snapshot().to_bytes(), name="a file")
    assert sorted(file.tensors) == ["model.a", "model.b", "momentum.0000"]
    [(key, text)] = file.metadata.items()
    assert key == "deeplab-training"
    assert {key: value for key, value in json.loads(text).items() if key != "history"} == {
        "version": 1,
        "step": 12,
        "facts": {"world": 1, "threads": 1},
        "digest": "6be22d09596119e4adb8d1139186829b",  # of keys and values of the whole file
    }


def test_a_file_truncated_anywhere_is_refused() -> None:
    data = small_snapshot().to_bytes()
    for length in range(len(data)):
        with pytest.raises(CheckpointError):
            state.read(data[:length], "a file")


def test_a_flipped_bit_is_detected_or_changes_nothing() -> None:
    data, expected = small_snapshot().to_bytes(), small_snapshot()
    detected = 0
    for offset in range(len(data)):
        flipped = bytearray(data)
        flipped[offset] ^= 1 << (offset % 8)
        try:
            found = state.read(bytes(flipped), "a file")
        except CheckpointError:
            detected += 1
            continue
        assert (found.step, found.history, found.provenance) == (
            12,
            expected.history,
            PROVENANCE,
        ), offset
        assert found.tensors.keys() == expected.tensors.keys()
        assert all(torch.equal(found.tensors[key], expected.tensors[key]) for key in found.tensors)
    assert detected > 0.9 * len(data)


def test_other_files_and_states_of_other_networks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x\.bin is not a training checkpoint"):
        state.read(weights.to_bytes(tiny.network(), tiny.CLASSES), "x.bin")
    training, _ = create_trainer()
    with pytest.raises(CheckpointError, match="belongs to another network"):
        state.load(training, small_snapshot())


def test_loading_it_as_a_network_is_refused_with_a_hint(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    path.write_bytes(state.snapshot(create_trainer()[0], PROVENANCE).to_bytes())
    for load in (
        lambda: weights.load(str(path)),
        lambda: initial_model(replace(tiny.experiment(), init=str(path)), print),
    ):
        hint = r"training checkpoint, .*model\.safetensors or best\.safetensors"
        with pytest.raises(CheckpointError, match=hint):
            load()
