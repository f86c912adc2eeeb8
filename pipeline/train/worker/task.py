"""The specification that a driver sends to its workers, and what a worker builds from it."""

from __future__ import annotations

import logging
import socket
from dataclasses import dataclass

import torch

from pipeline.data import storage
from pipeline.data.cache import NodeCache
from pipeline.data.datasets import Split
from pipeline.data.samples import SampleError
from pipeline.model import weights, zoo
from pipeline.model.deeplab import DeepLabV3
from pipeline.train.recipes.experiment import Experiment
from pipeline.train.worker import batch_norm, checkpoints, state
from pipeline.train.worker.distributed import ProcessGroup
from pipeline.train.worker.loader import LoaderConfig
from pipeline.train.worker.loss import PixelLoss
from pipeline.train.worker.state import TrainingState
from pipeline.train.worker.step import Trainer, build_average, build_optimizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """The specification of a run for its workers, the same for all of them.

    `initial` is the URI of the network to start from, `indices` the training list with its
    repeats, and `class_weights` (k,) or None.
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


def build_loader_config(spec: WorkerSpec, *, rank: int, world_size: int) -> LoaderConfig:
    """Return the loader configuration of worker `rank` of `world_size`."""
    experiment = spec.experiment
    red, green, blue = (round(255 * value) for value in experiment.model.mean)
    return LoaderConfig(
        split=spec.train,
        indices=spec.indices,
        read=node_cache(spec.train, spec.val, max_bytes=spec.cache_bytes),
        augmentation=experiment.augment,
        fill=(red, green, blue),
        batch_size=experiment.optimizer.batch_size,
        max_steps=experiment.optimizer.max_steps,
        seed=experiment.seed,
        rank=rank,
        world_size=world_size,
    )


def build_state(spec: WorkerSpec, model: DeepLabV3, group: ProcessGroup) -> TrainingState:
    """Return the training state before the first step; `model` is moved to the group's device."""
    config = spec.experiment.optimizer
    model = model.to(group.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    batch_norm.set_momentum(model, config.bn_momentum)
    return TrainingState(
        model=model,
        optimizer=build_optimizer(model, config),
        average=build_average(model, config),
    )


def provenance(spec: WorkerSpec, group: ProcessGroup) -> dict[str, int]:
    """Return the values that rounding depends on, as they are stored in checkpoints."""
    return {"world": group.world_size, "threads": spec.threads}


def restore_state(spec: WorkerSpec, group: ProcessGroup) -> TrainingState:
    """Return the training state of the newest checkpoint, or of a new run if there is none."""
    model, _ = weights.load(spec.initial)
    fresh = build_state(spec, model, group)
    if group.is_main and group.world_size > 1 and group.device.type == "cpu":
        _warn_of_separate_batch_norm(spec, model)
    newest = checkpoints.latest(spec.out) if group.is_main else None
    # the main worker decides: checkpoints may appear or vanish between two workers' listings
    step = int(group.sum(torch.tensor(newest.step if newest else 0)))
    if step == 0:
        return fresh
    newest = newest or checkpoints.load_step(spec.out, step)
    state.load(fresh, newest)
    before, now = dict(newest.provenance), provenance(spec, group)
    if before != now and group.is_main:
        logger.warning(
            "the checkpoint at step %d was written with %s, and training resumes with %s: the "
            "result will be equivalent, but not bit-identical",
            newest.step, before, now,
        )  # fmt: skip
    return fresh


def _warn_of_separate_batch_norm(spec: WorkerSpec, model: DeepLabV3) -> None:
    """Log a warning if batch normalization is trained: SyncBatchNorm does not support CPUs."""
    if not spec.experiment.optimizer.freeze_bn and any(batch_norm.layers(model)):
        logger.warning(
            "on CPUs each worker normalizes by its own images only, so the result depends on the "
            "number of workers; --freeze-bn normalizes by the stored statistics instead"
        )


def build_trainer(spec: WorkerSpec, training: TrainingState, group: ProcessGroup) -> Trainer:
    """Return the trainer that performs the steps of the run on `training`."""
    class_weights = spec.class_weights
    loss = PixelLoss(
        spec.experiment.model.num_classes,
        ignore_index=spec.train.classes.ignore_index,
        class_weights=None if class_weights is None else torch.tensor(class_weights),
        hard_share=spec.experiment.optimizer.hard_share,
    )
    return Trainer(training, loss, spec.experiment.optimizer, group, seed=spec.experiment.seed)


def node_cache(*splits: Split, max_bytes: int) -> NodeCache:
    """Return a reader of the splits' files that keeps those of a bucket on this node's disk."""
    objects = [item for split in splits for item in split.objects.values()]
    return NodeCache(zoo.cache_folder() / "photos", objects, max_bytes=max_bytes)


def check_paths_visible(spec: WorkerSpec) -> None:
    """Check that this node sees the initial network and, of each split, the first image and label.

    A local path may exist on another node only. Raises SampleError, naming the path.
    """
    node = socket.gethostname()
    needed = {spec.initial: "--out"}
    for split in (spec.train, spec.val):
        needed |= dict.fromkeys((split.pairs[0].image, split.pairs[0].label), "--data")
    for uri, flag in needed.items():
        try:
            exists = storage.exists(uri)
        except storage.StorageError as error:
            raise SampleError(uri, f"node {node} cannot read it: {error}") from error
        if not exists:
            raise SampleError(
                uri,
                f"node {node} does not have it; give {flag} as s3://, or a path that every node "
                "has",
            )
