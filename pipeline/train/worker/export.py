"""What a finished run leaves for people and for `jobs/segment.py`: network, curves, samples.

Everything is a pure function of the run's state, so that doing it again changes nothing.
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
"""Photos of val that are drawn with label and prediction."""


def export_run(out: str, state: TrainingState, val: Split, read: Read) -> None:
    """Writes the network after the last step, and the pictures, below `out`."""
    model = state.best_model
    storage.write(storage.join(out, checkpoints.MODEL), weights.to_bytes(model.eval(), val.classes))
    write_history(out, state.history, val.classes.names)
    storage.write(storage.join(out, checkpoints.SAMPLES), _samples(model, val, read))


def write_history(out: str, history: History, names: tuple[str, ...]) -> None:
    """Draws the curves, and writes TensorBoard's file, as far as the run is."""
    storage.write(storage.join(out, checkpoints.CURVES), plots.curves(history))
    storage.write(storage.join(out, checkpoints.EVENTS), plots.event_file(history, names))


def _samples(model: DeepLabV3, val: Split, read: Read) -> bytes:
    """Photos from all over val, with their labels and what the network makes of them, as PNG."""
    count = min(SAMPLES, len(val.pairs))
    rows = []
    for index in np.linspace(0, len(val.pairs) - 1, count).round().astype(int).tolist():
        image, label = samples.load(val.pairs[index], val, read)
        masks, _ = predict.segment(model, image[np.newaxis])
        name = val.pairs[index].image.rpartition("/")[2]
        rows.append((image, label, masks[0].numpy(), name))
    return plots.samples(rows, val.classes)
