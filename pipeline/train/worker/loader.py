"""A worker's part of every batch, read, decoded and augmented in other processes, ahead of time.

Enters: the split, the training list, and from which step to which. Leaves: `Batch`es in order.
Invariant: a batch is a function of (seed, step, rank, world) alone, so neither the number of loader
processes nor a resume changes a byte of it. What cannot be read arrives as a message, not as an
exception in a process that nobody reads.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.data import samples
from pipeline.data.augment import augment
from pipeline.data.datasets import Split
from pipeline.data.samples import Read, SampleError
from pipeline.train.recipes.experiment import AugmentConfig
from pipeline.train.worker import sampler
from pipeline.train.worker.sampler import Draw

AHEAD = 3
"""Batches that each loader process keeps ready."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Photos (n, h, w, 3) and labels (n, h, w), uint8, and where the photos are from.

    `waited_s` is how long the training step waited for it, in seconds.
    """

    images: torch.Tensor
    labels: torch.Tensor
    uris: tuple[str, ...]
    waited_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """Where a worker's batches come from."""

    split: Split
    indices: Sequence[int]
    read: Read
    config: AugmentConfig
    fill: tuple[int, int, int]
    batch_size: int
    max_steps: int
    seed: int
    rank: int = 0
    world_size: int = 1


# what of a batch is asked of a loader process: each photo's draw, at the step's crop
_SampleKey = tuple[Draw, tuple[int, int]]
_Sample = tuple[torch.Tensor, torch.Tensor, str]


class ImageDataset(Dataset[_Sample | SampleError]):
    def __init__(self, source: LoaderConfig) -> None:
        self._source = source

    def __getitem__(self, key: _SampleKey) -> _Sample | SampleError:
        draw, crop_size = key
        source = self._source
        pair = source.split.pairs[draw.index]
        try:
            image, label = samples.load(pair, source.split, source.read)
        except SampleError as error:
            return error
        image, label = augment(
            image,
            label,
            np.random.default_rng(draw.seed),
            crop_size=crop_size,
            min_scale=source.config.min_scale,
            max_scale=source.config.max_scale,
            mirror=source.config.mirror,
            fill=source.fill,
            ignore_index=source.split.classes.ignore_index,
        )
        return torch.from_numpy(image), torch.from_numpy(label), pair.image


class StepBatchSampler:
    """The keys of each step from `start` on, for DataLoader."""

    def __init__(self, source: LoaderConfig, start: int, stop: int) -> None:
        self._source, self._start, self._stop = source, start, stop

    def __iter__(self) -> Iterator[list[_SampleKey]]:
        source = self._source
        for step in range(self._start, self._stop):
            draws = sampler.batch(
                source.indices, seed=source.seed, step=step, batch_size=source.batch_size
            )
            crop = source.config.crop_at(step, source.max_steps)
            yield [(draw, crop) for draw in sampler.share(draws, source.rank, source.world_size)]

    def __len__(self) -> int:
        return self._stop - self._start


def _collate(parts: list[_Sample | SampleError]) -> Batch | SampleError:
    for part in parts:
        if isinstance(part, SampleError):
            return part
    whole = [part for part in parts if not isinstance(part, SampleError)]
    return Batch(
        images=torch.stack([image for image, _, _ in whole]),
        labels=torch.stack([label for _, label, _ in whole]),
        uris=tuple(uri for _, _, uri in whole),
    )


def batches(
    source: LoaderConfig, start: int, stop: int, *, loaders: int
) -> Iterator[Batch | SampleError]:
    """The worker's batches of the steps `start` to `stop` (not included), in order.

    `loaders` processes make them; 0 makes them in this one. Where a photo or label of a batch
    cannot be used, the batch is the SampleError that says which and why.
    """
    # what comes out is what _collate makes, not what the data set holds
    loader: DataLoader[Any] = DataLoader(
        ImageDataset(source),
        batch_sampler=StepBatchSampler(source, start, stop),
        num_workers=loaders,
        collate_fn=_collate,
        prefetch_factor=AHEAD if loaders else None,
        # a fork of a process with threads can hang; these start clean
        multiprocessing_context="forkserver" if loaders else None,
        worker_init_fn=_start_loader,
    )
    waiting = time.monotonic()
    for batch in loader:
        waited_s = time.monotonic() - waiting
        yield _waited(batch, waited_s)
        waiting = time.monotonic()


def _waited(batch: Batch | SampleError, waited_s: float) -> Batch | SampleError:
    if isinstance(batch, SampleError):
        return batch
    return replace(batch, waited_s=waited_s)


def _start_loader(_: int) -> None:
    torch.set_num_threads(1)
    trainer = multiprocessing.parent_process()
    if trainer is not None:  # None where batches are made in this process
        threading.Thread(target=_end_with, args=(trainer,), daemon=True).start()


def _end_with(trainer: multiprocessing.process.BaseProcess) -> None:
    """Ends this process when the trainer does, even by kill -9.

    torch watches the parent alone, which is the forkserver; and that lives as long as a loader.
    """
    trainer.join()
    os._exit(1)
