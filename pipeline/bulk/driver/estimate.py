"""Estimate the time and size of a run by segmenting a few of its images on this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import torch

from pipeline.bulk.driver.actor_pool import Pool
from pipeline.bulk.planning import plan
from pipeline.bulk.planning.listing import ImageRef
from pipeline.bulk.planning.plan import Plan
from pipeline.bulk.worker.segmenter import Segmenter, WorkerContext
from pipeline.bulk.worker.shard_worker import images_of

MEASURE_S = 60.0
"""Seconds of measuring after which no further images are started."""

_CHUNK = 8  # images per call of the segmenter, which overlaps loading with inference
_PARTS = 4  # of a written plan that are read for a sample


class StratifiedSample:
    """Up to `count` images of a stream of unknown length, evenly spaced over it."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._kept: list[ImageRef] = []
        self._seen, self._step = 0, 1

    def observe(self, images: Iterator[ImageRef]) -> Iterator[ImageRef]:
        """Yield the images unchanged, sampling them as they pass."""
        for image in images:
            if self._seen % self._step == 0:
                self._kept.append(image)
                if len(self._kept) >= 2 * self._count:
                    self._kept, self._step = self._kept[::2], 2 * self._step
            self._seen += 1
            yield image

    def images(self) -> list[ImageRef]:
        """Return the sample of the images observed so far."""
        count = min(self._count, len(self._kept))
        return [self._kept[i * len(self._kept) // count] for i in range(count)]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The cost of `images` more images on `pool.max_actors` actors, from a measured sample."""

    images: int
    pool: Pool
    sampled: int  # images
    sampled_s: float
    errors: int  # of the sampled images
    bytes_written: int  # of masks and rows
    device: str
    load: float  # processes that wanted a CPU when the measurement ended

    @property
    def seconds_per_image(self) -> float:
        return self.sampled_s / self.sampled

    @property
    def actor_hours(self) -> float:
        return self.images * self.seconds_per_image / 3600

    @property
    def seconds(self) -> float:
        """Duration with all actors at context."""
        return 3600 * self.actor_hours / self.pool.max_actors

    @property
    def cpu_hours(self) -> float:
        return self.actor_hours * self.pool.cpus

    @property
    def gpu_hours(self) -> float:
        return self.actor_hours * self.pool.gpus


def sample_plan(context: WorkerContext, known: Plan, count: int) -> list[ImageRef]:
    """Return up to `count` images spread over a written plan."""
    sample = StratifiedSample(count)
    every = max(1, len(known.parts) // _PARTS)
    for part in known.parts[::every][:_PARTS]:
        shards = plan.read_part(context.layout, part)["images"]
        images = (image for shard in shards for image in images_of(shard.as_py()))
        for _ in sample.observe(images):
            pass
    return sample.images()


def measure(
    context: WorkerContext, pool: Pool, images: list[ImageRef], *, total: int, shards: int
) -> Estimate:
    """Segment the images without writing, and extrapolate to `total` images in `shards` files.

    Raises SystemicError or StorageError if they cannot be read, ValueError if the list is empty.
    """
    if not images:
        raise ValueError("there are no images to measure")
    with closing(Segmenter(context)) as segmenter:
        one, _ = segmenter.rows_of(0, images[:1])  # also pays what only the first image costs
        sampled = errors = files = written = 0
        started = time.monotonic()
        while sampled < len(images) and (not sampled or time.monotonic() - started < MEASURE_S):
            chunk = images[sampled : sampled + _CHUNK]
            data, summary = segmenter.rows_of(0, chunk)
            sampled += len(chunk)
            errors += summary.errors.total()
            files += 1
            written += len(data)
        seconds = time.monotonic() - started
    return Estimate(
        images=total,
        pool=pool,
        sampled=sampled,
        sampled_s=seconds,
        errors=errors,
        bytes_written=_bytes(len(one), written, files, sampled, images=total, shards=shards),
        device=_device(context),
        load=os.getloadavg()[0],
    )


def _bytes(one: int, written: int, files: int, sampled: int, *, images: int, shards: int) -> int:
    """Return the bytes of `shards` files with `images` images in all.

    A file has a fixed part of a few KB and a part per image, known from the size of a file with
    `one` image and of `files` files with `sampled` images.
    """
    per_image = max(0.0, (written - files * one) / (sampled - files)) if sampled > files else 0.0
    return round(shards * max(0.0, one - per_image) + images * per_image)


def _device(context: WorkerContext) -> str:
    if context.gpu:
        return torch.cuda.get_device_name()
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return f"{context.cpus} of {os.cpu_count()} CPUs ({names[0] if names else 'unknown'})"
