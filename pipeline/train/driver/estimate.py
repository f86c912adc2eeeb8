"""How long a run will take, from ten steps of it: in this process, without Ray, writing nothing."""

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
from pipeline.train.worker.loader import batches
from pipeline.train.worker.task import build_loader_config, build_state, build_trainer

STEPS = 10
WARM_UP = 2


@dataclass(frozen=True, kw_only=True)
class TrainingEstimate:
    """What was looked at, the median seconds of a step, and the share that waits for photos."""

    report: DataReport
    step_s: float
    wait_share: float
    seconds: float


def estimate(settings: TrainingSettings, say: Log) -> TrainingEstimate:
    """Times ten steps of one worker's part of the batch. Raises ValueError as `look` does."""
    if settings.gpus_per_worker and not torch.cuda.is_available():
        raise ValueError(
            f"--gpus-per-worker {settings.gpus_per_worker:g} --dry-run: steps are timed here, "
            "where torch finds no GPU; dry-run it on a machine with one"
        )
    looked = inspect_data(settings, say)
    task = build_worker_spec(settings, looked, initial="")
    torch.set_num_threads(task.threads)
    device = torch.device("cuda" if settings.gpus_per_worker else "cpu")
    group = ProcessGroup(device=device)
    first = looked.first or initial_model(settings.experiment, say)
    state = build_state(task, first, group)
    stepper = build_trainer(task, state, group)
    # the first of as many workers as there will be, alone; batch normalisation wants two photos
    config = task.experiment.optimizer
    world = min(settings.max_workers, max(1, config.batch_size // 2))
    source = build_loader_config(task, rank=0, world_size=world)
    seconds, waited = [], []
    steps = min(STEPS + WARM_UP, config.max_steps)
    made = batches(source, 0, steps, loaders=task.loaders)
    started = time.monotonic()
    for batch in itertools.islice(made, steps):
        if isinstance(batch, SampleError):
            raise batch
        stepper.step(batch.images, batch.labels)
        seconds.append(time.monotonic() - started)
        waited.append(batch.waited_s)
        started = time.monotonic()
    warm = slice(WARM_UP if steps > WARM_UP else 0, None)
    step_s = statistics.median_high(seconds[warm])
    return TrainingEstimate(
        report=looked,
        step_s=step_s,
        wait_share=sum(waited[warm]) / sum(seconds[warm]),
        seconds=step_s * task.experiment.augment.steps_like(0, config.max_steps),
    )
