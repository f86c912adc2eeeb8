"""Training steps, compared with plain PyTorch, and across workers and micro-batches.

Arithmetic is compared in fp64. In fp32 the order of sums depends on the CPU, and a pixel that
rounding moves across a kink of ReLU6 changes gradients by several percent. One case is in fp32,
without kinks, with a bound that follows from rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from pipeline.model.config import ModelConfig
from pipeline.train.recipes.experiment import OptimizerConfig
from pipeline.train.worker.distributed import ProcessGroup
from pipeline.train.worker.loss import PixelLoss
from pipeline.train.worker.schedule import poly
from pipeline.train.worker.state import TrainingState
from pipeline.train.worker.step import Objective, Trainer, build_average, build_optimizer
from tests.train import tiny

STEPS = 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """A configuration to train in four steps of seven images."""

    world_size: int = 1
    model: ModelConfig = tiny.MOBILENET
    optimizer: dict[str, object] = field(default_factory=dict)
    class_weights: tuple[float, ...] | None = None
    double: bool = True
    kinks: bool = True  # if False, SiLU replaces ReLU and ReLU6

    @property
    def config(self) -> OptimizerConfig:
        values = {
            "max_steps": STEPS,
            "batch_size": 7,
            "base_lr": 5e-4,
            "head_lr_factor": 3.0,
            "weight_decay": 0.01,
            "freeze_bn": True,
            "bf16": False,
        }
        return OptimizerConfig(**{**values, **self.optimizer})


def random_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return seven images, and labels whose numbers of ignored pixels differ.

    All pixels of images 1, 3, 4 and 5 are ignored, so the second of two or three workers has no
    valid pixel. No pixel of the third batch is valid.
    """
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (7, 33, 37, 3), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 3, (7, 33, 37), generator=generator, dtype=torch.uint8)
    for image, share in enumerate((0.1, 1, 0.9, 1, 1, 1, 0.5)):
        labels[image][torch.rand(33, 37, generator=generator) < share] = 255
    if step == 2:
        labels[:] = 255
    return images, labels


def create_trainer(case: Case, group: ProcessGroup) -> tuple[TrainingState, Trainer]:
    model = tiny.network(ModelConfig(**{**vars(case.model), "dropout": 0.0}))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):  # also in the auxiliary head
            module.p = 0.0
        for name, child in list(module.named_children()):
            if not case.kinks and isinstance(child, torch.nn.ReLU | torch.nn.ReLU6):
                setattr(module, name, torch.nn.SiLU())
    config = case.config
    model = model.double() if case.double else model
    state = TrainingState(
        model=model, optimizer=build_optimizer(model, config), average=build_average(model, config)
    )
    weights = None if case.class_weights is None else torch.tensor(case.class_weights)
    loss = PixelLoss(4, ignore_index=255, class_weights=weights, hard_share=config.hard_share)
    loss = loss.double() if case.double else loss
    return state, Trainer(state, loss, config, group, seed=3)


