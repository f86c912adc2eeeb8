"""Segment one shard of the plan into its results file: fetch, decode, infer, encode, create.

A plain class without Ray: it can be called in a loop, and by two threads at once, so that the
images of one shard are fetched and decoded while those of another are in the network. A problem
with an image becomes its error row; images that storage refuses are fetched again at the end of
the shard; a systemic fault raises `SystemicError`, and the shard is not committed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.bulk.planning.listing import ImageRef
from pipeline.bulk.settings import Inference
from pipeline.bulk.worker.decode import DecodeLimits, DecoderPool
from pipeline.bulk.worker.failure_streaks import FailureStreak, LocationMonitor, SystemicError
from pipeline.bulk.worker.inference import InferenceModel
from pipeline.bulk.worker.load import AHEAD_BYTES, DecodedImage, Loader
from pipeline.bulk.worker.rows import RowBuilder
from pipeline.bulk.worker.storage_probe import StorageProbe
from pipeline.bulk.worker.summary import ShardSummary
from pipeline.data import storage
from pipeline.model import weights
from pipeline.model.weights import checkpoint_fingerprint
from pipeline.results import tables
from pipeline.results.layout import RunLayout


@dataclass(frozen=True, kw_only=True)
class WorkerContext:
    """What all shards of a run share; small, since it is sent to every actor."""

    layout: RunLayout
    images: str  # URI prefix of the images
    labels: str | None = None  # URI prefix of the labels
    checkpoint: str
    model: str  # expected fingerprint of the checkpoint
    settings: str  # fingerprint of `inference`
    inference: Inference
    batch_images: int
    cpus: int
    gpu: bool


class Segmenter:
    """A segmenter of shards: one model, its decoder processes and its threads."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        data = weights.read(context.checkpoint)
        if checkpoint_fingerprint(data) != context.model:
            raise SystemicError(f"{context.checkpoint} was replaced after the run was planned")
        torch.set_num_threads(context.cpus)
        model, self.classes = weights.load(context.checkpoint, data=data)
        # the decoder processes start before CUDA is initialized
        limits = DecodeLimits(max_pixels=context.inference.max_pixels)
        self.decoders = DecoderPool(context.cpus, limits, self.classes)
        self._loader = Loader(
            self.decoders, context.cpus, max_object_bytes=context.inference.max_object_bytes
        )
        self._network = InferenceModel(model, context.inference, gpu=context.gpu)
        self._images = LocationMonitor(
            "image", StorageProbe(context.images, context.layout.results)
        )
        self._labels = LocationMonitor(
            "label", StorageProbe(context.labels or context.images, context.layout.results)
        )
        self._rows = RowBuilder(
            run_id=context.layout.run_id,
            model=context.model,
            settings=context.settings,
            classes=self.classes,
        )
        self._schema = tables.with_footer(tables.IMAGES, self.classes)
        self._network_streak = FailureStreak()
        self._turn = threading.Lock()

    def close(self) -> None:
        """End the decoder processes and the threads."""
        self._loader.close()
        self.decoders.close()

    def segment(
        self, shard: int, images: Sequence[ImageRef], report: Callable[[int], None] | None = None
    ) -> ShardSummary:
        """Segment the shard and create its file; a file that exists already is kept.

        `report` is called with the number of finished images as the shard proceeds.
        Raises SystemicError, and StorageError if the results cannot be written.
        """
        data, summary = self.rows_of(shard, images, report)
        summary.committed = storage.create(self._context.layout.shard(shard), data)
        return summary

    def rows_of(
        self, shard: int, images: Sequence[ImageRef], report: Callable[[int], None] | None = None
    ) -> tuple[bytes, ShardSummary]:
        """Return the bytes of the shard's file, without writing it, and the shard's summary."""
        summary = ShardSummary(shard=shard, images=len(images))
        rows: dict[str, dict[str, Any]] = {}
        refused: list[ImageRef] = []
        delivered = self._delivered(self._loader.stream(images), summary, refused)
        self._segment_stream(shard, delivered, summary, rows, report)
        if refused:
            self._segment_stream(shard, self._loader.stream(refused), summary, rows, report)
        ordered = [rows[ref.uri] for ref in images]
        self._check_vanished(ordered)
        summary.errors.update(row["error_kind"] for row in ordered if row["status"] == "error")
        summary.label_errors = sum(row.get("label_error") is not None for row in ordered)
        return tables.rows_to_parquet(ordered, self._schema), summary

    def _segment_stream(
        self,
        shard: int,
        stream: Iterator[DecodedImage],
        summary: ShardSummary,
        rows: dict[str, dict[str, Any]],
        report: Callable[[int], None] | None,
    ) -> None:
        """Add the rows of the images to `rows`, by URI."""
        # the network processes one shard at a time, so that each is committed early
        with self._turn:
            for batch in self._batches(_timed(stream, summary), summary):
                of_batch = self._rows_of_batch(shard, batch, summary)
                for loaded, row in zip(batch, of_batch, strict=True):
                    rows[loaded.listed.uri] = row
                if report is not None:
                    report(len(rows))

    def _check_vanished(self, rows: Sequence[dict[str, Any]]) -> None:
        """Raise CutOffError if the whole shard has disappeared together with all other images."""
        gone = [row["uri"] for row in rows if row.get("error_kind") == "vanished"]
        if gone and len(gone) == len(rows):
            self._images.check_vanished(gone)

    def _delivered(
        self, stream: Iterator[DecodedImage], summary: ShardSummary, refused: list[ImageRef]
    ) -> Iterator[DecodedImage]:
        """Yield the stream without images that storage refused for now, or whose label it refused.

        Those are added to `refused`. Raises SystemicError after too many consecutive failures,
        and CutOffError at the end if storage refuses everything.
        """
        images, labels = set(), set()
        for loaded in stream:
            self._count(loaded)
            if not (loaded.refused or loaded.label_refused):
                yield loaded
                continue
            refused.append(loaded.listed)
            summary.bytes_read += loaded.fetched_bytes
            if loaded.refused:
                images.add(loaded.listed.uri)
            else:
                labels.add(loaded.listed.label_uri or "")
        for monitor, uris in ((self._images, images), (self._labels, labels)):
            if uris:
                monitor.check_refused(uris)

    def _count(self, loaded: DecodedImage) -> None:
        """Count the image and its label. Raises SystemicError after too many failures."""
        ref = loaded.listed
        self._images.count(ref.uri, loaded.error_kind, loaded.error)
        if loaded.fetched_bytes:
            self._images.probe.remember(storage.Object(ref.uri, ref.etag, ref.bytes))
        if ref.label_uri is None or loaded.image is None:
            return
        self._labels.count(ref.label_uri, loaded.label_error_kind, loaded.label_error)
        if loaded.label is not None:
            size = ref.label_bytes or 0
            label = storage.Object(ref.label_uri, ref.label_etag or "", size)
            self._labels.probe.remember(label)

    def _batches(
        self, stream: Iterator[DecodedImage], summary: ShardSummary
    ) -> Iterator[list[DecodedImage]]:
        """Group images of one size, failed ones alone; depends only on the order of the plan."""
        by_size: dict[tuple[int, ...], list[DecodedImage]] = {}
        held = 0
        for loaded in stream:
            summary.bytes_read += loaded.fetched_bytes
            if loaded.image is None:
                yield [loaded]
                continue
            same_size = by_size.setdefault(loaded.image.shape, [])
            same_size.append(loaded)
            held += loaded.image.nbytes
            if len(same_size) < self._context.batch_images:
                if held <= AHEAD_BYTES:
                    continue
                same_size = max(by_size.values(), key=_held)
            held -= _held(same_size)
            yield by_size.pop(_shape(same_size))
        yield from by_size.values()

    def _rows_of_batch(
        self, shard: int, batch: list[DecodedImage], summary: ShardSummary
    ) -> Iterator[dict[str, Any]]:
        images = [loaded.image for loaded in batch if loaded.image is not None]
        if not images:
            for loaded in batch:
                assert loaded.error_kind is not None
                yield self._rows.error(shard, loaded.listed, loaded.error_kind, loaded.error or "")
            return
        started = time.perf_counter()
        results = self._network.segment(images)
        summary.infer_s += time.perf_counter() - started
        for loaded, result in zip(batch, results, strict=True):
            if result is None:
                message = "the network does not fit into memory with this image"
                if self._network_streak.count(loaded.listed.uri, "out_of_memory"):
                    raise SystemicError(
                        f"{len(self._network_streak)} images in a row failed (out_of_memory): "
                        f"{message}"
                    )
                yield self._rows.error(shard, loaded.listed, "out_of_memory", message)
            else:
                self._network_streak.count(loaded.listed.uri, None)
                yield self._rows.ok(shard, loaded, *result)


def _timed(stream: Iterator[DecodedImage], summary: ShardSummary) -> Iterator[DecodedImage]:
    """Yield the stream, and add the time that the consumer waited to the summary."""
    while True:
        started = time.perf_counter()
        loaded = next(stream, None)
        summary.wait_s += time.perf_counter() - started
        if loaded is None:
            return
        yield loaded


def _shape(same_size: list[DecodedImage]) -> tuple[int, ...]:
    assert same_size[0].image is not None
    return same_size[0].image.shape


def _held(same_size: list[DecodedImage]) -> int:
    return sum(loaded.image.nbytes for loaded in same_size if loaded.image is not None)
