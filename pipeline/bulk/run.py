"""A bulk run from its settings to its record: check, plan, waves, reconcile, finish.

Whatever stops a run leaves whole files behind and nothing else; the same command continues it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import pipeline
from pipeline.bulk import estimate, plan
from pipeline.bulk.estimate import Estimate, Spread
from pipeline.bulk.finish import Finish, Outcome, recorded
from pipeline.bulk.plan import Plan
from pipeline.bulk.progress import Progress, Summary
from pipeline.bulk.reconcile import Reconciler
from pipeline.bulk.rows import RowMaker
from pipeline.bulk.segmenter import SystemicError, Work, checkpoint_fingerprint
from pipeline.bulk.settings import Settings
from pipeline.bulk.usage import Usage
from pipeline.bulk.waves import Pool
from pipeline.data import storage
from pipeline.data.labels import Classes
from pipeline.model import weights
from pipeline.results.layout import RunLayout, only_new_lease
from pipeline.runs import cluster, lease
from pipeline.runs.cluster import RunStoppedError

_GPU_BATCH, _CPU_BATCH = 8, 1  # on a CPU batches only push each other out of its caches

Watch = Callable[[Plan, Progress], None]
"""Is told how far the run is: once when it begins, and after every shard."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a run ended."""

    plan: Plan
    outcome: Outcome | None  # None after a dry run
    seconds: float
    images_per_second: float | None
    nothing_to_do: bool = False
    estimate: Estimate | None = None  # of a dry run
    no_estimate: str = ""  # why there is none


@dataclass(frozen=True, kw_only=True)
class _Checkpoint:
    """The model that a run uses, known by its bytes, and the code."""

    code_version: str
    sha256: str
    fingerprint: str
    classes: Classes


def run(settings: Settings, watch: Watch) -> Ended:
    """Does what the settings ask, or what is left of it.

    Raises ValueError or StorageError for what the settings name and cannot be used,
    lease.HeldError where another driver works on the run, RunStoppedError where it cannot go on.
    """
    checkpoint = _check(settings)
    identity = settings.identity(model=checkpoint.fingerprint)
    layout = RunLayout(results=settings.results, run_id=plan.run_id_of(settings, identity))
    known = plan.load(layout)
    if known is not None:
        plan.check_same(known, identity)
    if settings.dry_run:
        return _dry(settings, layout, identity, known, watch)
    if known is not None and storage.exists(layout.record):
        return _finished_before(layout, known)
    if cluster.has_cluster():
        _pool(settings).connect()  # before anything is written
    with contextlib.ExitStack() as leases:
        held = [
            leases.enter_context(lease.held(uri, layout.run_id, within=layout.results))
            for uri in _leases(settings, layout, checkpoint)
        ]
        known = plan.load(layout) or plan.make(settings, layout, identity)
        plan.check_same(known, identity)
        if storage.exists(layout.record):  # by the driver that had the lease before
            return _finished_before(layout, known)
        return _Run(settings, layout, known, checkpoint, watch, held).to_its_end()


def _dry(
    settings: Settings,
    layout: RunLayout,
    identity: dict[str, Any],
    known: Plan | None,
    watch: Watch,
) -> Ended:
    """The plan as it would be, and what it would take."""
    spread = Spread(settings.calibration_images)
    written = known is not None
    look = spread.through if settings.calibration_images else iter
    known = known or plan.make(settings, layout, identity, write=False, look=look)
    progress = _progress(known, layout)
    watch(known, progress)
    ended = Ended(plan=known, outcome=None, seconds=0.0, images_per_second=None)
    left = progress.images - progress.images_before
    if not (settings.calibration_images and left):
        return ended
    pool = _pool(settings)
    if pool.gpus and not torch.cuda.is_available():
        return replace(
            ended,
            no_estimate="its actors have GPUs, and this machine has none to measure on; "
            "a dry run on a node with one gives it",
        )
    work = _work(settings, layout, known, pool)
    try:
        photos = (
            estimate.spread_of(work, known, settings.calibration_images)
            if written
            else spread.photos()
        )
        shards = max(1, round(known.counts.shards * left / progress.images))
        found = estimate.measure(work, pool, photos, images=left, shards=shards)
    except (SystemicError, storage.StorageError) as error:
        return replace(ended, no_estimate=str(error))
    return replace(ended, estimate=found)


def _work(settings: Settings, layout: RunLayout, known: Plan, pool: Pool) -> Work:
    return Work(
        layout=layout,
        images=settings.images,
        checkpoint=settings.checkpoint,
        model=known.model,
        settings=known.settings,
        inference=settings.inference,
        batch_images=settings.batch_images or (_GPU_BATCH if pool.gpus else _CPU_BATCH),
        cpus=pool.cpus,
        gpu=pool.gpus > 0,
    )


def _leases(settings: Settings, layout: RunLayout, checkpoint: _Checkpoint) -> list[str]:
    """What a driver must hold: the run, and with --only-new all that is new to this model.

    A night that is still at work when the next begins has photos that no file tells of yet.
    """
    if not settings.only_new:
        return [layout.lease]
    work = settings.work(model=checkpoint.fingerprint)
    return [only_new_lease(layout.results, work), layout.lease]


def _finished_before(layout: RunLayout, known: Plan) -> Ended:
    return Ended(
        plan=known,
        outcome=recorded(layout),
        seconds=0.0,
        images_per_second=None,
        nothing_to_do=True,
    )


