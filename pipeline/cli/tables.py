"""Evaluations as tables for people: IoU by class, and the mean with its interval, in percent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.data.labels import Classes
from pipeline.evaluation.bootstrap import bootstrap_interval
from pipeline.evaluation.evaluator import EvalResult

_NONE = "-"


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What one way to look at the photos came to, each 0 to 1; None where nothing is labelled.

    `interval` holds the mean IoU of 95 % of the resampled sets of photos; `over` and its interval
    are of the mean over a choice of classes, None without one.
    """

    name: str
    images: int
    ious: tuple[float | None, ...]
    miou: float | None
    interval: tuple[float, float] | None
    over: float | None
    over_interval: tuple[float, float] | None
    pixel_accuracy: float | None

    @classmethod
    def of(cls, name: str, seen: EvalResult, over: Sequence[int]) -> Scores:
        """The scores of what was seen; `over` are the ids of the choice, () for none."""
        counts = seen.evaluation.counts
        # in the split's order, so that the interval is the same whoever looked at which photo
        photos = np.stack([seen.per_image[index] for index in sorted(seen.per_image)])
        return cls(
            name=name,
            images=seen.evaluation.images,
            ious=counts.iou(),
            miou=counts.mean_iou(),
            interval=bootstrap_interval(photos),
            over=counts.mean_iou(over) if over else None,
            over_interval=bootstrap_interval(photos, classes=over) if over else None,
            pixel_accuracy=seen.evaluation.pixel_accuracy,
        )

    def facts(self) -> dict[str, object]:
        """The means as key and value, 0 to 1; what there is none of is left out."""
        low, high = self.interval or (None, None)
        over_low, over_high = self.over_interval or (None, None)
        values = {
            **{"miou": self.miou, "miou_low": low, "miou_high": high},
            **{"over": self.over, "over_low": over_low, "over_high": over_high},
            "pixel_accuracy": self.pixel_accuracy,
        }
        return {name: f"{value:.6f}" for name, value in values.items() if value is not None}


def class_table(columns: Sequence[Scores], classes: Classes) -> list[str]:
    """Lines: the IoU of each class, one column for each of the evaluations."""
    head = ["IoU, %", *(column.name for column in columns)]
    rows = [
        [name, *(_percent(column.ious[i]) for column in columns)]
        for i, name in enumerate(classes.names)
    ]
    return _lines([head, *rows])


def mean_table(rows: Sequence[Scores], over: Sequence[str]) -> list[str]:
    """Lines: one for each evaluation, with the means and their intervals."""
    head = ["%", "mIoU", "95 % interval"]
    if over:
        head += [f"over {len(over)}", "95 % interval"]
    table = [[*head, "pixel accuracy"]]
    for row in rows:
        cells = [row.name, _percent(row.miou), _between(row.interval)]
        if over:
            cells += [_percent(row.over), _between(row.over_interval)]
        table.append([*cells, _percent(row.pixel_accuracy)])
    return _lines(table)


def _lines(table: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right, two blanks between them."""
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


def _percent(value: float | None) -> str:
    return _NONE if value is None else f"{100 * value:.2f}"


def _between(interval: tuple[float, float] | None) -> str:
    if interval is None:
        return _NONE
    return f"{_percent(interval[0])} to {_percent(interval[1])}"
