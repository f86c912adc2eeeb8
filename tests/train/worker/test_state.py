"""A training state put away and taken up again: a copy, to the last bit, or a refusal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.model import weights
from pipeline.model.formats import CheckpointError
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


def begun(config: OptimizerConfig = CONFIG) -> tuple[TrainingState, Trainer]:
    model = tiny.network().to(memory_format=torch.channels_last)
    made = TrainingState(
        model=model, optimizer=build_optimizer(model, config), average=build_average(model, config)
    )
    return made, Trainer(made, PixelLoss(4, ignore_index=255), config, ProcessGroup(), seed=1)


def go(stepper: Trainer, made: TrainingState, steps: int) -> None:
    for _ in range(steps):
        generator = torch.Generator().manual_seed(made.step)
        images = torch.randint(0, 256, (2, 33, 33, 3), generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, 4, (2, 33, 33), generator=generator, dtype=torch.uint8)
        loss = stepper.step(images, labels).loss
        made.history.steps.append(Step(made.step, 1.5, loss, 0.1, 3.0, 0.0))


def copied(snapshot: Snapshot) -> tuple[object, ...]:
    tensors = {key: value.numpy().tobytes() for key, value in snapshot.tensors.items()}
    return tensors, snapshot.step, snapshot.history.to_json(), dict(snapshot.provenance)


def small() -> Snapshot:
    """As few bytes as a snapshot can have, for looking at each of them."""
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


def test_a_snapshot_is_a_copy_that_training_on_does_not_change() -> None:
    made, stepper = begun()
    go(stepper, made, 1)
    snapshot = state.snapshot(made, PROVENANCE)
    before = copied(snapshot)
    live = made.model.state_dict()
    assert all(
        value.data_ptr() != live[key.removeprefix("model.")].data_ptr()
        for key, value in snapshot.tensors.items()
        if key.startswith("model.")
    )
    go(stepper, made, 1)
    assert copied(snapshot) == before
    other, again = begun()
    state.load(other, snapshot)
    go(again, other, 1)
    assert copied(snapshot) == before


def test_four_steps_are_two_a_file_and_two_to_the_last_bit() -> None:
    undisturbed, stepper = begun()
    go(stepper, undisturbed, 4)
    first, stepper = begun()
    go(stepper, first, 2)
    data = state.snapshot(first, PROVENANCE).to_bytes()
    second, stepper = begun()
    go(stepper, second, 1)  # whatever it was before
    state.load(second, state.read(data, "a file"))
    assert second.step == 2
    go(stepper, second, 2)
    found, expected = state.snapshot(second, PROVENANCE), state.snapshot(undisturbed, PROVENANCE)
    assert copied(found) == copied(expected)
    kinds = {key.partition(".")[0] for key in found.tensors}
    assert kinds == {"model", "momentum", "average"}


def test_a_file_gives_the_snapshot_back() -> None:
    data = small().to_bytes()
    found = state.read(data, "a file")
    expected = small()
    assert found.to_bytes() == data
    assert (found.step, found.history, found.provenance) == (12, expected.history, PROVENANCE)
    for key, value in expected.tensors.items():
        assert torch.equal(found.tensors[key], value)
        assert found.tensors[key].dtype == value.dtype


def test_half_a_file_is_none() -> None:
    data = small().to_bytes()
    for length in range(len(data)):
        with pytest.raises(CheckpointError):
            state.read(data[:length], "a file")


def test_a_flipped_bit_anywhere_is_seen_or_harmless() -> None:
    data, expected = small().to_bytes(), small()
    seen = 0
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << (place % 8)
        try:
            found = state.read(bytes(flipped), "a file")
        except CheckpointError:
            seen += 1
            continue
        assert (found.step, found.history, found.provenance) == (
            12,
            expected.history,
            PROVENANCE,
        ), place
        assert found.tensors.keys() == expected.tensors.keys()
        assert all(torch.equal(found.tensors[key], expected.tensors[key]) for key in found.tensors)
    assert seen > 0.9 * len(data)


def test_another_file_or_another_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x\.bin is no training checkpoint"):
        state.read(weights.to_bytes(tiny.network(), tiny.CLASSES), "x.bin")
    made, _ = begun()
    with pytest.raises(CheckpointError, match="of another network"):
        state.load(made, small())


def test_who_takes_it_for_a_network_is_led_to_those(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    path.write_bytes(state.snapshot(begun()[0], PROVENANCE).to_bytes())
    for takes in (
        lambda: weights.load(str(path)),
        lambda: initial_model(replace(tiny.experiment(), init=str(path)), print),
    ):
        with pytest.raises(CheckpointError, match=r"training checkpoint, .*model.safetensors or best"):
            takes()
