"""What is looked at before a bulk run, and what its workers begin with.

Enters: `Settings`. Leaves: the checkpoint, known by its bytes, and how many actors do what.
"""

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
from pipeline.bulk.settings import Settings
from pipeline.bulk.worker.segmenter import WorkerContext
from pipeline.data import storage
from pipeline.data.labels import Classes
from pipeline.model import devices, weights
from pipeline.results.layout import RunLayout
from pipeline.runs import ray_connection

_GPU_BATCH, _CPU_BATCH = 8, 1  # on a CPU batches only push each other out of its caches


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The model that a run uses, known by its bytes, and the code."""

    code_version: str
    sha256: str
    fingerprint: str
    classes: Classes


def preflight(settings: Settings) -> Checkpoint:
    """Looks at what the settings name, before anything is written or started."""
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
        raise ValueError(f"{prefix} is one object; give the folder that holds it")
    if not any(storage.list_pages(prefix)):
        raise ValueError(f"nothing lies below {prefix}")


def _code_version() -> str:
    """The package's version, and a hash of the code as it is."""
    code = hashlib.sha256()
    root = Path(pipeline.__file__).parent
    for path in sorted(root.rglob("*.py")):
        code.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    try:
        version = importlib.metadata.version("deeplab-pipeline")
    except importlib.metadata.PackageNotFoundError:  # it came as a working directory
        version = "unknown"
    return f"{version}+{code.hexdigest()[:8]}"


def build_pool(settings: Settings) -> Pool:
    """The actors asked for; without a word on CPUs they share those of this machine.

    On a cluster this machine says nothing about the others: there it is two each.
    """
    low, high = settings.actors
    shared = 2 if ray_connection.has_cluster() else max(1, len(os.sched_getaffinity(0)) // high)
    cpus = settings.cpus_per_actor or shared
    return Pool(
        min_actors=low,
        max_actors=high,
        cpus=cpus,
        gpus=settings.gpus_per_actor,
        start_timeout_s=settings.start_timeout,
        stall_timeout_s=settings.stall_timeout,
    )


def build_worker_context(
    settings: Settings, layout: RunLayout, known: Plan, pool: Pool
) -> WorkerContext:
    """What every shard of the run shares."""
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
    """How far the run is, by the files that are there."""
    done = sum(map(len, storage.list_pages(layout.images)))
    # shards are equal but for the last, or where bytes cut them: good enough for a display
    share = done / known.counts.shards if known.counts.shards else 0.0
    return Progress(images=known.counts.images, images_before=round(known.counts.images * share))
