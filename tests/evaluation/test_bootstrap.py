"""Bootstrap intervals of the mean IoU, against every possible sample of a small set."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pipeline.evaluation.bootstrap import bootstrap_interval, image_counts
from pipeline.metrics import ClassCounts


def plain_mean(images: list[np.ndarray], classes: list[int]) -> float:
    """Return the mean IoU, class by class, with Python integers."""
    ious = []
    for k in classes:
        tp, union = (
            sum(int(image[0, k]) for image in images),
            sum(int(image[:, k].sum()) for image in images),
        )
        if union:
            ious.append(tp / union)
    return sum(ious) / len(ious)


def test_the_interval_of_two_images_worked_by_hand() -> None:
    # one is all right, one all wrong: the same one twice has probability 1/4, one of each 1/2
    images = np.array([[[8], [0], [0]], [[0], [4], [4]]])
    assert bootstrap_interval(images) == (0.0, 1.0)
    assert bootstrap_interval(images, level=0.3) == (0.5, 0.5)


@pytest.mark.parametrize("classes", [[0, 1, 2], [2], [2, 0]])
def test_the_interval_agrees_with_all_samples_of_four_images(classes: list[int]) -> None:
    images = np.random.default_rng(3).integers(0, 60, size=(4, 3, 3))
    images[1:, :, 1] = 0  # a class that only one image has
    means = sorted(
        plain_mean([images[i] for i in drawn], classes)
        for drawn in itertools.product(range(4), repeat=4)
    )
    found = bootstrap_interval(images, classes=classes, samples=40_000)
    assert found is not None
    for value, share in zip(found, (0.025, 0.975), strict=True):
        # a frequency may differ from its probability by some thousandths
        low, high = np.quantile(means, [max(0, share - 0.008), min(1, share + 0.008)])
        assert low - 1e-12 <= value <= high + 1e-12


def test_the_same_counts_give_the_same_interval_around_their_mean() -> None:
    images = np.random.default_rng(5).integers(0, 90, size=(30, 3, 4))
    first = bootstrap_interval(images)
    assert first == bootstrap_interval(images.copy())
    assert first is not None
    assert first[0] < plain_mean(list(images), [0, 1, 2, 3]) < first[1]


def test_identical_images_give_an_interval_of_no_width() -> None:
    images = np.tile(np.array([[[3, 0], [1, 0], [0, 0]]]), (9, 1, 1))
    assert bootstrap_interval(images) == (0.75, 0.75)
    assert bootstrap_interval(images, classes=[1]) is None


def test_counts_of_an_image_and_their_mean_over_some_classes() -> None:
    confusion = np.array([[5, 1, 0], [2, 3, 0], [0, 0, 0]])
    tp, fp, fn = image_counts(confusion)
    assert (tp.tolist(), fp.tolist(), fn.tolist()) == ([5, 3, 0], [2, 1, 0], [1, 2, 0])
    counts = ClassCounts(tp=tp, fp=fp, fn=fn)
    assert counts.mean_iou() == pytest.approx((5 / 8 + 3 / 6) / 2)
    assert counts.mean_iou([1, 2]) == pytest.approx(3 / 6)
    assert counts.mean_iou([2]) is None


def test_invalid_arguments_are_refused() -> None:
    one = np.ones((1, 3, 2), dtype=np.int64)
    with pytest.raises(ValueError, match=r"must be \(n, 3, k\)"):
        bootstrap_interval(one[:0])
    with pytest.raises(ValueError, match="level 95: must be over 0"):
        bootstrap_interval(one, level=95)
    with pytest.raises(ValueError, match="samples 0: must be at least 1"):
        bootstrap_interval(one, samples=0)
