"""A step, against the update written out; and workers and micro-batches, against one worker.

Arithmetic is compared in fp64. In fp32 every CPU sums in an order of its own, and a pixel that
rounding moves over a kink of ReLU6 changes gradients by percents; one case is in fp32, without
kinks, against a bound on rounding.
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
    """What is trained in four steps of seven photos."""

    world_size: int = 1
    model: ModelConfig = tiny.MOBILENET
    optimiser: dict[str, object] = field(default_factory=dict)
    class_weights: tuple[float, ...] | None = None
    double: bool = True
    kinks: bool = True  # without them, SiLU takes the place of ReLU and ReLU6

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
        return OptimizerConfig(**{**values, **self.optimiser})


def drawn(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Seven photos with unequal numbers of ignored pixels; 1, 3, 4 and 5 are ignored as a whole.

    So of two workers the second has no valid pixel, and of three the second neither.
    """
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (7, 33, 37, 3), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 3, (7, 33, 37), generator=generator, dtype=torch.uint8)
    for photo, share in enumerate((0.1, 1, 0.9, 1, 1, 1, 0.5)):
        labels[photo][torch.rand(33, 37, generator=generator) < share] = 255
    if step == 2:  # of the third batch nothing is valid at all
        labels[:] = 255
    return images, labels


def make(case: Case, group: ProcessGroup) -> tuple[TrainingState, Trainer]:
    model = tiny.network(ModelConfig(**{**vars(case.model), "dropout": 0.0}))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):  # the auxiliary head's too
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


def trained(group: ProcessGroup, case: Case) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of the steps, and the weights after them, of a worker of a group."""
    state, stepper = make(case, group)
    losses = []
    for step in range(STEPS):
        images, labels = (each[group.rank :: group.world_size] for each in drawn(step))
        losses.append(stepper.step(images, labels).loss)
    return losses, {key: value.detach() for key, value in state.model.named_parameters()}


def assert_close(
    found: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    start: torch.nn.Module,
    *,
    share: float = 1e-9,
    stored: float = 0.0,
) -> None:
    """The largest difference is at most `share` of the largest change, and `stored` of a weight."""
    first = dict(start.named_parameters())
    change = max(float((expected[key] - first[key]).abs().max().detach()) for key in first)
    difference = max(float((found[key] - expected[key]).abs().max()) for key in first)
    largest = max(float(value.abs().max()) for value in expected.values())
    assert change > 1e-5
    assert difference <= share * change + stored * largest, f"{difference:.3g} of {change:.3g}"


def written_out(case: Case) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same in plain PyTorch: torch's mean over valid pixels, SGD by hand. Plain cases alone."""
    state, _ = make(case, ProcessGroup())
    model, config = state.model.eval(), case.config  # eval: frozen statistics, no dropout
    dtype = next(model.parameters()).dtype
    parameters = dict(model.named_parameters())
    momentum = {key: torch.zeros_like(value) for key, value in parameters.items()}
    mean, std = (
        torch.tensor(each, dtype=dtype)[:, None, None]
        for each in (model.config.mean, model.config.std)
    )
    weight = None if case.class_weights is None else torch.tensor(case.class_weights, dtype=dtype)
    losses = []
    for step in range(STEPS):
        images, labels = drawn(step)
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


@pytest.mark.parametrize("class_weights", [None, (0.5, 2.0, 1.0, 7.0)])
def test_four_steps_are_those_of_plain_pytorch_written_out(
    class_weights: tuple[float, ...] | None,
) -> None:
    case = Case(class_weights=class_weights)
    losses, found = trained(ProcessGroup(), case)
    expected_losses, expected = written_out(case)
    assert losses == pytest.approx(expected_losses, rel=1e-9)
    assert losses[2] == 0
    assert_close(found, expected, make(case, ProcessGroup())[0].model)


def test_in_fp32_four_steps_of_three_workers_differ_from_fp64_by_rounding(tmp_path: Path) -> None:
    exact = Case(kinks=False)
    expected_losses, expected = written_out(exact)
    start = make(exact, ProcessGroup())[0].model
    # A gradient is a sum over the batch's pixels, and each step rounds the weight that it stores:
    # n terms of fp32 lose at most n * eps of their size.
    eps = torch.finfo(torch.float32).eps
    pixels = drawn(0)[1].numel()
    for losses, found in tiny.run_workers(3, tmp_path, trained, Case(kinks=False, double=False)):
        assert losses == pytest.approx(expected_losses, rel=pixels * eps)
        assert_close(found, expected, start, share=pixels * eps, stored=STEPS * eps)


