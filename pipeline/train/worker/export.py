"""The results of a run: the network for `jobs/segment.py`, and its plots.

All of them are pure functions of the training state, so exporting again changes nothing.
"""

from __future__ import annotations

import numpy as np

from pipeline.data import samples, storage
from pipeline.data.datasets import Split
from pipeline.data.samples import Read
from pipeline.model import predict, weights
from pipeline.model.deeplab import DeepLabV3
from pipeline.train.worker import checkpoints, plots
from pipeline.train.worker.history import History
from pipeline.train.worker.state import TrainingState

SAMPLES = 4
"""Number of val images plotted with label and prediction."""


def export_run(out: str, state: TrainingState, val: Split, read: Read) -> None:
    """Write the network after the last step, and all plots, below `out`."""
    model = state.best_model
    storage.write(storage.join(out, checkpoints.MODEL), weights.to_bytes(model.eval(), val.classes))
    write_history(out, state.history, val.classes.names)
    storage.write(storage.join(out, checkpoints.SAMPLES), _plot_samples(model, val, read))


def write_history(out: str, history: History, class_names: tuple[str, ...]) -> None:
    """Write the curves and the TensorBoard file of the run so far."""
    storage.write(storage.join(out, checkpoints.CURVES), plots.plot_curves(history))
    storage.write(storage.join(out, checkpoints.EVENTS), plots.event_file(history, class_names))


def _plot_samples(model: DeepLabV3, val: Split, read: Read) -> bytes:
    """Return a PNG of images spread evenly over val, with their labels and predictions."""
    count = min(SAMPLES, len(val.pairs))
    rows = []
    for index in np.linspace(0, len(val.pairs) - 1, count).round().astype(int).tolist():
        image, label = samples.load(val.pairs[index], val, read)
        masks, _ = predict.segment(model, image[np.newaxis])
        name = val.pairs[index].image.rpartition("/")[2]
        rows.append((image, label, masks[0].numpy(), name))
    return plots.plot_samples(rows, val.classes)
