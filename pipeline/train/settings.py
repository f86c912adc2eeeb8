"""What a person says about a training run, checked before anything starts."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field

from pipeline.data import storage
from pipeline.runs import ray_connection
from pipeline.train.recipes.experiment import Experiment

_CLUSTER_CPUS = 4  # of a worker on other machines, whose size is not known here
_LOADERS_AT_MOST = 8


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Trains a DeepLabv3 on Ray; the same command goes on with a run that was stopped."""

    data: str
    """Folder or table of photos and labels: s3://bucket/prefix or a local path."""
    out: str
    """Where the run lives: checkpoints, curves, and in the end the network."""
    workers: tuple[int, ...] = (1,)
    """How many train; with two numbers, MIN MAX, as many of them as the cluster has."""
    cpus_per_worker: int | None = None
    """Threads of each worker; without it they share this machine's, and have up to 4 on a cluster,
    or 16 where each has a GPU."""
    gpus_per_worker: float = 0.0
    """1 trains on GPUs."""
    loaders: int | None = None
    """Processes of each worker that read and augment photos."""
    checkpoint_every: int = 200
    """Steps between checkpoints: what is repeated at most after a death."""
    max_failures: int = 3
    """Deaths of workers after which the run stops."""
    start_timeout: int = 3600
    """Seconds to wait, at most, for a cluster that has no room for the workers: one that grows."""
    stall_timeout: int = 1800
    """The run stops when nothing moves for so many seconds: no step, no photo of val."""
    cache_gb: float = 20.0
    """What a node keeps of photos from object storage, so that epochs do not fetch them again."""
    dry_run: bool = False
    """Look at the data, time ten steps, say how long the run takes; write nothing."""
    experiment: Experiment = field(default_factory=Experiment)

    def __post_init__(self) -> None:
        for name in ("data", "out"):
            object.__setattr__(self, name, storage.normalize(getattr(self, name)))
        if self.out.count("/") < 3 and self.out.startswith("s3://"):
            raise ValueError(
                f"--out {self.out}: give a prefix below the bucket, for this run alone"
            )
        self._check_workers()
        self._check_limits()
        self._check_batch()

    def _check_workers(self) -> None:
        if len(self.workers) not in (1, 2) or not 1 <= self.workers[0] <= self.workers[-1]:
            raise ValueError(f"--workers {_words(self.workers)}: give a number, or MIN MAX")
        if self.cpus_per_worker is not None and self.cpus_per_worker < 1:
            raise ValueError(f"--cpus-per-worker {self.cpus_per_worker}: it must be at least 1")
        if self.loaders is not None and self.loaders < 0:
            raise ValueError(f"--loaders {self.loaders}: it must be at least 0")
        if not 0 <= self.gpus_per_worker <= 1:
            raise ValueError(
                f"--gpus-per-worker {self.gpus_per_worker:g}: it must be 0 to 1; for more GPUs "
                "give more --workers"
            )
        if 0 < self.gpus_per_worker < 1 < self.most_workers:
            raise ValueError(
                f"--gpus-per-worker {self.gpus_per_worker:g} on {self.most_workers} workers: two "
                "of them would share a GPU, over which they cannot talk: give 1"
            )

    def _check_limits(self) -> None:
        for name in ("checkpoint_every", "start_timeout", "stall_timeout"):
            if getattr(self, name) < 1:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} {getattr(self, name)}: it must be at least 1")
        if self.max_failures < 0:
            raise ValueError(
                f"--max-failures {self.max_failures}: it must be at least 0, which stops the run "
                "at the first death"
            )
        if not 0 <= self.cache_gb < math.inf:
            raise ValueError(
                f"--cache-gb {self.cache_gb:g}: it must be finite and at least 0, which keeps no "
                "photo"
            )

    def _check_batch(self) -> None:
        batch_size = self.experiment.optimizer.batch_size
        if batch_size < self.most_workers:
            raise ValueError(
                f"--batch-size {batch_size}, but there are {self.most_workers} workers, and each "
                f"needs a photo: give at most --workers {batch_size}"
            )
        low, high = self.workers_range
        for workers in range(low, high + 1):
            self._check_shares(workers)

    def _check_shares(self, workers: int) -> None:
        """Whether batch normalisation can be trained on what each of so many workers has."""
        config, model = self.experiment.optimizer, self.experiment.model
        if config.freeze_bn or model.style == "tensorflow":  # whose normalisation is folded
            return
        shares = {config.batch_size // workers, -(-config.batch_size // workers)}
        micro = config.micro_batch or config.batch_size
        given = f"--batch-size {config.batch_size} on {workers} workers gives one of them"
        if self.gpus_per_worker and workers > 1:
            # there its statistics are of all workers together, in as many exchanges
            if len({-(-share // micro) for share in shares}) > 1:
                raise ValueError(
                    f"{given} a micro-batch more than the others, and synchronised batch "
                    "normalisation would wait for them: give a --batch-size that is a multiple of "
                    "--workers, another --micro-batch, or --freeze-bn"
                )
            return
        if model.image_pooling and 1 in {share % micro or micro for share in shares}:
            raise ValueError(
                f"{given} a single photo, and batch normalisation after image pooling needs two: "
                "give another --batch-size, --micro-batch or --workers, or --freeze-bn"
            )

    @property
    def most_workers(self) -> int:
        return self.workers[-1]

    @property
    def workers_range(self) -> tuple[int, int]:
        return self.workers[0], self.workers[-1]

    @property
    def cpus(self) -> int:
        """Of each worker."""
        if self.cpus_per_worker:
            return self.cpus_per_worker
        here = max(1, len(os.sched_getaffinity(0)) // self.most_workers)
        return _CLUSTER_CPUS if ray_connection.has_cluster() else here

    @property
    def cache_bytes(self) -> int:
        return int(self.cache_gb * 1e9)

    @property
    def loader_processes(self) -> int:
        """Of each worker."""
        if self.loaders is not None:
            return self.loaders
        return max(1, min(_LOADERS_AT_MOST, self.cpus // 2))


def _words(values: tuple[int, ...]) -> str:
    return " ".join(map(str, values))
