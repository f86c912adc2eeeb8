"""The loss, compared with a loop over images and pixels in plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.train.worker.loss import PixelLoss

K, IGNORE = 4, 9


def random_batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (5, k, 5, 7) in fp64 and labels; all pixels of image 1 are ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(5, K, 5, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, K, (5, 5, 7), generator=generator)
    for image, share in enumerate((0.1, 1.0, 0.7, 0.0, 0.97)):
        labels[image][torch.rand(5, 7, generator=generator) < share] = IGNORE
    return logits, labels.to(torch.uint8)


def reference_loss(
    logits: torch.Tensor, labels: torch.Tensor, class_weights: list[float], hard_share: float
) -> tuple[float, float]:
    """Return the summed loss and the weight, computed pixel by pixel."""
    total = weight = 0.0
    for image in range(len(labels)):
        losses, weights = [], []
        for row in range(labels.shape[1]):
            for column in range(labels.shape[2]):
                label = int(labels[image, row, column])
                if label == IGNORE:
                    continue
                scores = logits[image, :, row, column].tolist()
                exponents = [math.exp(score) for score in scores]
                probability = exponents[label] / math.fsum(exponents)
                losses.append(-math.log(probability) * class_weights[label])
                weights.append(class_weights[label])
        kept = math.ceil(len(losses) * hard_share)
        total += math.fsum(sorted(losses, reverse=True)[:kept])
        weight += math.fsum(weights) * kept / max(1, len(losses))
    return total, weight


@pytest.mark.parametrize("hard_share", [1.0, 0.5, 0.25, 0.01])
@pytest.mark.parametrize("class_weights", [[1.0] * K, [0.25, 3.0, 1.0, 0.0]])
def test_sum_and_weight_equal_a_loop_over_pixels(
    class_weights: list[float], hard_share: float
) -> None:
    for seed in range(3):
        logits, labels = random_batch(seed)
        loss = PixelLoss(
            K,
            ignore_index=IGNORE,
            class_weights=torch.tensor(class_weights),
            hard_share=hard_share,
        ).double()
        total, weight = reference_loss(logits, labels, class_weights, hard_share)
        assert float(loss(logits, labels)) == pytest.approx(total, rel=1e-12)
        assert float(loss.weight(labels)) == pytest.approx(weight, rel=1e-6)
        assert loss.weight(labels).dtype == torch.float64


def test_without_class_weights_every_valid_pixel_counts_once() -> None:
    _, labels = random_batch()
    loss = PixelLoss(K, ignore_index=IGNORE)
    assert int(loss.weight(labels)) == int((labels != IGNORE).sum())


@pytest.mark.parametrize("hard_share", [1.0, 0.3])
def test_the_parts_of_any_split_of_a_batch_add_up(hard_share: float) -> None:
    logits, labels = random_batch()
    loss = PixelLoss(K, ignore_index=IGNORE, hard_share=hard_share).double()
    for size in (1, 2, 3):
        parts = list(zip(logits.split(size), labels.split(size), strict=True))
        total = sum(float(loss(*part)) for part in parts)
        weight = sum(float(loss.weight(part)) for _, part in parts)
        assert total == pytest.approx(float(loss(logits, labels)), rel=1e-12)
        assert weight == pytest.approx(float(loss.weight(labels)), rel=1e-12)


@pytest.mark.parametrize("hard_share", [1.0, 0.3])
def test_without_valid_pixels_loss_and_gradients_are_zero(
    hard_share: float,
) -> None:
    logits = torch.randn(2, K, 3, 5, requires_grad=True)
    labels = torch.full((2, 3, 5), IGNORE, dtype=torch.uint8)
    loss = PixelLoss(K, ignore_index=IGNORE, hard_share=hard_share)
    summed = loss(logits, labels)
    summed.backward()
    assert summed.item() == loss.weight(labels).item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_only_hard_pixels_have_a_gradient() -> None:
    logits, labels = random_batch()
    logits.requires_grad_()
    PixelLoss(K, ignore_index=IGNORE, hard_share=0.25)(logits, labels).backward()
    assert logits.grad is not None
    touched = logits.grad.abs().sum(dim=1) > 0
    valid = labels != IGNORE
    assert touched.flatten(1).sum(1).tolist() == [
        math.ceil(0.25 * n) for n in valid.flatten(1).sum(1).tolist()
    ]
    assert not (touched & ~valid).any()


def test_half_precision_logits_are_summed_in_fp32() -> None:
    logits, labels = random_batch()
    halves = logits.bfloat16()
    loss = PixelLoss(K, ignore_index=IGNORE)
    assert loss(halves, labels).dtype == torch.float32
    assert float(loss(halves, labels)) == pytest.approx(float(loss(halves.float(), labels)))


def test_class_weights_of_another_number_of_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"class_weights has shape \(3,\); num_classes is 4"):
        PixelLoss(K, ignore_index=IGNORE, class_weights=torch.ones(3))
