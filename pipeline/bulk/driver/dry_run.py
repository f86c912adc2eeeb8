"""A dry run: the plan, and an estimate of its time and size from a sample of its images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.bulk.driver import estimate
from pipeline.bulk.driver.estimate import Estimate, StratifiedSample
from pipeline.bulk.driver.preflight import build_pool, build_progress, build_worker_context
from pipeline.bulk.driver.progress import Progress
from pipeline.bulk.planning import plan
from pipeline.bulk.planning.plan import Plan
from pipeline.bulk.settings import BulkSettings
from pipeline.bulk.worker.failure_streaks import SystemicError
from pipeline.data import storage
from pipeline.results.layout import RunLayout


@dataclass(frozen=True, kw_only=True)
class DryRunResult:
    """The existing or future plan, and its estimate, or why there is no estimate."""

    plan: Plan
    estimate: Estimate | None = None
    no_estimate: str = ""


def dry_run(
    settings: BulkSettings,
    layout: RunLayout,
    identity: dict[str, Any],
    known: Plan | None,
    watch: Callable[[Plan, Progress], None],
) -> DryRunResult:
    """Return the plan and an estimate of what it takes; nothing is written.

    `known` is the plan if the run has one already.
    """
    sample = StratifiedSample(settings.calibration_images)
    is_written = known is not None
    look = sample.observe if settings.calibration_images else iter
    known = known or plan.make(settings, layout, identity, write=False, observe=look)
    progress = build_progress(known, layout)
    watch(known, progress)
    left = progress.images - progress.images_before
    if not (settings.calibration_images and left):
        return DryRunResult(plan=known)
    pool = build_pool(settings)
    if pool.gpus and not torch.cuda.is_available():
        return DryRunResult(
            plan=known,
            no_estimate="the run's actors use GPUs and this machine has no GPU to measure on; "
            "start the dry run on a node with a GPU",
        )
    context = build_worker_context(settings, layout, known, pool)
    try:
        images = (
            estimate.sample_plan(context, known, settings.calibration_images)
            if is_written
            else sample.images()
        )
        shards = max(1, round(known.counts.shards * left / progress.images))
        measured = estimate.measure(context, pool, images, total=left, shards=shards)
    except (SystemicError, storage.StorageError) as error:
        return DryRunResult(plan=known, no_estimate=str(error))
    return DryRunResult(plan=known, estimate=measured)
