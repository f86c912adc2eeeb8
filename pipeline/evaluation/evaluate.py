"""A network's score on photos with labels: confusion counts, exact however they are shared out.

Enters: a network, a split, and which of its photos to look at. Leaves: counts that add, so that
the sum over any shares is the count of the split. Each photo is looked at in its own size by
`predict.segment`, as a bulk run does, so that both give the same IoU. The network comes back as
it was, in training or not, whatever happens on the way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass

import numpy as np

from pipeline import metrics
from pipeline.data import samples
from pipeline.data.datasets import Split
from pipeline.data.images import Pixels
from pipeline.data.samples import Read
from pipeline.evaluation.score import Score
from pipeline.metrics import ClassCounts, Int64Array
from pipeline.model import predict
from pipeline.model.deeplab import DeepLabV3

OnImage = Callable[[int, Int64Array], None]

_PHOTOS_AHEAD = 4  # fetched or decoded while one is in the network
_FETCHERS = 8  # a photo and its label each


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """Pixels of class i (row) that the network called class j: (k, k) int64, over `images` photos.

    Evaluations add: the sum over shares is that of all photos.
    """

    confusion: Int64Array
    images: int

    @classmethod
    def zeros(cls, num_classes: int) -> Evaluation:
        """No photo yet: the start of a sum."""
        return cls(confusion=np.zeros((num_classes, num_classes), dtype=np.int64), images=0)

    def __add__(self, other: Evaluation) -> Evaluation:
        if self.confusion.shape != other.confusion.shape:
            mine, theirs = len(self.confusion), len(other.confusion)
            raise ValueError(f"evaluations of {mine} and {theirs} classes do not add")
        confusion = self.confusion + other.confusion
        return Evaluation(confusion=confusion, images=self.images + other.images)

    @property
    def counts(self) -> ClassCounts:
        """Pixels found, wrongly called and missed of each class."""
        return ClassCounts.from_confusion(self.confusion)

    @property
    def miou(self) -> float | None:
        """The mean over the classes that have an IoU; None where no pixel is labelled."""
        return self.counts.mean_iou()

    @property
    def pixel_accuracy(self) -> float | None:
        """The share of labelled pixels called right; None where no pixel is labelled."""
        return metrics.pixel_accuracy(self.confusion)

    def score(self, *, step: int, time: float) -> Score:
        """The entry of a history. Raises ValueError where no pixel is labelled."""
        miou, pixel_accuracy = self.miou, self.pixel_accuracy
        if miou is None or pixel_accuracy is None:
            raise ValueError(
                f"no pixel of the {self.images} photos is labelled, so there is no score; are the "
                "split and ignore_index the right ones?"
            )
        ious = self.counts.iou()
        return Score(step=step, time=time, miou=miou, pixel_accuracy=pixel_accuracy, ious=ious)


def worker_indices(n: int, rank: int, world: int) -> range:
    """The photos of 0 to n - 1 that worker `rank` of `world` looks at: every one is in one share.

    A share may be empty. Raises ValueError where there is no such worker.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank is {rank}; it must be at least 0 and under world, {world}")
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
    window: predict.Window = predict.DEFAULT_WINDOW,
    on_image: OnImage | None = None,
) -> Evaluation:
    """What the network makes of the photos `indices` (all by default) of the split.

    `read` gives the bytes at a URI, from several threads at once. `output_stride` holds for this
    call; the model's own by default. `tell` hears each photo's index and confusion (k, k), in
    order. Raises SampleError on a photo or label that cannot be read, since a score over fewer
    photos is no score; StorageError as `read` does; ValueError where model and split have other
    numbers of classes, or an argument does not fit.
    """
    num_classes = split.classes.num_classes
    if model.config.num_classes != num_classes:
        raise ValueError(
            f"the model has {model.config.num_classes} classes, but the split has {num_classes}; "
            "name the classes that the model was trained on"
        )
    chosen = range(len(split.pairs)) if indices is None else indices
    total = Evaluation.zeros(num_classes)
    loaded = _ahead(split, list(chosen), read)
    with _looking(model, output_stride), closing(loaded):
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
def _looking(model: DeepLabV3, output_stride: int | None) -> Iterator[None]:
    """The model in eval mode, at `output_stride`; as it was afterwards, layer by layer.

    Frozen batch normalisation is in eval mode within a model that is not: train() would lose it.
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


def _ahead(
    split: Split, indices: Sequence[int], read: Read
) -> Generator[tuple[int, Pixels, Pixels], None, None]:
    """(index, image, label) in order, made while the one before is in use.

    Objects are fetched by many threads and decoded by one: see `images.guard`. No thread is left
    when it is closed.
    """
    fetchers = ThreadPoolExecutor(_FETCHERS, "fetch")
    decoder = ThreadPoolExecutor(1, "decode")
    waiting: deque[tuple[int, Future[tuple[Pixels, Pixels]]]] = deque()

    def start(index: int) -> None:
        pair = split.pairs[index]
        fetched = {uri: fetchers.submit(read, uri) for uri in (pair.image, pair.label)}
        loading = decoder.submit(samples.load, pair, split, lambda uri: fetched[uri].result())
        waiting.append((index, loading))

    try:
        for index in indices:
            start(index)
            if len(waiting) > _PHOTOS_AHEAD:
                first, loading = waiting.popleft()
                yield first, *loading.result()
        while waiting:
            first, loading = waiting.popleft()
            yield first, *loading.result()
    finally:
        decoder.shutdown(cancel_futures=True)
        fetchers.shutdown(cancel_futures=True)
