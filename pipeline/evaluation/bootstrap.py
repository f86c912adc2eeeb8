"""How sure a mean IoU is: a bootstrap interval over photos.

Enters: the counts of each photo. Leaves: an interval, the same for the same counts. A photo is
drawn whole, since its pixels are no independent evidence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.metrics import ClassCounts, Int64Array

_PART = 256  # samples at a time: 256 x photos weights, whatever their number


def image_counts(confusion: Int64Array) -> Int64Array:
    """A photo's tp, fp and fn (3, k) of its confusion (k, k): what `bootstrap` takes, stacked."""
    counts = ClassCounts.from_confusion(confusion)
    return np.stack([counts.tp, counts.fp, counts.fn])


def mean_iou(counts: ClassCounts, classes: Sequence[int] | None = None) -> float | None:
    """The mean IoU over `classes` (ids; all by default) that have one; None where none has."""
    ious = counts.iou()
    chosen = ious if classes is None else [ious[i] for i in classes]
    known = [iou for iou in chosen if iou is not None]
    return sum(known) / len(known) if known else None


def bootstrap_interval(
    photos: Int64Array,
    *,
    classes: Sequence[int] | None = None,
    level: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """The interval (low, high) of the mean IoU that holds the share `level` of resampled sets.

    `photos` are counts (n, 3, k), `classes` the ids that the mean is over (all by default). Each
    sample draws n photos with replacement and takes the mean as `mean_over` does; the interval
    lies between percentiles. None where no sample has an IoU. Raises ValueError on no photo,
    another shape, or arguments out of range.
    """
    _check(photos, level, samples)
    n, _, k = photos.shape
    kept = list(range(k)) if classes is None else list(classes)
    flat = photos[:, :, kept].reshape(n, -1).astype(np.float64)  # exact up to 2^53 pixels
    generator = np.random.default_rng(seed)
    means = []
    for start in range(0, samples, _PART):
        drawn = generator.multinomial(n, np.full(n, 1 / n), size=min(_PART, samples - start))
        tp, fp, fn = (drawn @ flat).reshape(-1, 3, len(kept)).transpose(1, 0, 2)
        union = tp + fp + fn
        seen = union > 0
        known = seen.sum(axis=1)
        total = np.divide(tp, union, out=np.zeros_like(tp), where=seen).sum(axis=1)
        means.append(total[known > 0] / known[known > 0])
    of_all = np.concatenate(means)
    if of_all.size == 0:
        return None
    low, high = np.quantile(of_all, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _check(photos: Int64Array, level: float, samples: int) -> None:
    if photos.ndim != 3 or photos.shape[1] != 3 or len(photos) == 0:
        raise ValueError(
            f"photos is {photos.shape}; it must be (n, 3, k), tp, fp and fn of n > 0 photos"
        )
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it must be over 0 and below 1, like 0.95")
    if samples < 1:
        raise ValueError(f"samples is {samples}; it must be at least 1, 2000 is enough for 95 %")
