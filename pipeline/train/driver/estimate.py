"""Estimate of the duration of a training run: ten steps in this process, writing nothing."""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import dataclass

import torch

from pipeline.data.samples import SampleError
from pipeline.train.driver.preflight import (
    DataReport,
    Log,
    build_worker_spec,
    initial_model,
    inspect_data,
)
from pipeline.train.settings import TrainingSettings
from pipeline.train.worker.distributed import ProcessGroup
from pipeline.train.worker.loader import load_batches
from pipeline.train.worker.task import build_loader_config, build_state, build_trainer

STEPS = 10
WARM_UP = 2


@dataclass(frozen=True, kw_only=True)
class TrainingEstimate:
    """The data report, the median seconds of a step, and the estimated seconds of all steps.

    `wait_share` is the fraction of the time that a step waits for images.
    """

    report: DataReport
    step_s: float
    wait_share: float
    seconds: float


def estimate(settings: TrainingSettings, log: Log) -> TrainingEstimate:
    """Time ten steps on one worker's part of the batch. Raises as `inspect_data` does."""
    if settings.gpus_per_worker and not torch.cuda.is_available():
        raise ValueError(
            f"--gpus-per-worker {settings.gpus_per_worker:g} --dry-run: steps are timed on this "
            "machine, where torch finds no GPU; run it on a machine with one"
        )
    report = inspect_data(settings, log)
    spec = build_worker_spec(settings, report, initial="")
    torch.set_num_threads(spec.threads)
    group = ProcessGroup(device=torch.device("cuda" if settings.gpus_per_worker else "cpu"))
    model = report.initial_model or initial_model(settings.experiment, log)
    state = build_state(spec, model, group)
    trainer = build_trainer(spec, state, group)
    # as the first of all workers, but with at least two images, for batch normalization
    config = spec.experiment.optimizer
    world_size = min(settings.max_workers, max(1, config.batch_size // 2))
    loader = build_loader_config(spec, rank=0, world_size=world_size)
    steps = min(STEPS + WARM_UP, config.max_steps)
    seconds, waited = [], []
    loaded = load_batches(loader, 0, steps, loaders=spec.loaders)
    started = time.monotonic()
    for batch in itertools.islice(loaded, steps):
        if isinstance(batch, SampleError):
            raise batch
        trainer.step(batch.images, batch.labels)
        seconds.append(time.monotonic() - started)
        waited.append(batch.waited_s)
        started = time.monotonic()
    warm = slice(WARM_UP if steps > WARM_UP else 0, None)
    step_s = statistics.median_high(seconds[warm])
    return TrainingEstimate(
        report=report,
        step_s=step_s,
        wait_share=sum(waited[warm]) / sum(seconds[warm]),
        seconds=step_s * spec.experiment.augment.steps_like(0, config.max_steps),
    )
