"""What all workers of a run are told, and what each of them makes of it.

Enters: a driver's `Task`, plain values that travel to other machines. Leaves: the state before the
first step, what makes its steps, and where its batches come from: the same on every worker.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass

import torch

from pipeline.data import storage
from pipeline.data.cache import NodeCache
from pipeline.data.datasets import Split
from pipeline.data.samples import SampleError
from pipeline.model import zoo
from pipeline.model.deeplab import DeepLabV3
from pipeline.train.recipes.experiment import Experiment
from pipeline.train.worker import batch_norm
from pipeline.train.worker.distributed import ProcessGroup
from pipeline.train.worker.loader import LoaderConfig
from pipeline.train.worker.loss import PixelLoss
from pipeline.train.worker.state import TrainingState
from pipeline.train.worker.step import Trainer, build_average, build_optimizer


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """What a run's workers need to know. `initial` is the URI of the network to start from.

    `indices` is the training list, with its repeats; `class_weights` (k,) or None.
    """

    experiment: Experiment
    out: str
    initial: str
    train: Split
    val: Split
    indices: tuple[int, ...]
    class_weights: tuple[float, ...] | None
    checkpoint_every: int
    threads: int
    loaders: int
    cache_bytes: int


def build_loader_config(task: WorkerSpec, *, rank: int, world_size: int) -> LoaderConfig:
    """Where worker `rank` of `world_size` has its batches from."""
    experiment = task.experiment
    red, green, blue = (round(255 * value) for value in experiment.model.mean)
    return LoaderConfig(
        split=task.train,
        indices=task.indices,
        read=node_cache(task.train, task.val, max_bytes=task.cache_bytes),
        config=experiment.augment,
        fill=(red, green, blue),
        batch_size=experiment.optimizer.batch_size,
        max_steps=experiment.optimizer.max_steps,
        seed=experiment.seed,
        rank=rank,
        world_size=world_size,
    )


def build_state(task: WorkerSpec, model: DeepLabV3, group: ProcessGroup) -> TrainingState:
    """The run's state before the first step."""
    config = task.experiment.optimizer
    model = model.to(group.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    batch_norm.set_momentum(model, config.bn_momentum)
    return TrainingState(
        model=model,
        optimizer=build_optimizer(model, config),
        average=build_average(model, config),
    )


def build_trainer(task: WorkerSpec, state: TrainingState, group: ProcessGroup) -> Trainer:
    """What makes the run's steps."""
    weights = task.class_weights
    loss = PixelLoss(
        task.experiment.model.num_classes,
        ignore_index=task.train.classes.ignore_index,
        class_weights=None if weights is None else torch.tensor(weights),
        hard_share=task.experiment.optimizer.hard_share,
    )
    return Trainer(state, loss, task.experiment.optimizer, group, seed=task.experiment.seed)


def node_cache(*splits: Split, max_bytes: int) -> NodeCache:
    """Reads the splits' objects; what comes from a bucket is kept on this node's disk."""
    objects = [each for split in splits for each in split.objects.values()]
    return NodeCache(zoo.cache_folder() / "photos", objects, max_bytes=max_bytes)


def check_paths_visible(task: WorkerSpec) -> SampleError | None:
    """Why this node cannot train: a local path may be another's. One photo tells of a split."""
    node = socket.gethostname()
    needed = {task.initial: "--out"}
    for split in (task.train, task.val):
        needed |= dict.fromkeys((split.pairs[0].image, split.pairs[0].label), "--data")
    for uri, flag in needed.items():
        try:
            there = storage.exists(uri)
        except storage.StorageError as error:
            return SampleError(uri, f"node {node} cannot read it: {error}")
        if not there:
            return SampleError(
                uri,
                f"it is not on node {node}: give {flag} as s3://, or as a path that every node has",
            )
    return None
