"""The workers of a run, as one of them sees them: who am I, and what do we come to together.

`Group` alone talks to torch's process group and to Ray Train; a run of one process without either
is a group too, which is how tests and --dry-run train. Every method but `device` is called by all
workers equally often.
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

_UPLOADING = threading.Semaphore(1)

SaveCheckpoint = Callable[[], None]
"""Puts a checkpoint; may be called in another thread."""


@dataclass(frozen=True, kw_only=True)
class ProcessGroup:
    """Worker `rank` of `world_size`, computing on `device`."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = CPU

    @property
    def is_main(self) -> bool:
        """Whether this worker does what is done once."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """`module`, whose backward pass averages gradients over the workers."""
        if self.world_size == 1:
            return module
        # buffers are broadcast before evaluation and checkpoints instead of at each step
        return nn.parallel.DistributedDataParallel(self._shared(module), forward_sync_buffers=False)

    def _shared(self, module: nn.Module) -> nn.Module:
        """`module`, normalising over all workers' batches, which torch does on GPUs alone."""
        if self.device.type != "cuda" or self.world_size == 1:
            return module
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
        return converted

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The elementwise sum of the workers' `values`, on every worker."""
        if self.world_size == 1:
            return values
        total = values.detach().clone().to(self.device)
        distributed.all_reduce(total)
        return total.to(values.device)

    def broadcast_buffers(self, module: nn.Module) -> None:
        """Gives every worker the buffers of the first."""
        if self.world_size > 1:
            batch_norm.broadcast_buffers(module)

    def report(
        self, metrics: Mapping[str, object], *, name: str, save: SaveCheckpoint | None
    ) -> None:
        """Hands on what the run came to so far; `save` puts checkpoint `name` (rank 0 alone)."""
        if save is not None:
            save()


class RayProcessGroup(ProcessGroup):
    """A group whose processes are Ray Train's."""

    @classmethod
    def join(cls) -> RayProcessGroup:
        """This worker's group. Called inside Ray Train's worker function."""
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

        wrapped: nn.Module = ray.train.torch.prepare_model(
            self._shared(module),
            parallel_strategy_kwargs={"forward_sync_buffers": False} if self.world_size > 1 else {},
        )
        return wrapped

    def report(
        self, metrics: Mapping[str, object], *, name: str, save: SaveCheckpoint | None
    ) -> None:
        """As above; the checkpoint is put in the background, while training goes on."""
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
                _UPLOADING.release()
            return ray.train.Checkpoint(path, filesystem=storage.storage_filesystem)

        # where storage is slower than training, training waits: copies would fill the memory
        _UPLOADING.acquire()
        # Ray wants a folder to upload; what is put comes from memory, as one object
        folder = tempfile.mkdtemp(prefix="deeplab-checkpoint-")
        ray.train.report(
            dict(metrics),
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=upload,
        )


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seeds what is random in the network at `step` of worker `rank`: a resume repeats it."""
    words = np.random.SeedSequence((seed, step, rank)).generate_state(2, np.uint64)
    torch.manual_seed(int(words[0]))
    random.seed(int(words[1]))