def _check(settings: Settings) -> _Checkpoint:
    """Looks at what the settings name, before anything is written or started."""
    data = weights.read(settings.checkpoint)
    model, classes = weights.load(settings.checkpoint, data=data)
    if settings.inference.output_stride is not None:
        model.set_output_stride(settings.inference.output_stride)
    gpus = settings.gpus_per_actor
    if gpus and not cluster.has_cluster() and torch.cuda.device_count() < math.ceil(gpus):
        raise ValueError(
            f"--gpus-per-actor {gpus:g}: this machine has {torch.cuda.device_count()} GPUs that "
            "torch can use; 0 runs on the CPU"
        )
    for prefix in filter(None, (settings.images, settings.labels)):
        _check_folder(prefix)
    return _Checkpoint(
        code_version=_code_version(),
        sha256=hashlib.sha256(data).hexdigest(),
        fingerprint=checkpoint_fingerprint(data),
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


def _progress(known: Plan, layout: RunLayout) -> Progress:
    done = sum(map(len, storage.list_pages(layout.images)))
    # shards are equal but for the last, or where bytes cut them: good enough for a display
    share = done / known.counts.shards if known.counts.shards else 0.0
    return Progress(images=known.counts.images, images_before=round(known.counts.images * share))


class _Run:
    """One driver's work on one run."""

    def __init__(
        self,
        settings: Settings,
        layout: RunLayout,
        known: Plan,
        checkpoint: _Checkpoint,
        watch: Watch,
        held: list[lease.Lease],
    ) -> None:
        self._settings = settings
        self._layout = layout
        self._plan = known
        self._checkpoint = checkpoint
        self._watch = watch
        self._held = held
        self._progress = _progress(known, layout)
        self._pool = _pool(settings)
        self._work = _work(settings, layout, known, self._pool)
        self._usage = Usage(layout, self._progress, self._pool.gpus)

    def to_its_end(self) -> Ended:
        try:
            return self._to_its_end()
        except BaseException:
            with contextlib.suppress(storage.StorageError):  # what ended it is said, not this
                self._usage.save()
            raise

    def _to_its_end(self) -> Ended:
        self._watch(self._plan, self._progress)
        rows = RowMaker(
            run_id=self._layout.run_id,
            model=self._plan.model,
            settings=self._plan.settings,
            classes=self._checkpoint.classes,
        )
        reconciler = Reconciler(self._work, self._pool, rows, self._count)
        self._progress.in_work = reconciler.photos_in_work
        for part in self._plan.parts:
            reconciler.complete(part)
        finish = Finish(self._layout, self._plan, self._checkpoint.classes)
        outcome = finish.outcome() if self._plan.counts.images else _NOTHING
        self._check_outcome(outcome)
        if self._plan.counts.images:
            finish.write_classes()
            finish.write_done()
        seconds = self._progress.seconds
        rate = self._progress.images_now / seconds if self._progress.images_now else None
        used = self._usage.total()
        finish.write_record(
            outcome,
            {
                **asdict(used),
                "price_per_gpu_hour": self._settings.price_per_gpu_hour,
                "cost": used.cost(self._settings.price_per_gpu_hour),
                "checkpoint": self._settings.checkpoint,
                "checkpoint_sha256": self._checkpoint.sha256,
                "code_version": self._checkpoint.code_version,
                "seconds": seconds,
                "images_per_second": rate,
            },
        )
        self._usage.forget()
        return Ended(plan=self._plan, outcome=outcome, seconds=seconds, images_per_second=rate)

    def _count(self, summary: Summary) -> None:
        """Counts a shard, tells who watches, and stops the run by the rules."""
        self._progress.add(summary)
        self._usage.save_sometimes()
        self._watch(self._plan, self._progress)
        if any(each.lost.is_set() for each in self._held):
            raise RunStoppedError("another driver took the run over")
        self._check_errors(self._progress.errors.total(), self._progress.errors.most_common(1))

    def _check_outcome(self, outcome: Outcome) -> None:
        if outcome.images != self._plan.counts.images:
            raise RunStoppedError(
                f"{outcome.images} rows for {self._plan.counts.images} planned photos below "
                f"{self._layout.images}: did something else write or delete there?"
            )
        self._check_errors(outcome.errors, outcome.errors_by_kind)

    def _check_errors(self, errors: int, kinds: Any) -> None:
        allowed = self._settings.max_error_fraction * self._plan.counts.images
        if errors > allowed:
            raise RunStoppedError(
                f"{errors} of {self._plan.counts.images} photos are errors (mostly "
                f"{kinds[0][0]}), over --max-error-fraction {self._settings.max_error_fraction:g}; "
                "what is done stays: a larger fraction ends this run, another --run-id begins anew"
            )


_NOTHING = Outcome(images=0, ok=0, errors=0, label_errors=0, errors_by_kind=())


def _pool(settings: Settings) -> Pool:
    """The actors asked for; without a word on CPUs they share those of this machine.

    On a cluster this machine says nothing about the others: there it is two each.
    """
    low, high = settings.actors
    shared = 2 if cluster.has_cluster() else max(1, len(os.sched_getaffinity(0)) // high)
    cpus = settings.cpus_per_actor or shared
    return Pool(
        min_actors=low,
        max_actors=high,
        cpus=cpus,
        gpus=settings.gpus_per_actor,
        max_wait_s=settings.max_wait,
        max_stall_s=settings.max_stall,
    )
