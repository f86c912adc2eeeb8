"""Confusion counts, which are summed over images; IoU is derived from the sum.

Counts are int64, exact up to 9e18 pixels, so the order and grouping of the images do not matter. A
class that is in neither label nor mask has no IoU: None, not 0, 1 or NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.checks import check_at_least

Int64Array = npt.NDArray[np.int64]

# bincount converts its input to 8 bytes per pixel: counting in chunks bounds that memory
_CHUNK = 2**20


def confusion_matrix(
    label: npt.NDArray[Any], mask: npt.NDArray[Any], *, num_classes: int, ignore_index: int = 255
) -> Int64Array:
    """Return the confusion matrix (k, k) int64: pixels of class i (row) predicted as j (column).

    `label` and `mask` are integer arrays of the same shape; pixels whose label is `ignore_index`
    are not counted. Raises ValueError on other shapes or types, and on values that are not classes.
    """
    check_at_least("num_classes", num_classes, 1)
    if 0 <= ignore_index < num_classes:
        raise ValueError(f"ignore_index {ignore_index} is one of the {num_classes} classes")
    if label.shape != mask.shape:
        raise ValueError(f"the label has shape {label.shape}, but the mask has shape {mask.shape}")
    counts = np.zeros(num_classes * num_classes, dtype=np.int64)
    rows, columns = label.ravel(), mask.ravel()
    for start in range(0, rows.size, _CHUNK):
        row, column = rows[start : start + _CHUNK], columns[start : start + _CHUNK]
        _check_classes(column, "mask", num_classes, "does the mask come from another model?")
        kept = row != ignore_index
        row, column = row[kept], column[kept]
        _check_classes(row, "label", num_classes, f"is ignore_index ({ignore_index}) set?")
        cells = row.astype(np.int64) * num_classes + column.astype(np.int64)
        counts += np.bincount(cells, minlength=counts.size)
    return counts.reshape(num_classes, num_classes)


def _check_classes(values: npt.NDArray[Any], what: str, num_classes: int, hint: str) -> None:
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"the {what} is {values.dtype}; it must be an integer array")
    if values.size == 0:
        return
    for value in (int(values.min()), int(values.max())):
        if not 0 <= value < num_classes:
            raise ValueError(
                f"{what} holds class {value}, but num_classes is {num_classes}; {hint}"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassCounts:
    """True positives, false positives and false negatives of each class, in pixels; (k,) int64.

    The sum over images is the count of the data set.
    """

    tp: Int64Array
    fp: Int64Array
    fn: Int64Array

    def __post_init__(self) -> None:
        for name in ("tp", "fp", "fn"):
            values: Int64Array = getattr(self, name)
            if values.dtype != np.int64 or values.shape != (self.tp.size,):
                raise ValueError(
                    f"{name} is {values.dtype} {values.shape}; it must be int64 ({self.tp.size},)"
                )
            if (values < 0).any():
                raise ValueError(f"{name} holds {values.min()}; counts must be at least 0")

    @classmethod
    def from_confusion(cls, confusion: Int64Array) -> ClassCounts:
        """Return the counts of a confusion matrix (k, k), rows = label. Raises ValueError."""
        if confusion.ndim != 2 or confusion.shape[0] != confusion.shape[1]:
            raise ValueError(f"the confusion matrix has shape {confusion.shape}; it must be square")
        tp = confusion.diagonal()
        return cls(tp=tp.copy(), fp=confusion.sum(axis=0) - tp, fn=confusion.sum(axis=1) - tp)

    def __add__(self, other: ClassCounts) -> ClassCounts:
        if self.tp.shape != other.tp.shape:
            raise ValueError(
                f"counts of {self.tp.size} and {other.tp.size} classes cannot be added"
            )
        return ClassCounts(tp=self.tp + other.tp, fp=self.fp + other.fp, fn=self.fn + other.fn)

    def iou(self) -> tuple[float | None, ...]:
        """Return tp / (tp + fp + fn) of each class, None for a class where that is 0 / 0."""
        unions = self.tp + self.fp + self.fn
        return tuple(
            tp / union if union else None
            for tp, union in zip(self.tp.tolist(), unions.tolist(), strict=True)
        )

    def mean_iou(self, classes: Sequence[int] | None = None) -> float | None:
        """Return the mean over those of `classes` (default: all) that have an IoU, or None."""
        ious = self.iou()
        chosen = ious if classes is None else [ious[i] for i in classes]
        known = [iou for iou in chosen if iou is not None]
        return sum(known) / len(known) if known else None


def pixel_accuracy(confusion: Int64Array) -> float | None:
    """Return the fraction of labeled pixels predicted correctly, None without labeled pixels."""
    total = int(confusion.sum())
    return int(confusion.trace()) / total if total else None
