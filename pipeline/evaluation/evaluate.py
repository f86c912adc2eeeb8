"""Evaluation of a network on images with labels: confusion counts that add up exactly.

The sum over any partition of a split is the count of the split, however the images are distributed
over workers. Each image is segmented in its own size by `predict.segment`, as in a bulk run, so
that both give the same IoU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

import numpy as np

from pipeline import metrics
from pipeline.data import samples
from pipeline.data.datasets import Split
from pipeline.data.images import Pixels
from pipeline.data.prefetch import prefetch
from pipeline.data.samples import Read
from pipeline.evaluation.score import Score
from pipeline.metrics import ClassCounts, Int64Array
from pipeline.model import predict
from pipeline.model.deeplab import DeepLabV3

OnImage = Callable[[int, Int64Array], None]
"""Called with the index and the confusion (k, k) of an image."""

_AHEAD = 8  # images fetched or decoded while one is in the network


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """A confusion matrix over `images` images: (k, k) int64, label in rows, mask in columns.

    Evaluations add: the sum over the parts of a split is the evaluation of the split.
    """

    confusion: Int64Array
    images: int

    @classmethod
    def zeros(cls, num_classes: int) -> Evaluation:
        """Return the evaluation of no image: the start of a sum."""
        return cls(confusion=np.zeros((num_classes, num_classes), dtype=np.int64), images=0)

    def __add__(self, other: Evaluation) -> Evaluation:
        if self.confusion.shape != other.confusion.shape:
            mine, theirs = len(self.confusion), len(other.confusion)
            raise ValueError(f"cannot add evaluations of {mine} and {theirs} classes")
        confusion = self.confusion + other.confusion
        return Evaluation(confusion=confusion, images=self.images + other.images)

    @property
    def counts(self) -> ClassCounts:
        """True positives, false positives and false negatives of each class, in pixels."""
        return ClassCounts.from_confusion(self.confusion)

    @property
    def miou(self) -> float | None:
        """The mean over the classes that have an IoU; None if no pixel is labeled."""
        return self.counts.mean_iou()

    @property
    def pixel_accuracy(self) -> float | None:
        """The fraction of labeled pixels that is correct; None if no pixel is labeled."""
        return metrics.pixel_accuracy(self.confusion)

    def score(self, *, step: int, time: float) -> Score:
        """Return the entry for a history. Raises ValueError if no pixel is labeled."""
        miou, pixel_accuracy = self.miou, self.pixel_accuracy
        if miou is None or pixel_accuracy is None:
            raise ValueError(
                f"no pixel of the {self.images} images is labeled, so there is no score; check "
                "the split and the classes' ignore_index"
            )
        ious = self.counts.iou()
        return Score(step=step, time=time, miou=miou, pixel_accuracy=pixel_accuracy, ious=ious)


def worker_indices(n: int, rank: int, world: int) -> range:
    """Return the indices, out of 0 to n - 1, that worker `rank` of `world` evaluates.

    Each index belongs to one worker; a worker may have none. Raises ValueError if `rank` is not
    one of 0 to world - 1.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank}: must be at least 0 and less than world, {world}")
    return range(rank, n, world)


def evaluate(
    model: DeepLabV3,
    split: Split,
    *,
    read: Read,
    indices: Iterable[int] | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    output_stride: int | None = None,
    window: predict.SlidingWindow = predict.DEFAULT_WINDOW,
    on_image: OnImage | None = None,
) -> Evaluation:
    """Evaluate `model` on the images `indices` (all by default) of the split.

    `read` returns the bytes at a URI and is called from several threads. `output_stride` (the
    model's own by default) applies to this call only; the model is left as it was, including its
    training mode. `on_image` is called after each image, in order.

    Raises SampleError if an image or label cannot be read, since a score over fewer images would
    not be comparable; ValueError if model and split have different numbers of classes, or another
    argument is invalid.
    """
    num_classes = split.classes.num_classes
    if model.config.num_classes != num_classes:
        raise ValueError(
            f"the model has {model.config.num_classes} classes, but the split has {num_classes}; "
            "name the classes that the model was trained on"
        )
    chosen = range(len(split.pairs)) if indices is None else indices
    total = Evaluation.zeros(num_classes)
    with _eval_mode(model, output_stride), closing(_load_ahead(split, chosen, read)) as loaded:
        for index, image, label in loaded:
            masks, _ = predict.segment(
                model, image[np.newaxis], scales=scales, flip=flip, window=window
            )
            confusion = metrics.confusion_matrix(
                label,
                masks[0].numpy(),
                num_classes=num_classes,
                ignore_index=split.classes.ignore_index,
            )
            total += Evaluation(confusion=confusion, images=1)
            if on_image is not None:
                on_image(index, confusion)
    return total


@contextmanager
def _eval_mode(model: DeepLabV3, output_stride: int | None) -> Iterator[None]:
    """Switch the model to eval mode at `output_stride`, and restore it layer by layer.

    Restoring with train() would unfreeze batch normalization that is in eval mode within a model
    in training mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    before = model.config.output_stride
    if output_stride is not None:
        model.set_output_stride(output_stride)
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        if output_stride is not None:
            model.set_output_stride(before)


def _load_ahead(
    split: Split, indices: Iterable[int], read: Read
) -> Generator[tuple[int, Pixels, Pixels], None, None]:
    """Yield (index, image, label) in order, loaded while the one before is in use."""
    decoding = threading.Lock()  # a process decodes one image at a time: see `images.guard`

    def load(index: int) -> tuple[int, Pixels, Pixels]:
        pair = split.pairs[index]
        fetched = {uri: samples.fetch(uri, read) for uri in (pair.image, pair.label)}
        with decoding:
            return index, *samples.load(pair, split, fetched.__getitem__)

    return prefetch(indices, load, threads=_AHEAD, ahead=_AHEAD)
