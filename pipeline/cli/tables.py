"""Text tables of evaluation results: IoU by class, and means with intervals, in percent."""

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
    """Scores of one evaluation, each from 0 to 1; None if no pixel is labeled.

    `interval` is the 95 % bootstrap interval of the mean IoU over images; `over` and its interval
    are those of the mean over selected classes, None if none are selected.
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
    def from_result(cls, name: str, result: EvalResult, over: Sequence[int]) -> Scores:
        """Return the scores of a result; `over` holds the ids of the selected classes."""
        counts = result.evaluation.counts
        # in the order of the split: the interval does not depend on how workers shared the images
        images = np.stack([result.per_image[index] for index in sorted(result.per_image)])
        return cls(
            name=name,
            images=result.evaluation.images,
            ious=counts.iou(),
            miou=counts.mean_iou(),
            interval=bootstrap_interval(images),
            over=counts.mean_iou(over) if over else None,
            over_interval=bootstrap_interval(images, classes=over) if over else None,
            pixel_accuracy=result.evaluation.pixel_accuracy,
        )

    def facts(self) -> dict[str, object]:
        """Return the means by name, from 0 to 1, leaving out those that are None."""
        low, high = self.interval or (None, None)
        over_low, over_high = self.over_interval or (None, None)
        values = {
            **{"miou": self.miou, "miou_low": low, "miou_high": high},
            **{"over": self.over, "over_low": over_low, "over_high": over_high},
            "pixel_accuracy": self.pixel_accuracy,
        }
        return {name: f"{value:.6f}" for name, value in values.items() if value is not None}


def class_table(columns: Sequence[Scores], classes: Classes) -> list[str]:
    """Return the lines of a table of the IoU of each class, with a column per evaluation."""
    head = ["IoU, %", *(column.name for column in columns)]
    rows = [
        [name, *(_percent(column.ious[i]) for column in columns)]
        for i, name in enumerate(classes.names)
    ]
    return _lines([head, *rows])


def mean_table(rows: Sequence[Scores], over: Sequence[str]) -> list[str]:
    """Return the lines of a table of means and their intervals, with a row per evaluation."""
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
    """Align the first column left and the others right, two spaces apart."""
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
