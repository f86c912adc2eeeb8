"""Preflight checks of a bulk run, and the objects that its driver and workers start with."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from dataclasses import dataclass
from pathlib import Path

import pipeline
from pipeline.bulk.driver.actor_pool import Pool
from pipeline.bulk.driver.progress import Progress
from pipeline.bulk.planning.plan import Plan
from pipeline.bulk.settings import BulkSettings
from pipeline.bulk.worker.segmenter import WorkerContext
from pipeline.data import storage
from pipeline.data.labels import Classes
from pipeline.model import devices, weights
from pipeline.results.layout import RunLayout
from pipeline.runs import ray_connection

_GPU_BATCH, _CPU_BATCH = 8, 1  # on a CPU, images of a batch evict each other from its caches
_CLUSTER_CPUS = 2


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Identity of the model and the code that a run uses."""

    code_version: str
    sha256: str
    fingerprint: str
    classes: Classes


def preflight(settings: BulkSettings) -> Checkpoint:
    """Check what the settings name, before anything is written or started.

    Raises ValueError or StorageError if something cannot be used.
    """
    data = weights.read(settings.checkpoint)
    model, classes = weights.load(settings.checkpoint, data=data)
    if settings.inference.output_stride is not None:
        model.set_output_stride(settings.inference.output_stride)
    gpus = settings.gpus_per_actor
    if not ray_connection.has_cluster():
        devices.check_gpus(gpus, f"--gpus-per-actor {gpus:g}")
    for prefix in filter(None, (settings.images, settings.labels)):
        _check_folder(prefix)
    return Checkpoint(
        code_version=_code_version(),
        sha256=weights.checkpoint_sha256(data),
        fingerprint=weights.checkpoint_fingerprint(data),
        classes=classes,
    )


def _check_folder(prefix: str) -> None:
    if prefix.count("/") > 2 and storage.exists(prefix):
        raise ValueError(f"{prefix} is an object; pass the folder or prefix that contains it")
    if not any(storage.list_pages(prefix)):
        raise ValueError(f"there are no objects under {prefix}")


def _code_version() -> str:
    """Return the package's version and a hash of its source code."""
    code = hashlib.sha256()
    root = Path(pipeline.__file__).parent
    for path in sorted(root.rglob("*.py")):
        code.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    try:
        version = importlib.metadata.version("deeplab-pipeline")
    except importlib.metadata.PackageNotFoundError:  # run from a working directory
        version = "unknown"
    return f"{version}+{code.hexdigest()[:8]}"


def build_pool(settings: BulkSettings) -> Pool:
    """Return the actor pool that the settings ask for.

    If `cpus_per_actor` is unset, actors split this machine's CPUs evenly; on a cluster, whose nodes
    may differ from this machine, they get two each.
    """
    low, high = settings.actors
    if ray_connection.has_cluster():
        default_cpus = _CLUSTER_CPUS
    else:
        default_cpus = max(1, len(os.sched_getaffinity(0)) // high)
    return Pool(
        min_actors=low,
        max_actors=high,
        cpus=settings.cpus_per_actor or default_cpus,
        gpus=settings.gpus_per_actor,
        start_timeout_s=settings.start_timeout,
        stall_timeout_s=settings.stall_timeout,
    )


def build_worker_context(
    settings: BulkSettings, layout: RunLayout, known: Plan, pool: Pool
) -> WorkerContext:
    """Return what all workers of the run share."""
    return WorkerContext(
        layout=layout,
        images=settings.images,
        labels=settings.labels,
        checkpoint=settings.checkpoint,
        model=known.model,
        settings=known.settings,
        inference=settings.inference,
        batch_images=settings.batch_images or (_GPU_BATCH if pool.gpus else _CPU_BATCH),
        cpus=pool.cpus,
        gpu=pool.gpus > 0,
    )


def build_progress(known: Plan, layout: RunLayout) -> Progress:
    """Return the progress of the run, estimated from the number of its files."""
    done = sum(map(len, storage.list_pages(layout.images)))
    # shards differ in size only at the end, or where bytes cut them: good enough for a display
    share = done / known.counts.shards if known.counts.shards else 0.0
    return Progress(images=known.counts.images, images_before=round(known.counts.images * share))