SHARED = {
    "two workers": Case(world_size=2),
    "three workers with uneven shares": Case(world_size=3),
    "micro-batches": Case(world_size=2, optimiser={"micro_batch": 2}),
    "class weights": Case(world_size=3, class_weights=(0.5, 2.0, 1.0, 7.0)),
    "hard pixels": Case(world_size=2, optimiser={"hard_share": 0.3, "micro_batch": 3}),
    "labels downsampled": Case(world_size=2, optimiser={"upsample_logits": False}),
    "an auxiliary head": Case(world_size=2, model=tiny.RESNET),
}


@pytest.mark.parametrize("name", SHARED)
def test_workers_equal_one_worker_at_the_same_global_batch(name: str, tmp_path: Path) -> None:
    case = SHARED[name]
    alone = Case(
        model=case.model,
        optimiser={**case.optimiser, "micro_batch": None},
        class_weights=case.class_weights,
    )
    expected_losses, expected = trained(ProcessGroup(), alone)
    start = make(alone, ProcessGroup())[0].model
    workers = tiny.run_workers(case.world_size, tmp_path, trained, case)
    for losses, found in workers:
        assert losses == pytest.approx(expected_losses, rel=1e-9)
        assert_close(found, expected, start)
        for key in found:  # and the workers agree among themselves to the last bit
            assert torch.equal(found[key], workers[0][1][key])


def test_micro_batches_of_one_worker_equal_the_whole_batch() -> None:
    whole = Case()
    expected_losses, expected = trained(ProcessGroup(), whole)
    for size in (1, 2, 3):
        losses, found = trained(ProcessGroup(), Case(optimiser={"micro_batch": size}))
        assert losses == pytest.approx(expected_losses, rel=1e-9)
        assert_close(found, expected, make(whole, ProcessGroup())[0].model)


def test_labels_of_a_feature_are_those_of_the_pixel_that_it_looks_at() -> None:
    labels = torch.arange(33 * 37).reshape(1, 33, 37)
    for decoder, stride in ((False, 16), (True, 4)):
        config = ModelConfig(**{**vars(tiny.MOBILENET), "decoder": decoder})
        case = Case(model=config, optimiser={"upsample_logits": False})
        state, _ = make(case, ProcessGroup())
        objective = Objective(state.model, PixelLoss(4, ignore_index=255), case.config)
        targets = objective.targets(labels)
        image = torch.zeros(1, 3, 33, 37, dtype=torch.float64)
        assert targets.shape[1:] == state.model.logits(image).shape[2:]
        assert int(targets[0, 2, 1]) == 2 * stride * 37 + stride


def test_frozen_normalisation_stays_frozen_and_trained_one_learns_the_batch() -> None:
    for frozen in (True, False):
        state, stepper = make(Case(optimiser={"freeze_bn": frozen}), ProcessGroup())
        norms = [m for m in state.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        before = [norm.running_mean.clone() for norm in norms]
        state.model.train()  # as whatever came before may have left it
        for step in range(2):
            stepper.step(*drawn(step))
            assert all(norm.training != frozen for norm in norms)
            assert state.model.training
        same = [torch.equal(norm.running_mean, b) for norm, b in zip(norms, before, strict=True)]
        assert all(same) if frozen else not any(same)


def test_the_average_is_that_of_weights_and_statistics_after_each_step() -> None:
    case = Case(optimiser={"ema_decay": 0.75, "freeze_bn": False})
    state, stepper = make(case, ProcessGroup())
    expected = None
    for step in range(3):
        stepper.step(*drawn(step))
        now = {k: v.clone() for k, v in state.model.state_dict().items() if v.is_floating_point()}
        expected = expected or now
        expected = {k: 0.75 * expected[k] + 0.25 * now[k] for k in now}
    found = state.best_model.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    assert any(key.endswith("running_var") for key in expected)


def test_what_is_random_in_the_network_follows_from_seed_step_and_worker() -> None:
    def loss(*, step: int = 0, rank: int = 0) -> float:
        state, stepper = make(Case(), ProcessGroup())
        state.model.classifier[0].project[-1].p = 0.5
        state.step = step
        stepper._group = ProcessGroup(
            rank=rank
        )  # noises of another worker, without another process
        torch.manual_seed(17)  # whatever was drawn before
        return stepper.step(*drawn(0)).loss

    first = loss()
    assert loss() == first
    assert loss(step=1) != first
    assert loss(rank=1) != first


def test_every_step_is_told_its_rate_and_the_head_has_its_own() -> None:
    case = Case()
    state, stepper = make(case, ProcessGroup())
    for step in range(STEPS):
        told = stepper.step(*drawn(2)).lr
        assert told == poly(step, base_lr=5e-4, max_steps=STEPS, power=0.9)
        rates = {round(group["lr"] / told, 6) for group in state.optimizer.param_groups}
        assert rates == {1.0, 3.0}