def run_steps(group: ProcessGroup, case: Case) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return the losses of four steps on one worker, and its weights afterwards."""
    state, trainer = create_trainer(case, group)
    losses = []
    for step in range(STEPS):
        images, labels = (part[group.rank :: group.world_size] for part in random_batch(step))
        losses.append(trainer.step(images, labels).loss)
    return losses, {key: value.detach() for key, value in state.model.named_parameters()}


def assert_close(
    found: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    start: torch.nn.Module,
    *,
    share: float = 1e-9,
    stored: float = 0.0,
) -> None:
    """Check differences of weights against the changes since `start`.

    The largest may be `share` of the largest change plus `stored` of the largest weight.
    """
    first = dict(start.named_parameters())
    change = max(float((expected[key] - first[key]).abs().max().detach()) for key in first)
    difference = max(float((found[key] - expected[key]).abs().max()) for key in first)
    largest = max(float(value.abs().max()) for value in expected.values())
    assert change > 1e-5
    assert difference <= share * change + stored * largest, f"{difference:.3g} of {change:.3g}"


def plain_pytorch(case: Case) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return what `run_steps` does, by plain PyTorch: its mean loss, and SGD written out.

    Of a case's options it supports class weights only.
    """
    state, _ = create_trainer(case, ProcessGroup())
    model, config = state.model.eval(), case.config  # eval: frozen statistics, no dropout
    dtype = next(model.parameters()).dtype
    parameters = dict(model.named_parameters())
    momentum = {key: torch.zeros_like(value) for key, value in parameters.items()}
    mean, std = (
        torch.tensor(values, dtype=dtype)[:, None, None]
        for values in (model.config.mean, model.config.std)
    )
    weight = None if case.class_weights is None else torch.tensor(case.class_weights, dtype=dtype)
    losses = []
    for step in range(STEPS):
        images, labels = random_batch(step)
        logits = model((images.permute(0, 3, 1, 2).to(dtype) / 255 - mean) / std)
        loss = functional.cross_entropy(logits, labels.long(), weight=weight, ignore_index=255)
        if not (labels != 255).any():
            loss = 0 * logits.sum()
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        rate = config.base_lr * (1 - step / STEPS) ** 0.9
        for (key, value), gradient in zip(parameters.items(), gradients, strict=True):
            decay = 0.01 if value.ndim > 1 else 0.0
            momentum[key] = 0.9 * momentum[key] + gradient + decay * value.detach()
            head = 3.0 if key.startswith("classifier.") else 1.0
            value.data -= rate * head * momentum[key]
    return losses, {key: value.detach() for key, value in parameters.items()}


@pytest.mark.slow
@pytest.mark.parametrize("class_weights", [None, (0.5, 2.0, 1.0, 7.0)])
def test_four_steps_equal_plain_pytorch(class_weights: tuple[float, ...] | None) -> None:
    case = Case(class_weights=class_weights)
    losses, found = run_steps(ProcessGroup(), case)
    expected_losses, expected = plain_pytorch(case)
    assert losses == pytest.approx(expected_losses, rel=1e-9)
    assert losses[2] == 0
    assert_close(found, expected, create_trainer(case, ProcessGroup())[0].model)


@pytest.mark.process
def test_fp32_steps_of_three_workers_differ_from_fp64_only_by_rounding(tmp_path: Path) -> None:
    exact = Case(kinks=False)
    expected_losses, expected = plain_pytorch(exact)
    start = create_trainer(exact, ProcessGroup())[0].model
    # A gradient is a sum over n pixels, which loses at most n * eps of its size, and each step
    # rounds the weights it stores.
    eps = torch.finfo(torch.float32).eps
    pixels = random_batch(0)[1].numel()
    for losses, found in tiny.run_workers(3, tmp_path, run_steps, Case(kinks=False, double=False)):
        assert losses == pytest.approx(expected_losses, rel=pixels * eps)
        assert_close(found, expected, start, share=pixels * eps, stored=STEPS * eps)


CASES = {
    "two workers": Case(world_size=2),
    "three workers with uneven shares": Case(world_size=3),
    "micro-batches": Case(world_size=2, optimizer={"micro_batch": 2}),
    "class weights": Case(world_size=3, class_weights=(0.5, 2.0, 1.0, 7.0)),
    "hard pixels": Case(world_size=2, optimizer={"hard_share": 0.3, "micro_batch": 3}),
    "labels downsampled": Case(world_size=2, optimizer={"upsample_logits": False}),
    "an auxiliary head": Case(world_size=2, model=tiny.RESNET),
}


