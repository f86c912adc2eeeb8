"""Training on a GPU against the CPU: steps, checkpoints, synchronized batch statistics."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.data import storage
from pipeline.evaluation.evaluate import evaluate
from pipeline.model import weights
from pipeline.train.worker import checkpoints, loop
from pipeline.train.worker.distributed import ProcessGroup
from pipeline.train.worker.state import load, read, snapshot
from pipeline.train.worker.task import WorkerSpec
from tests.train import tiny
from tests.train.tiny import RecordingListener
from tests.train.worker.test_step import Case, assert_close, create_trainer, random_batch, run_steps

pytestmark = pytest.mark.gpu


def on_gpu(group: ProcessGroup) -> ProcessGroup:
    """Return the same worker on the GPU."""
    return replace(group, device=torch.device("cuda", 0))


CASES = {
    "plain": Case(),
    "micro-batches": Case(optimizer={"micro_batch": 2}),
    "hard pixels": Case(optimizer={"hard_share": 0.3}),
    "class weights": Case(class_weights=(0.5, 2.0, 1.0, 7.0)),
    "an auxiliary head": Case(model=tiny.RESNET),
    "batch norm trained": Case(optimizer={"freeze_bn": False}),
}


@pytest.mark.parametrize("name", CASES)
def test_four_steps_equal_those_on_the_cpu(name: str) -> None:
    case = CASES[name]
    expected_losses, expected = run_steps(ProcessGroup(), case)
    losses, found = run_steps(on_gpu(ProcessGroup()), case)
    assert losses == pytest.approx(expected_losses, rel=1e-6)
    assert_close(
        detached(found.items()), expected, create_trainer(case, ProcessGroup())[0].model, share=1e-6
    )


def detached(found: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: value.detach().cpu() for key, value in found}


def trained_on_gpu(
    group: ProcessGroup, case: Case
) -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return losses, weights and buffers of a worker; all workers share one GPU."""
    state, trainer = create_trainer(case, on_gpu(group))
    losses = []
    for number in range(case.config.max_steps):
        images, labels = (each[group.rank :: group.world_size] for each in random_batch(number))
        losses.append(trainer.step(images, labels).loss)
    model = state.model
    return losses, detached(model.named_parameters()), detached(model.named_buffers())


def test_two_workers_synchronize_their_batch_statistics(tmp_path: Path) -> None:
    case = Case(optimizer={"freeze_bn": False, "max_steps": 2})
    expected_losses, expected, statistics = trained_on_gpu(ProcessGroup(), case)
    start = create_trainer(case, ProcessGroup())[0].model
    for losses, found, buffers in tiny.run_workers(2, tmp_path, trained_on_gpu, case):
        assert losses == pytest.approx(expected_losses, rel=1e-6)
        assert_close(found, expected, start, share=1e-5)
        for key, value in statistics.items():
            assert torch.allclose(buffers[key].double(), value.double(), rtol=1e-6), key


def run(task: WorkerSpec) -> list[float]:
    """Train on the GPU and return the losses."""
    listener = RecordingListener()
    loop.train(task, on_gpu(ProcessGroup()), listener)
    assert listener.failures == []
    return [row.loss for row in listener.rows]


def test_a_bf16_run_learns_and_its_checkpoint_scores_the_same_on_the_cpu(tmp_path: Path) -> None:
    tiny.write_dataset(tmp_path / "set")
    config = tiny.experiment(bf16=True, max_steps=60, base_lr=0.05, ema_decay=0.9)
    config = replace(config, evaluation=replace(config.evaluation, eval_every=30))
    task = tiny.worker_spec(tmp_path / "set", tmp_path / "out", config, checkpoint_every=30)
    losses = run(task)
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    last = checkpoints.latest(str(tmp_path / "out"))
    assert last is not None
    assert all(value.dtype != torch.bfloat16 for value in last.tensors.values())
    model, _ = weights.load(str(tmp_path / "out" / "model.safetensors"))
    on_cpu = evaluate(model, task.val, read=storage.read).miou
    assert on_cpu == pytest.approx(last.history.scores[-1].miou, abs=0.01)


def test_a_resumed_run_equals_an_uninterrupted_one() -> None:
    case = Case(optimizer={"freeze_bn": False})
    states = []
    kept = b""
    for first in (0, 2):
        state, trainer = create_trainer(case, on_gpu(ProcessGroup()))
        if kept:
            load(state, read(kept, "the checkpoint"))
        for number in range(first, 4):
            trainer.step(*random_batch(number))
            if state.step == 2:
                kept = snapshot(state, {}).to_bytes()
        states.append(state)
    uninterrupted, resumed = (detached(each.model.named_parameters()) for each in states)
    assert_close(resumed, uninterrupted, create_trainer(case, ProcessGroup())[0].model, share=1e-6)
    assert [each.step for each in states] == [4, 4]
