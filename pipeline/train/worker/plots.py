"""Plots of a training run (curves, sample predictions) and its TensorBoard event file.

The output depends only on the input, so a resumed run writes the same bytes. Figures are drawn
without a display and without matplotlib's global state, so any thread may draw them.
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

# has no type hints
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

from pipeline.data import masks
from pipeline.data.images import Pixels
from pipeline.data.labels import Classes
from pipeline.evaluation.score import Score
from pipeline.train.worker.history import History, Step

Sample = tuple[Pixels, Pixels, Pixels, str]
"""Image (h, w, 3), label and prediction (h, w), all uint8, and a title."""

_BLUE, _ORANGE, _GREEN, _GRAY = "#1f5fa8", "#c8590a", "#2a7f3f", "#5f6670"
_PALE = "#a9c3e2"
_COLUMN_INCHES = 4.0
_MAX_ROW_INCHES = 4.0  # portrait images are drawn smaller
_OVERLAY_ALPHA = 0.6  # enough of the palette's color to recognize it from the legend
_LEGEND_COLUMNS = 6
_DPI = 110


def plot_curves(history: History) -> bytes:
    """Return a PNG of loss, learning rate and val mIoU by step; the history may be empty."""
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


def plot_samples(rows: Sequence[Sample], classes: Classes) -> bytes:
    """Return a PNG with a row per sample: the image, then overlays of label and prediction.

    The legend has the classes that appear. Raises ValueError if `rows` is empty, and as
    `masks.overlay` does.
    """
    if not rows:
        raise ValueError("rows is empty; give at least one (image, label, mask, title)")
    heights = [
        min(_MAX_ROW_INCHES, _COLUMN_INCHES * image.shape[0] / image.shape[1]) + 0.3
        for image, _, _, _ in rows
    ]
    ids = set().union(*(np.unique(pixels).tolist() for row in rows for pixels in row[1:3]))
    class_ids = sorted(ids - {classes.ignore_index})
    legend_inches = 0.3 + 0.24 * -(-len(class_ids) // _LEGEND_COLUMNS)
    figure = _figure(3 * _COLUMN_INCHES, sum(heights) + legend_inches)
    grid = figure.subplots(len(rows), 3, squeeze=False, height_ratios=heights)
    for axes, (image, label, mask, title) in zip(grid, rows, strict=True):
        overlays = [
            masks.overlay(image, pixels, classes, alpha=_OVERLAY_ALPHA) for pixels in (label, mask)
        ]
        titles = (title, "label", "prediction")
        for cell, panel, text in zip(axes, (image, *overlays), titles, strict=True):
            cell.imshow(panel, interpolation="antialiased")
            cell.set_title(text, fontsize=10)
            cell.set_axis_off()
    _draw_legend(figure, classes, class_ids)
    return _png(figure)


def event_file(history: History, class_names: Sequence[str]) -> bytes:
    """Return the history as a TensorBoard event file, with the times of the history.

    Tags: train/loss, train/lr, train/images_per_second, train/wait_share, val/miou,
    val/pixel_accuracy, val/iou/NAME. An absent class has no value. TensorBoard reads it only if
    its name contains "tfevents". Raises ValueError if a score has another number of classes.
    """
    entries: list[Step | Score] = [*history.steps, *history.scores]
    entries.sort(key=lambda entry: entry.step)
    first = min((entry.time for entry in entries), default=0.0)
    with tempfile.TemporaryDirectory(prefix="events-") as folder:
        path = os.path.join(folder, "events")
        writer = RecordWriter(path)
        try:
            header = Event(wall_time=first, file_version="brain.Event:2")
            writer.write(header.SerializeToString())
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
            f"class_names has {len(class_names)} names, but the score at step {entry.step} has "
            f"{len(entry.ious)} classes; pass the names of the classes that were scored"
        )
    yield "val/miou", entry.miou
    yield "val/pixel_accuracy", entry.pixel_accuracy
    for name, iou in zip(class_names, entry.ious, strict=True):
        if iou is not None:
            yield f"val/iou/{name}", iou


def _draw_loss(axes: Axes, steps: Sequence[Step]) -> None:
    axes.set_ylabel("loss")
    if not steps:
        _write_centered(axes, "no steps yet")
        return
    x, loss = [row.step for row in steps], np.array([row.loss for row in steps])
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
    # a few outliers, mostly the first steps, would flatten the rest of the curve
    top = max(float(np.quantile(loss, 0.99)), float(median.max()))
    if top > 0:
        axes.set_ylim(0, 1.08 * top)
    # above the axes, clear of the curve
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)


def _draw_rate(axes: Axes, steps: Sequence[Step]) -> None:
    axes.set_ylabel("learning rate")
    if not steps:
        _write_centered(axes, "no steps yet")
        return
    axes.plot(
        [row.step for row in steps],
        [row.lr for row in steps],
        color=_GRAY,
        marker="o" if len(steps) == 1 else "",
    )
    axes.set_ylim(0, 1.08 * max(row.lr for row in steps) or 1.0)


def _draw_scores(axes: Axes, history: History) -> None:
    axes.set_ylabel("val mIoU")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    best = history.best
    if best is None:
        _write_centered(axes, "no evaluations yet")
        return
    x, y = [score.step for score in history.scores], [score.miou for score in history.scores]
    axes.plot(x, y, color=_GREEN, marker="o", markersize=3.5)
    axes.plot(best.step, best.miou, color=_ORANGE, marker="*", markersize=14, linestyle="none")
    low, high = min(y), max(y)
    room = 0.15 * max(high - low, 0.1)
    axes.set_ylim(max(0.0, low - room), high + room)
    title = f"best: {best.miou:.2%} at step {best.step:,}".replace("%", " %")
    axes.set_title(title, color=_ORANGE, fontsize=11, loc="right")


def _draw_legend(figure: Figure, classes: Classes, class_ids: Sequence[int]) -> None:
    patches = [
        Patch(
            facecolor="#{:02x}{:02x}{:02x}".format(*classes.palette[i]),
            edgecolor="#404040",
            label=classes.names[i],
        )
        for i in class_ids
    ]
    if patches:
        figure.legend(
            handles=patches, loc="outside lower center", ncols=_LEGEND_COLUMNS, frameon=False
        )


def _write_centered(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=_GRAY)


def _running_median(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the median over a window of 4 % of all values around each; narrower at the ends."""
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
    # without the version of matplotlib, so that the bytes depend on the figure alone
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
