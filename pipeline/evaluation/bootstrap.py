"""Bootstrap confidence interval of the mean IoU over images.

Whole images are resampled, since the pixels of one image are not independent. The same counts give
the same interval.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.checks import check_at_least
from pipeline.metrics import ClassCounts, Int64Array

_BATCH = 256  # samples at a time, which bounds the weights in memory to 256 x images


def image_counts(confusion: Int64Array) -> Int64Array:
    """Return tp, fp and fn (3, k) of one image's confusion (k, k), to be stacked."""
    counts = ClassCounts.from_confusion(confusion)
    return np.stack([counts.tp, counts.fp, counts.fn])


def bootstrap_interval(
    images: Int64Array,
    *,
    classes: Sequence[int] | None = None,
    level: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Return the percentile interval (low, high) of the mean IoU at confidence `level`.

    `images` are counts (n, 3, k), `classes` the ids that the mean is over (all by default). Each
    sample draws n images with replacement and computes the mean IoU. Returns None if no sample has
    an IoU. Raises ValueError on an empty set, another shape, or an argument out of range.
    """
    _check(images, level, samples)
    n, _, k = images.shape
    kept = list(range(k)) if classes is None else list(classes)
    flat = images[:, :, kept].reshape(n, -1).astype(np.float64)  # exact up to 2^53 pixels
    generator = np.random.default_rng(seed)
    means = []
    for start in range(0, samples, _BATCH):
        drawn = generator.multinomial(n, np.full(n, 1 / n), size=min(_BATCH, samples - start))
        tp, fp, fn = (drawn @ flat).reshape(-1, 3, len(kept)).transpose(1, 0, 2)
        union = tp + fp + fn
        present = union > 0
        known = present.sum(axis=1)
        total = np.divide(tp, union, out=np.zeros_like(tp), where=present).sum(axis=1)
        means.append(total[known > 0] / known[known > 0])
    all_means = np.concatenate(means)
    if all_means.size == 0:
        return None
    low, high = np.quantile(all_means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _check(images: Int64Array, level: float, samples: int) -> None:
    if images.ndim != 3 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(
            f"images has shape {images.shape}: must be (n, 3, k), tp, fp and fn of n > 0 images"
        )
    if not 0 < level < 1:
        raise ValueError(f"level {level:g}: must be over 0 and below 1, like 0.95")
    check_at_least("samples", samples, 1, "2000 is enough for 95 %")
