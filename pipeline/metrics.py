"""Confusion counts that only add; IoU is derived last.

Counts are int64: they are exact up to 9e18 pixels, and the sum over any split of the images is
the same. A class that neither label nor mask holds has no IoU: None, never 0, 1 or NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]

# bincount copies its input to 8 bytes a pixel: counting by parts keeps that small
_PART = 2**20


def confusion_matrix(
    label: npt.NDArray[Any], mask: npt.NDArray[Any], *, num_classes: int, ignore_index: int = 255
) -> Int64Array:
    """How many pixels of class i (row) the mask calls class j (column): (k, k).

    `label` and `mask` are integers of the same shape; pixels whose label is `ignore_index` are
    left out. Raises ValueError on another shape or type, and on a value that is no class.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}; it must be at least 1")
    if 0 <= ignore_index < num_classes:
        raise ValueError(f"ignore_index {ignore_index} is one of the {num_classes} classes")
    if label.shape != mask.shape:
        raise ValueError(f"the label is {label.shape}, but the mask is {mask.shape}")
    counts = np.zeros(num_classes * num_classes, dtype=np.int64)
    rows, columns = label.ravel(), mask.ravel()
    for start in range(0, rows.size, _PART):
        row, column = rows[start : start + _PART], columns[start : start + _PART]
        _check_classes(column, "mask", num_classes, "does the mask come from another model?")
        kept = row != ignore_index
        row, column = row[kept], column[kept]
        _check_classes(row, "label", num_classes, f"is ignore_index ({ignore_index}) set?")
        cells = row.astype(np.int64) * num_classes + column.astype(np.int64)
        counts += np.bincount(cells, minlength=counts.size)
    return counts.reshape(num_classes, num_classes)


def _check_classes(values: npt.NDArray[Any], what: str, num_classes: int, hint: str) -> None:
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"the {what} is {values.dtype}; it must hold integers")
    if values.size == 0:
        return
    for value in (int(values.min()), int(values.max())):
        if not 0 <= value < num_classes:
            raise ValueError(
                f"{what} holds class {value}, but num_classes is {num_classes}; {hint}"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassCounts:
    """Pixels of each class: found (tp), wrongly called it (fp), missed (fn); (k,) int64 each.

    Counts add: the sum over images is the count of the data set.
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
                raise ValueError(f"{name} holds {values.min()}; a count is at least 0")

    @classmethod
    def zeros(cls, num_classes: int) -> ClassCounts:
        """No pixel yet: the start of a sum."""
        zero = np.zeros(num_classes, dtype=np.int64)
        return cls(tp=zero, fp=zero, fn=zero)

    @classmethod
    def from_confusion(cls, confusion: Int64Array) -> ClassCounts:
        """The counts of a confusion (k, k), rows = label. Raises ValueError on another shape."""
        if confusion.ndim != 2 or confusion.shape[0] != confusion.shape[1]:
            raise ValueError(f"the confusion is {confusion.shape}; it must be square")
        tp = confusion.diagonal()
        return cls(tp=tp.copy(), fp=confusion.sum(axis=0) - tp, fn=confusion.sum(axis=1) - tp)

    def __add__(self, other: ClassCounts) -> ClassCounts:
        if self.tp.shape != other.tp.shape:
            raise ValueError(f"counts of {self.tp.size} and {other.tp.size} classes do not add")
        return ClassCounts(tp=self.tp + other.tp, fp=self.fp + other.fp, fn=self.fn + other.fn)

    def iou(self) -> tuple[float | None, ...]:
        """tp / (tp + fp + fn) of each class; None where that is 0 / 0."""
        unions = self.tp + self.fp + self.fn
        return tuple(
            tp / union if union else None
            for tp, union in zip(self.tp.tolist(), unions.tolist(), strict=True)
        )

    def mean_iou(self) -> float | None:
        """The mean over the classes that have an IoU; None where none has."""
        known = [iou for iou in self.iou() if iou is not None]
        return sum(known) / len(known) if known else None


def pixel_accuracy(confusion: Int64Array) -> float | None:
    """The share of labelled pixels that the mask calls right; None where none is labelled."""
    total = int(confusion.sum())
    return int(confusion.trace()) / total if total else None
