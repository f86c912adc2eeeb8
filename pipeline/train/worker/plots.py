"""A run as pictures: its curves, photos with label and prediction, and TensorBoard's file.

Enters: a history, or photos with masks. Leaves: bytes, the same for the same values, so that doing
it again after a resume changes and repeats nothing. Figures are drawn without a window or any
global state, so they may be drawn anywhere.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

# it ships no types
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

from pipeline.data import masks
from pipeline.data.images import Pixels
from pipeline.data.labels import Classes
from pipeline.evaluation.score import Score
from pipeline.train.worker.history import History, Step

Sample = tuple[Pixels, Pixels, Pixels, str]
"""Photo (h, w, 3), label and prediction (h, w), all uint8, and what it is called."""

_BLUE, _ORANGE, _GREEN, _GRAY = "#1f5fa8", "#c8590a", "#2a7f3f", "#5f6670"
_PALE = "#a9c3e2"
_COLUMN_INCHES = 4.0
_TALLEST_INCHES = 4.0  # portrait photos are drawn smaller
_OVERLAY = 0.6  # of the palette's colour, so that it is known again in the legend
_LEGEND_COLUMNS = 6
_DPI = 110


def curves(history: History) -> bytes:
    """A PNG of loss, learning rate and mIoU by step, the best mIoU marked; parts may be empty."""
    figure = _figure(9.0, 8.0)
    grid = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1.4, 3))
    loss, rate, miou = grid
    _draw_loss(loss, history.steps)
    _draw_rate(rate, history.steps)
    _draw_scores(miou, history)
    for axes in grid:
        axes.grid(visible=True, color="#e3e6ea", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    miou.set_xlabel("step")
    entries: list[Step | Score] = [*history.steps, *history.scores]
    miou.set_xlim(0, 1.02 * max((entry.step for entry in entries), default=1))
    miou.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    miou.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    return _png(figure)


def samples(rows: Sequence[Sample], classes: Classes) -> bytes:
    """A PNG with a row for each sample: the photo, its label and the prediction drawn over it.

    Below are the colours of the classes that appear. Raises ValueError on no row, and as
    `masks.overlay` does.
    """
    if not rows:
        raise ValueError("rows is empty; give at least one (image, label, mask, title)")
    heights = [
        min(_TALLEST_INCHES, _COLUMN_INCHES * image.shape[0] / image.shape[1]) + 0.3
        for image, _, _, _ in rows
    ]
    found = set().union(*(np.unique(each).tolist() for row in rows for each in row[1:3]))
    seen = sorted(found - {classes.ignore_index})
    legend_inches = 0.3 + 0.24 * -(-len(seen) // _LEGEND_COLUMNS)
    figure = _figure(3 * _COLUMN_INCHES, sum(heights) + legend_inches)
    grid = figure.subplots(len(rows), 3, squeeze=False, height_ratios=heights)
    for axes, (image, label, mask, title) in zip(grid, rows, strict=True):
        over = [masks.overlay(image, ids, classes, alpha=_OVERLAY) for ids in (label, mask)]
        titles = (title, "label", "prediction")
        for cell, picture, text in zip(axes, (image, *over), titles, strict=True):
            cell.imshow(picture, interpolation="antialiased")
            cell.set_title(text, fontsize=10)
            cell.set_axis_off()
    _draw_legend(figure, classes, seen)
    return _png(figure)


def event_file(history: History, class_names: Sequence[str]) -> bytes:
    """The history as TensorBoard's file of events, each at the time that the history says.

    Tags: train/loss, train/lr, train/images_per_second, train/wait_share, val/miou,
    val/pixel_accuracy, val/iou/NAME. An absent class has no value. The file's name must hold
    "tfevents". Raises ValueError where a score has another number of classes.
    """
    entries: list[Step | Score] = [*history.steps, *history.scores]
    entries.sort(key=lambda entry: entry.step)
    first = min((entry.time for entry in entries), default=0.0)
    with tempfile.TemporaryDirectory(prefix="events-") as folder:
        path = os.path.join(folder, "events")
        writer = RecordWriter(path)
        try:
            head = Event(wall_time=first, file_version="brain.Event:2")
            writer.write(head.SerializeToString())
            for entry in entries:
                summary = Summary()
                for tag, value in _values(entry, class_names):
                    summary.value.add(tag=tag, simple_value=value)
                event = Event(wall_time=entry.time, step=entry.step, summary=summary)
                writer.write(event.SerializeToString())
        finally:
            writer.close()
        with open(path, "rb") as file:
            return file.read()


def _values(entry: Step | Score, class_names: Sequence[str]) -> Iterable[tuple[str, float]]:
    if isinstance(entry, Step):
        for name in ("loss", "lr", "images_per_second", "wait_share"):
            yield f"train/{name}", getattr(entry, name)
        return
    if len(entry.ious) != len(class_names):
        raise ValueError(
            f"class_names are {len(class_names)}, but the score at step {entry.step} has "
            f"{len(entry.ious)} classes; give the names of the classes that were scored"
        )
    yield "val/miou", entry.miou
    yield "val/pixel_accuracy", entry.pixel_accuracy
    for name, iou in zip(class_names, entry.ious, strict=True):
        if iou is not None:
            yield f"val/iou/{name}", iou


def _draw_loss(axes: Axes, steps: Sequence[Step]) -> None:
    axes.set_ylabel("loss")
    if not steps:
        _say(axes, "no step yet")
        return
    x, loss = [each.step for each in steps], np.array([each.loss for each in steps])
    median = _running_median(loss)
    axes.plot(x, loss, color=_PALE, linewidth=0.8, label="as logged")
    axes.plot(
        x,
        median,
        color=_BLUE,
        linewidth=1.8,
        label="running median",
        marker="o" if len(x) == 1 else "",
    )
    # a few outliers, mostly the first steps, would press all else flat
    top = max(float(np.quantile(loss, 0.99)), float(median.max()))
    if top > 0:
        axes.set_ylim(0, 1.08 * top)
    # above the axes, where no curve is
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)


def _draw_rate(axes: Axes, steps: Sequence[Step]) -> None:
    axes.set_ylabel("learning rate")
    if not steps:
        _say(axes, "no step yet")
        return
    axes.plot(
        [each.step for each in steps],
        [each.lr for each in steps],
        color=_GRAY,
        marker="o" if len(steps) == 1 else "",
    )
    axes.set_ylim(0, 1.08 * max(each.lr for each in steps) or 1.0)


def _draw_scores(axes: Axes, history: History) -> None:
    axes.set_ylabel("val mIoU")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    best = history.best
    if best is None:
        _say(axes, "no evaluation yet")
        return
    x, y = [each.step for each in history.scores], [each.miou for each in history.scores]
    axes.plot(x, y, color=_GREEN, marker="o", markersize=3.5)
    axes.plot(best.step, best.miou, color=_ORANGE, marker="*", markersize=14, linestyle="none")
    low, high = min(y), max(y)
    room = 0.15 * max(high - low, 0.1)
    axes.set_ylim(max(0.0, low - room), high + room)
    said = f"best: {best.miou:.2%} at step {best.step:,}".replace("%", " %")
    axes.set_title(said, color=_ORANGE, fontsize=11, loc="right")


def _draw_legend(figure: Figure, classes: Classes, seen: Sequence[int]) -> None:
    patches = [
        Patch(
            facecolor="#{:02x}{:02x}{:02x}".format(*classes.palette[i]),
            edgecolor="#404040",
            label=classes.names[i],
        )
        for i in seen
    ]
    if patches:
        figure.legend(
            handles=patches, loc="outside lower center", ncols=_LEGEND_COLUMNS, frameon=False
        )


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=_GRAY)


def _running_median(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The median of each value and its neighbours, a twenty-fifth of all; fewer at the ends."""
    reach = max(1, len(values) // 50)
    return np.array(
        [np.median(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]
    )


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # without the library's version: the bytes are the picture's alone
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
