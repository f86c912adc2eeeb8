"""IoU and pixel accuracy against torchmetrics, on random masks and on the corners of the rules."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline import metrics

torchmetrics = pytest.importorskip("torchmetrics", reason="make interop installs it")

pytestmark = pytest.mark.interop

IGNORE = 255


def counted(label: np.ndarray, mask: np.ndarray, num_classes: int) -> np.ndarray:
    return metrics.confusion_matrix(label, mask, num_classes=num_classes, ignore_index=IGNORE)


@pytest.mark.parametrize("seed", range(5))
def test_iou_and_accuracy_equal_torchmetrics(seed: int) -> None:
    generator = np.random.default_rng(seed)
    num_classes = int(generator.integers(2, 22))
    label = generator.integers(0, num_classes, (3, 40, 50)).astype(np.uint8)
    mask = np.where(generator.random(label.shape) < 0.6, label, 0).astype(np.uint8)
    label[generator.random(label.shape) < 0.1] = IGNORE
    confusion = counted(label, mask, num_classes)
    given = torch.from_numpy(mask.astype(np.int64)), torch.from_numpy(label.astype(np.int64))
    jaccard = torchmetrics.JaccardIndex(
        "multiclass", num_classes=num_classes, ignore_index=IGNORE, average="none"
    )
    expected = jaccard(*given).tolist()
    assert metrics.ClassCounts.from_confusion(confusion).iou() == pytest.approx(expected, abs=1e-6)
    accuracy = torchmetrics.Accuracy(
        "multiclass", num_classes=num_classes, ignore_index=IGNORE, average="micro"
    )
    assert metrics.pixel_accuracy(confusion) == pytest.approx(float(accuracy(*given)), abs=1e-6)


def test_the_mean_over_present_classes_is_torchmetrics_macro_average() -> None:
    label = np.array([[0, 0, 1, 1], [0, 0, 1, 3]], np.uint8)
    mask = np.array([[0, 1, 1, 1], [0, 0, 1, 3]], np.uint8)
    given = torch.from_numpy(mask.astype(np.int64)), torch.from_numpy(label.astype(np.int64))
    macro = torchmetrics.JaccardIndex("multiclass", num_classes=5, average="macro")
    found = metrics.ClassCounts.from_confusion(counted(label, mask, 5)).mean_iou()
    assert found == pytest.approx(float(macro(*given)), abs=1e-6)
