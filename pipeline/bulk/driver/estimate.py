"""What a run will take, from a few of its photos through the plain segmenter on this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import torch

from pipeline.bulk.driver.actor_pool import Pool, images_of
from pipeline.bulk.planning import plan
from pipeline.bulk.planning.listing import Listed
from pipeline.bulk.planning.plan import Plan
from pipeline.bulk.worker.segmenter import Segmenter, WorkerContext

ENOUGH_S = 60.0
"""Seconds of measuring after which no further photos are begun."""

_CHUNK = 8  # photos a call of the segmenter, which overlaps their loading with the network
_PARTS = 4  # of a written plan that are read for a sample


class StratifiedSample:
    """Up to `count` photos of a stream of any length, spread evenly over it."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._kept: list[Listed] = []
        self._seen, self._step = 0, 1

    def through(self, photos: Iterator[Listed]) -> Iterator[Listed]:
        """The stream as it is, looked at on its way."""
        for photo in photos:
            if self._seen % self._step == 0:
                self._kept.append(photo)
                if len(self._kept) >= 2 * self._count:
                    self._kept, self._step = self._kept[::2], 2 * self._step
            self._seen += 1
            yield photo

    def photos(self) -> list[Listed]:
        count = min(self._count, len(self._kept))
        return [self._kept[i * len(self._kept) // count] for i in range(count)]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What `images` more photos take on `pool.max_actors` actors, by what some took here."""

    images: int
    pool: Pool
    sampled: int  # photos
    sampled_s: float
    errors: int  # of those photos
    bytes_written: int  # of masks and rows
    device: str
    load: float  # processes that wanted a CPU, at the end

    @property
    def seconds_an_image(self) -> float:
        return self.sampled_s / self.sampled

    @property
    def actor_hours(self) -> float:
        return self.images * self.seconds_an_image / 3600

    @property
    def seconds(self) -> float:
        return 3600 * self.actor_hours / self.pool.max_actors

    @property
    def cpu_hours(self) -> float:
        return self.actor_hours * self.pool.cpus

    @property
    def gpu_hours(self) -> float:
        return self.actor_hours * self.pool.gpus


def sample_plan(work: WorkerContext, known: Plan, count: int) -> list[Listed]:
    """Photos spread over a plan that is written."""
    spread = StratifiedSample(count)
    every = max(1, len(known.parts) // _PARTS)
    for part in known.parts[::every][:_PARTS]:
        shards = plan.read_part(work.layout, part)["images"]
        photos = (photo for shard in shards for photo in images_of(shard.as_py()))
        for _ in spread.through(photos):
            pass
    return spread.photos()


def measure(
    work: WorkerContext, pool: Pool, photos: list[Listed], *, images: int, shards: int
) -> Estimate:
    """Segments the photos, writing nothing, and says what `images` such in `shards` would take.

    Raises SystemicError or StorageError where they cannot be read, and ValueError without photos.
    """
    if not photos:
        raise ValueError("there are no photos to measure")
    with closing(Segmenter(work)) as segmenter:
        one, _ = segmenter.rows_of(0, photos[:1])  # it costs what only the first one does
        sampled = errors = files = written = 0
        started = time.monotonic()
        while sampled < len(photos) and (not sampled or time.monotonic() - started < ENOUGH_S):
            chunk = photos[sampled : sampled + _CHUNK]
            data, summary = segmenter.rows_of(0, chunk)
            sampled += len(chunk)
            errors += summary.errors.total()
            files += 1
            written += len(data)
        seconds = time.monotonic() - started
    return Estimate(
        images=images,
        pool=pool,
        sampled=sampled,
        sampled_s=seconds,
        errors=errors,
        bytes_written=_bytes(len(one), written, files, sampled, images=images, shards=shards),
        device=_device(work),
        load=os.getloadavg()[0],
    )


def _bytes(one: int, written: int, files: int, sampled: int, *, images: int, shards: int) -> int:
    """Bytes of `shards` files, by a file of one photo and the `files` of those sampled.

    A file has a few KB of its own, and more for each photo.
    """
    each = max(0.0, (written - files * one) / (sampled - files)) if sampled > files else 0.0
    return round(shards * max(0.0, one - each) + images * each)


def _device(work: WorkerContext) -> str:
    if work.gpu:
        return torch.cuda.get_device_name()
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return f"{work.cpus} of {os.cpu_count()} CPUs ({names[0] if names else 'unknown'})"