@pytest.mark.process
@pytest.mark.parametrize("name", CASES)
def test_several_workers_equal_one_with_the_same_global_batch(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    alone = Case(
        model=case.model,
        optimizer={**case.optimizer, "micro_batch": None},
        class_weights=case.class_weights,
    )
    expected_losses, expected = run_steps(ProcessGroup(), alone)
    start = create_trainer(alone, ProcessGroup())[0].model
    workers = tiny.run_workers(case.world_size, tmp_path, run_steps, case)
    for losses, found in workers:
        assert losses == pytest.approx(expected_losses, rel=1e-9)
        assert_close(found, expected, start)
        for key in found:  # the workers have bit-identical weights
            assert torch.equal(found[key], workers[0][1][key])


@pytest.mark.slow
def test_micro_batches_equal_the_whole_batch() -> None:
    whole = Case()
    expected_losses, expected = run_steps(ProcessGroup(), whole)
    for size in (1, 2, 3):
        losses, found = run_steps(ProcessGroup(), Case(optimizer={"micro_batch": size}))
        assert losses == pytest.approx(expected_losses, rel=1e-9)
        assert_close(found, expected, create_trainer(whole, ProcessGroup())[0].model)


def test_downsampled_labels_are_those_of_the_pixels_under_the_features() -> None:
    labels = torch.arange(33 * 37).reshape(1, 33, 37)
    for decoder, stride in ((False, 16), (True, 4)):
        config = ModelConfig(**{**vars(tiny.MOBILENET), "decoder": decoder})
        case = Case(model=config, optimizer={"upsample_logits": False})
        state, _ = create_trainer(case, ProcessGroup())
        objective = Objective(state.model, PixelLoss(4, ignore_index=255), case.config)
        targets = objective.targets(labels)
        image = torch.zeros(1, 3, 33, 37, dtype=torch.float64)
        assert targets.shape[1:] == state.model.logits(image).shape[2:]
        assert int(targets[0, 2, 1]) == 2 * stride * 37 + stride


def test_batch_norm_statistics_change_unless_frozen() -> None:
    for frozen in (True, False):
        state, trainer = create_trainer(Case(optimizer={"freeze_bn": frozen}), ProcessGroup())
        norms = [m for m in state.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        before = [norm.running_mean.clone() for norm in norms]
        state.model.train()  # as an evaluation may leave it
        for step in range(2):
            trainer.step(*random_batch(step))
            assert all(norm.training != frozen for norm in norms)
            assert state.model.training
        same = [torch.equal(norm.running_mean, b) for norm, b in zip(norms, before, strict=True)]
        assert all(same) if frozen else not any(same)


def test_the_moving_average_is_of_weights_and_statistics_after_each_step() -> None:
    case = Case(optimizer={"ema_decay": 0.75, "freeze_bn": False})
    state, trainer = create_trainer(case, ProcessGroup())
    expected = None
    for step in range(3):
        trainer.step(*random_batch(step))
        now = {k: v.clone() for k, v in state.model.state_dict().items() if v.is_floating_point()}
        expected = expected or now
        expected = {k: 0.75 * expected[k] + 0.25 * now[k] for k in now}
    found = state.best_model.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    assert any(key.endswith("running_var") for key in expected)


def test_dropout_depends_only_on_seed_step_and_worker() -> None:
    def loss(*, step: int = 0, rank: int = 0) -> float:
        state, trainer = create_trainer(Case(), ProcessGroup())
        state.model.classifier[0].project[-1].p = 0.5
        state.step = step
        trainer._group = ProcessGroup(rank=rank)  # as another worker
        torch.manual_seed(17)  # any earlier random state
        return trainer.step(*random_batch(0)).loss

    first = loss()
    assert loss() == first
    assert loss(step=1) != first
    assert loss(rank=1) != first


def test_a_step_returns_its_learning_rate_and_the_head_has_a_multiple() -> None:
    case = Case()
    state, trainer = create_trainer(case, ProcessGroup())
    for step in range(STEPS):
        lr = trainer.step(*random_batch(2)).lr
        assert lr == poly(step, base_lr=5e-4, max_steps=STEPS, power=0.9)
        rates = {round(group["lr"] / lr, 6) for group in state.optimizer.param_groups}
        assert rates == {1.0, 3.0}
