"""User-facing settings of a training run, validated before anything starts."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field

from pipeline.checks import check_at_least, flag
from pipeline.data import storage
from pipeline.runs import ray_connection
from pipeline.train.recipes.experiment import Experiment

_CLUSTER_CPUS = 4  # per worker on other machines, whose size is not known here
_MAX_LOADERS = 8


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Train a DeepLabv3 on Ray; the same command resumes a run that was stopped."""

    data: str
    """Folder or table of images and labels: s3://bucket/prefix or a local path."""
    out: str
    """Where the run is stored: checkpoints, curves, and finally the network."""
    workers: tuple[int, ...] = (1,)
    """Number of training workers; with two numbers, MIN MAX, as many as the cluster has room
    for."""
    cpus_per_worker: int | None = None
    """CPUs (and threads) per worker; by default the workers share this machine's, or get up to 4
    each on a cluster, or 16 if each has a GPU."""
    gpus_per_worker: float = 0.0
    """GPUs per worker; 1 trains on GPUs, 0 on CPUs."""
    loaders: int | None = None
    """Processes per worker that read and augment images."""
    checkpoint_every: int = 200
    """Steps between checkpoints: at most this many are repeated after a crash."""
    max_failures: int = 3
    """Worker crashes that are retried before the run stops."""
    start_timeout: int = 3600
    """Seconds to wait for a cluster without room for the workers, so that it can scale up."""
    stall_timeout: int = 1800
    """Stop the run after this many seconds without progress: no step and no validation image."""
    cache_gb: float = 20.0
    """Disk space on each node for images from object storage, so that each is downloaded once."""
    dry_run: bool = False
    """Check the data, time ten steps and estimate the duration; write nothing."""
    experiment: Experiment = field(default_factory=Experiment)

    def __post_init__(self) -> None:
        for name in ("data", "out"):
            object.__setattr__(self, name, storage.normalize(getattr(self, name)))
        if self.out.count("/") < 3 and self.out.startswith("s3://"):
            raise ValueError(
                f"--out {self.out}: must be a prefix below the bucket, used by this run only"
            )
        self._check_workers()
        self._check_limits()
        self._check_batch()

    def _check_workers(self) -> None:
        if len(self.workers) not in (1, 2) or not 1 <= self.workers[0] <= self.workers[-1]:
            given = " ".join(map(str, self.workers)) or "without a value"
            raise ValueError(f"--workers {given}: give a number, or MIN MAX")
        check_at_least(flag("cpus_per_worker"), self.cpus_per_worker, 1)
        check_at_least(flag("loaders"), self.loaders, 0)
        if not 0 <= self.gpus_per_worker <= 1:
            raise ValueError(
                f"--gpus-per-worker {self.gpus_per_worker:g}: must be from 0 to 1; for more GPUs "
                "give more --workers"
            )
        if 0 < self.gpus_per_worker < 1 < self.max_workers:
            raise ValueError(
                f"--gpus-per-worker {self.gpus_per_worker:g} with {self.max_workers} workers: "
                "workers that share a GPU cannot communicate; give 1"
            )

    def _check_limits(self) -> None:
        for name in ("checkpoint_every", "start_timeout", "stall_timeout"):
            check_at_least(flag(name), getattr(self, name), 1)
        check_at_least(
            flag("max_failures"), self.max_failures, 0, "0 stops the run at the first crash"
        )
        if not 0 <= self.cache_gb < math.inf:
            raise ValueError(
                f"--cache-gb {self.cache_gb:g}: must be at least 0 and finite; 0 keeps no image"
            )

    def _check_batch(self) -> None:
        batch_size = self.experiment.optimizer.batch_size
        if batch_size < self.max_workers:
            raise ValueError(
                f"--batch-size {batch_size} with {self.max_workers} workers: each worker needs an "
                f"image; give at most --workers {batch_size}"
            )
        low, high = self.workers_range
        for workers in range(low, high + 1):
            self._check_worker_batches(workers)

    def _check_worker_batches(self, workers: int) -> None:
        """Check that batch normalization can be trained on what each of `workers` workers gets."""
        config, model = self.experiment.optimizer, self.experiment.model
        if config.freeze_bn or model.style == "tensorflow":  # whose batch norm is folded
            return
        sizes = {config.batch_size // workers, -(-config.batch_size // workers)}
        micro = config.micro_batch or config.batch_size
        given = f"--batch-size {config.batch_size} on {workers} workers gives one of them"
        if self.gpus_per_worker and workers > 1:
            # on GPUs the statistics are synchronized, once per micro-batch
            if len({-(-size // micro) for size in sizes}) > 1:
                raise ValueError(
                    f"{given} a micro-batch more than the others, and synchronized batch "
                    "normalization would wait for them: give a --batch-size that is a multiple of "
                    "--workers, another --micro-batch, or --freeze-bn"
                )
            return
        if model.image_pooling and 1 in {size % micro or micro for size in sizes}:
            raise ValueError(
                f"{given} a single image, and batch normalization after image pooling needs two: "
                "give another --batch-size, --micro-batch or --workers, or --freeze-bn"
            )

    @property
    def max_workers(self) -> int:
        return self.workers[-1]

    @property
    def workers_range(self) -> tuple[int, int]:
        return self.workers[0], self.workers[-1]

    @property
    def cpus(self) -> int:
        """CPUs per worker."""
        if self.cpus_per_worker:
            return self.cpus_per_worker
        here = max(1, len(os.sched_getaffinity(0)) // self.max_workers)
        return _CLUSTER_CPUS if ray_connection.has_cluster() else here

    @property
    def cache_bytes(self) -> int:
        return int(self.cache_gb * 1e9)

    @property
    def loader_processes(self) -> int:
        """Loader processes per worker."""
        if self.loaders is not None:
            return self.loaders
        return max(1, min(_MAX_LOADERS, self.cpus // 2))
