"""One shard of the plan becomes its file: fetch, decode, infer, encode, create.

A plain class without Ray: it can be called in a loop, and two threads may call it at once, so
that one shard's photos are fetched and decoded while the other's are in the network. Whatever is
wrong with a photo becomes its row; photos that storage refuses are asked for again at the shard's
end; what is wrong with everything is a `SystemicError`, and the shard is not committed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.bulk.planning.listing import Listed
from pipeline.bulk.settings import Inference
from pipeline.bulk.worker.decode import Decoders, Limits
from pipeline.bulk.worker.failure_streaks import Source, Streak, SystemicError
from pipeline.bulk.worker.inference import Network
from pipeline.bulk.worker.load import AHEAD_BYTES, Loaded, Loader
from pipeline.bulk.worker.rows import RowMaker
from pipeline.bulk.worker.storage_probe import Witness
from pipeline.bulk.worker.summary import Summary
from pipeline.data import storage
from pipeline.model import weights
from pipeline.model.weights import checkpoint_fingerprint
from pipeline.results import tables
from pipeline.results.layout import RunLayout


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every shard of a run shares; small, so that it travels to actors as it is."""

    layout: RunLayout
    images: str  # where the photos lie
    labels: str | None = None  # where their labels do
    checkpoint: str
    model: str  # fingerprint that the checkpoint must have
    settings: str  # fingerprint of `inference`
    inference: Inference
    batch_images: int
    cpus: int
    gpu: bool


