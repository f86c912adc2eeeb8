"""The process group of a training run, as seen by one worker: rank, world size, collectives.

Only this module uses torch's process group and Ray Train. A single process is a group too: that is
how --dry-run and most tests train. All workers must call each method equally often.
"""

from __future__ import annotations

import os
import random
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as distributed
from torch import nn

from pipeline.train.worker import batch_norm

CPU = torch.device("cpu")

# held while a checkpoint is uploaded
_uploading = threading.Semaphore(1)

SaveCheckpoint = Callable[[], None]
"""Writes a checkpoint; may be called in another thread."""


@dataclass(frozen=True, kw_only=True)
class ProcessGroup:
    """Worker `rank` of `world_size`, computing on `device`."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = CPU

    @property
    def is_main(self) -> bool:
        """Whether this worker does what is done once per run."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return `module` with a backward pass that averages gradients over the workers."""
        if self.world_size == 1:
            return module
        # buffers are broadcast before evaluations and checkpoints instead of at each step
        return nn.parallel.DistributedDataParallel(
            self._with_sync_batch_norm(module), forward_sync_buffers=False
        )

    def _with_sync_batch_norm(self, module: nn.Module) -> nn.Module:
        """Return `module` with SyncBatchNorm where it works: on several GPUs."""
        if self.device.type != "cuda" or self.world_size == 1:
            return module
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
        return converted

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the elementwise sum of all workers' `values`, on every worker."""
        if self.world_size == 1:
            return values
        total = values.detach().clone().to(self.device)
        distributed.all_reduce(total)
        return total.to(values.device)

    def broadcast_buffers(self, module: nn.Module) -> None:
        """Give every worker the buffers of the main one."""
        if self.world_size > 1:
            batch_norm.broadcast_buffers(module)

    def report(
        self, metrics: Mapping[str, object], *, name: str, save: SaveCheckpoint | None
    ) -> None:
        """Report `metrics`; `save`, given on the main worker only, writes checkpoint `name`."""
        if save is not None:
            save()


class RayProcessGroup(ProcessGroup):
    """The process group of Ray Train's workers."""

    @classmethod
    def join(cls) -> RayProcessGroup:
        """Return this worker's group. To be called inside Ray Train's worker function."""
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        return cls(
            rank=context.get_world_rank(),
            world_size=context.get_world_size(),
            device=ray.train.torch.get_device(),
        )

    def wrap(self, module: nn.Module) -> nn.Module:
        import ray.train.torch

        options = {"forward_sync_buffers": False} if self.world_size > 1 else {}
        wrapped: nn.Module = ray.train.torch.prepare_model(
            self._with_sync_batch_norm(module), parallel_strategy_kwargs=options
        )
        return wrapped

    def report(
        self, metrics: Mapping[str, object], *, name: str, save: SaveCheckpoint | None
    ) -> None:
        """Report `metrics` to Ray Train; `save` runs in the background while training continues."""
        import ray.train

        if save is None:
            ray.train.report(dict(metrics), checkpoint_dir_name=name)
            return
        storage = ray.train.get_context().get_storage()
        path = storage.build_checkpoint_path_from_name(name)

        def upload(_: ray.train.Checkpoint, __: str) -> ray.train.Checkpoint:
            try:
                save()
            finally:
                os.rmdir(folder)
                _uploading.release()
            return ray.train.Checkpoint(path, filesystem=storage.storage_filesystem)

        # if storage is slower than training, wait: waiting checkpoints would fill the memory
        _uploading.acquire()
        # Ray wants a folder to upload, but the checkpoint is written from memory as one object
        folder = tempfile.mkdtemp(prefix="deeplab-checkpoint-")
        ray.train.report(
            dict(metrics),
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=upload,
        )


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed the random numbers of worker `rank` at `step`, so that a resumed run repeats them."""
    words = np.random.SeedSequence((seed, step, rank)).generate_state(2, np.uint64)
    torch.manual_seed(int(words[0]))
    random.seed(int(words[1]))
