"""Data loading: a worker's part of each batch, decoded and augmented ahead in other processes.

A batch is a function of (seed, step, rank, world size), so neither the number of loader processes
nor a resume changes a byte of it. An image that cannot be read is returned as a SampleError
instead of a batch, so that the training process can report it.
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

PREFETCH_FACTOR = 3
"""Batches that each loader process prepares ahead."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Images (n, h, w, 3) and labels (n, h, w), both uint8, and the URIs of the images.

    `waited_s` is how long the training loop waited for it, in seconds.
    """

    images: torch.Tensor
    labels: torch.Tensor
    uris: tuple[str, ...]
    waited_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """The data that one worker loads.

    `indices` is the training list, `fill` the RGB color outside of an image, `batch_size` that of
    all workers together.
    """

    split: Split
    indices: Sequence[int]
    read: Read
    augmentation: AugmentConfig
    fill: tuple[int, int, int]
    batch_size: int
    max_steps: int
    seed: int
    rank: int = 0
    world_size: int = 1


# what a loader process needs to make a sample: the draw, and the crop size (h, w) of the step
_SampleKey = tuple[Draw, tuple[int, int]]
# image, label, and the URI of the image
_Sample = tuple[torch.Tensor, torch.Tensor, str]


class ImageDataset(Dataset[_Sample | SampleError]):
    """A data set of decoded, augmented images; used in the loader processes."""

    def __init__(self, config: LoaderConfig) -> None:
        self._config = config

    def __getitem__(self, key: _SampleKey) -> _Sample | SampleError:
        draw, crop_size = key
        config = self._config
        pair = config.split.pairs[draw.index]
        try:
            image, label = samples.load(pair, config.split, config.read)
        except SampleError as error:
            return error
        image, label = augment(
            image,
            label,
            np.random.default_rng(draw.seed),
            crop_size=crop_size,
            min_scale=config.augmentation.min_scale,
            max_scale=config.augmentation.max_scale,
            mirror=config.augmentation.mirror,
            fill=config.fill,
            ignore_index=config.split.classes.ignore_index,
        )
        return torch.from_numpy(image), torch.from_numpy(label), pair.image


class StepBatchSampler:
    """The keys of a worker's samples at each step from `start` to `stop` (exclusive)."""

    def __init__(self, config: LoaderConfig, start: int, stop: int) -> None:
        self._config, self._start, self._stop = config, start, stop

    def __iter__(self) -> Iterator[list[_SampleKey]]:
        config = self._config
        for step in range(self._start, self._stop):
            draws = sampler.draw_batch(
                config.indices, seed=config.seed, step=step, batch_size=config.batch_size
            )
            crop_size = config.augmentation.crop_at(step, config.max_steps)
            mine = sampler.worker_draws(draws, config.rank, config.world_size)
            yield [(draw, crop_size) for draw in mine]

    def __len__(self) -> int:
        return self._stop - self._start


def load_batches(
    config: LoaderConfig, start: int, stop: int, *, loaders: int
) -> Iterator[Batch | SampleError]:
    """Yield the worker's batches of the steps `start` to `stop` (exclusive), in order.

    They are made in `loaders` processes, or in this one if it is 0. If an image or label of a
    batch cannot be used, the SampleError that names it is yielded instead.
    """
    # Any: collate_fn decides what the loader yields, not the data set
    loader: DataLoader[Any] = DataLoader(
        ImageDataset(config),
        batch_sampler=StepBatchSampler(config, start, stop),
        num_workers=loaders,
        collate_fn=_collate,
        prefetch_factor=PREFETCH_FACTOR if loaders else None,
        # forking a process that has threads can deadlock
        multiprocessing_context="forkserver" if loaders else None,
        worker_init_fn=_init_loader,
    )
    requested = time.monotonic()
    for batch in loader:
        waited_s = time.monotonic() - requested
        yield replace(batch, waited_s=waited_s) if isinstance(batch, Batch) else batch
        requested = time.monotonic()


def _collate(parts: list[_Sample | SampleError]) -> Batch | SampleError:
    """Return the samples as one batch, or the first error among them."""
    loaded = []
    for part in parts:
        if isinstance(part, SampleError):
            return part
        loaded.append(part)
    return Batch(
        images=torch.stack([image for image, _, _ in loaded]),
        labels=torch.stack([label for _, label, _ in loaded]),
        uris=tuple(uri for _, _, uri in loaded),
    )


def _init_loader(_: int) -> None:
    torch.set_num_threads(1)
    trainer = multiprocessing.parent_process()
    if trainer is not None:  # None if batches are made in the training process
        threading.Thread(target=_exit_with, args=(trainer,), daemon=True).start()


def _exit_with(trainer: multiprocessing.process.BaseProcess) -> None:
    """Exit when the training process does, even if it is killed.

    torch only watches this process's parent, the forkserver, which outlives the training process.
    """
    trainer.join()
    os._exit(1)