class Segmenter:
    """Segments shards with one model, its decoder processes and its threads."""

    def __init__(self, work: Work) -> None:
        self._work = work
        data = weights.read(work.checkpoint)
        if checkpoint_fingerprint(data) != work.model:
            raise SystemicError(f"{work.checkpoint} was replaced after the run was planned")
        torch.set_num_threads(work.cpus)
        model, self.classes = weights.load(work.checkpoint, data=data)
        # the children start before CUDA does
        limits = Limits(max_pixels=work.inference.max_pixels)
        self.decoders = Decoders(work.cpus, limits, self.classes)
        self._loader = Loader(
            self.decoders, work.cpus, max_object_bytes=work.inference.max_object_bytes
        )
        self._network = Network(model, work.inference, gpu=work.gpu)
        self._photos = Source("photo", Witness(work.images, work.layout.results))
        self._labels = Source("label", Witness(work.labels or work.images, work.layout.results))
        self._rows = RowMaker(
            run_id=work.layout.run_id,
            model=work.model,
            settings=work.settings,
            classes=self.classes,
        )
        self._schema = tables.with_footer(tables.IMAGES, self.classes)
        self._network_streak = Streak()
        self._turn = threading.Lock()

    def close(self) -> None:
        """Ends the decoder processes and the threads."""
        self._loader.close()
        self.decoders.close()

    def segment(
        self, shard: int, photos: Sequence[Listed], tell: Callable[[int], None] | None = None
    ) -> Summary:
        """Segments the shard and creates its file; a file that is there already stays.

        `tell` hears how many photos are through, as it goes.
        Raises SystemicError, and StorageError where the results cannot be written.
        """
        data, summary = self.rows_of(shard, photos, tell)
        summary.committed = storage.create(self._work.layout.shard(shard), data)
        return summary

    def rows_of(
        self, shard: int, photos: Sequence[Listed], tell: Callable[[int], None] | None = None
    ) -> tuple[bytes, Summary]:
        """The bytes of the shard's file, not written anywhere, and their summary."""
        summary = Summary(shard=shard, images=len(photos))
        rows: dict[str, dict[str, Any]] = {}
        refused: list[Listed] = []
        given = self._given(self._loader.stream(photos), summary, refused)
        self._look(shard, given, summary, rows, tell)
        if refused:
            self._look(shard, self._loader.stream(refused), summary, rows, tell)
        ordered = [rows[photo.uri] for photo in photos]
        self._check_vanished(ordered)
        summary.errors.update(row["error_kind"] for row in ordered if row["status"] == "error")
        summary.label_errors = sum(row.get("label_error") is not None for row in ordered)
        return tables.rows_to_parquet(ordered, self._schema), summary

    def _look(
        self,
        shard: int,
        stream: Iterator[Loaded],
        summary: Summary,
        rows: dict[str, dict[str, Any]],
        tell: Callable[[int], None] | None,
    ) -> None:
        """Adds the photos' rows to `rows`, by URI."""
        # one shard at a time is in the network, so that it is soon done and committed
        with self._turn:
            for batch in self._batches(_timed(stream, summary), summary):
                of_batch = self._rows_of_batch(shard, batch, summary)
                for loaded, row in zip(batch, of_batch, strict=True):
                    rows[loaded.listed.uri] = row
                if tell is not None:
                    tell(len(rows))

    def _check_vanished(self, rows: Sequence[dict[str, Any]]) -> None:
        """Raises CutOffError where a whole shard is gone with all other photos."""
        gone = [row["uri"] for row in rows if row.get("error_kind") == "vanished"]
        if gone and len(gone) == len(rows):
            self._photos.check_vanished(gone)

    def _given(
        self, stream: Iterator[Loaded], summary: Summary, refused: list[Listed]
    ) -> Iterator[Loaded]:
        """The stream without what storage refused for now, itself or its label: added to `refused`.

        Raises SystemicError after too many failures in a row, and CutOffError at the end where
        storage refuses everything.
        """
        photos, labels = set(), set()
        for loaded in stream:
            self._count(loaded)
            if not (loaded.refused or loaded.label_refused):
                yield loaded
                continue
            refused.append(loaded.listed)
            summary.bytes_read += loaded.fetched_bytes
            if loaded.refused:
                photos.add(loaded.listed.uri)
            else:
                labels.add(loaded.listed.label_uri or "")
        for source, uris in ((self._photos, photos), (self._labels, labels)):
            if uris:
                source.check_refused(uris)

    def _count(self, loaded: Loaded) -> None:
        """Tells those who watch photos and labels. Raises SystemicError after too many failures."""
        photo = loaded.listed
        self._photos.count(photo.uri, loaded.error_kind, loaded.error)
        if loaded.fetched_bytes:
            self._photos.witness.saw(storage.Object(photo.uri, photo.etag, photo.bytes))
        if photo.label_uri is None or loaded.image is None:
            return
        self._labels.count(photo.label_uri, loaded.label_error_kind, loaded.label_error)
        if loaded.label is not None:
            size = photo.label_bytes or 0
            label = storage.Object(photo.label_uri, photo.label_etag or "", size)
            self._labels.witness.saw(label)

    def _batches(self, stream: Iterator[Loaded], summary: Summary) -> Iterator[list[Loaded]]:
        """Photos of one size together, failed ones alone; a function of the plan's order only."""
        by_size: dict[tuple[int, ...], list[Loaded]] = {}
        held = 0
        for loaded in stream:
            summary.bytes_read += loaded.fetched_bytes
            if loaded.image is None:
                yield [loaded]
                continue
            same_size = by_size.setdefault(loaded.image.shape, [])
            same_size.append(loaded)
            held += loaded.image.nbytes
            if len(same_size) < self._work.batch_images:
                if held <= AHEAD_BYTES:
                    continue
                same_size = max(by_size.values(), key=_held)
            held -= _held(same_size)
            yield by_size.pop(_shape(same_size))
        yield from by_size.values()

    def _rows_of_batch(
        self, shard: int, batch: list[Loaded], summary: Summary
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
                message = "the network does not fit into memory with this photo"
                if self._network_streak.count(loaded.listed.uri, "out_of_memory"):
                    raise SystemicError(
                        f"{len(self._network_streak)} photos in a row failed (out_of_memory): "
                        f"{message}"
                    )
                yield self._rows.error(shard, loaded.listed, "out_of_memory", message)
            else:
                self._network_streak.count(loaded.listed.uri, None)
                yield self._rows.ok(shard, loaded, *result)


def _timed(stream: Iterator[Loaded], summary: Summary) -> Iterator[Loaded]:
    """The stream, with the time that its consumer waited added to the summary."""
    while True:
        started = time.perf_counter()
        loaded = next(stream, None)
        summary.wait_s += time.perf_counter() - started
        if loaded is None:
            return
        yield loaded


def _shape(same_size: list[Loaded]) -> tuple[int, ...]:
    assert same_size[0].image is not None
    return same_size[0].image.shape


def _held(same_size: list[Loaded]) -> int:
    return sum(loaded.image.nbytes for loaded in same_size if loaded.image is not None)
