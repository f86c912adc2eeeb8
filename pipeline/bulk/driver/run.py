"""A bulk run from its settings to its record: preflight, plan, batches of shards, finalization.

An interrupted run leaves only complete files; rerun the same command to resume.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from pipeline.bulk.driver import usage
from pipeline.bulk.driver.dry_run import dry_run
from pipeline.bulk.driver.estimate import Estimate
from pipeline.bulk.driver.finalize import Outcome, RunFinalizer, load_outcome
from pipeline.bulk.driver.preflight import (
    Checkpoint,
    build_pool,
    build_progress,
    build_worker_context,
    preflight,
)
from pipeline.bulk.driver.progress import Progress
from pipeline.bulk.driver.reconcile import Reconciler
from pipeline.bulk.driver.usage import UsageLog
from pipeline.bulk.planning import plan
from pipeline.bulk.planning.plan import Plan
from pipeline.bulk.settings import BulkSettings
from pipeline.bulk.worker.rows import RowBuilder
from pipeline.bulk.worker.summary import ShardSummary
from pipeline.data import storage
from pipeline.results.layout import RunLayout, only_new_lease
from pipeline.runs import lease, ray_connection
from pipeline.runs.ray_connection import RunStoppedError

ProgressCallback = Callable[[Plan, Progress], None]
"""Called when the run starts, and after every shard."""

ERRORS_ALWAYS_ALLOWED = 10
"""Errors that never abort a run, so that one corrupt image in a three-image nightly run does not
exceed the error fraction: an unfinished run has to be resumed before the next one."""


@dataclass(frozen=True, kw_only=True)
class BulkResult:
    """The result of a bulk run."""

    plan: Plan
    outcome: Outcome | None  # None after a dry run
    seconds: float
    images_per_second: float | None
    nothing_to_do: bool = False
    estimate: Estimate | None = None  # of a dry run
    no_estimate: str = ""  # why a dry run has no estimate


def run(settings: BulkSettings, watch: ProgressCallback) -> BulkResult:
    """Start a run, or resume it; `watch` is called with its progress.

    Raises ValueError or StorageError if the settings name something that cannot be used,
    lease.HeldError if another driver works on the run, and RunStoppedError if it cannot continue.
    """
    checkpoint = preflight(settings)
    identity = settings.identity(model=checkpoint.fingerprint)
    layout = RunLayout(results=settings.results, run_id=plan.run_id_of(settings, identity))
    known = plan.load(layout)
    if known is not None:
        plan.check_same(known, identity)
    if settings.dry_run:
        dry = dry_run(settings, layout, identity, known, watch)
        return BulkResult(
            plan=dry.plan,
            outcome=None,
            seconds=0.0,
            images_per_second=None,
            estimate=dry.estimate,
            no_estimate=dry.no_estimate,
        )
    if known is not None and storage.exists(layout.record):
        for uri in _leases(settings, layout, checkpoint):
            lease.clear_stale(uri, within=layout.results)
        return _finished_before(layout, known)
    if ray_connection.has_cluster():
        build_pool(settings).connect()  # before anything is written
    with contextlib.ExitStack() as stack:
        leases = [
            stack.enter_context(lease.hold(uri, layout.run_id, within=layout.results))
            for uri in _leases(settings, layout, checkpoint)
        ]
        known = plan.load(layout) or plan.make(settings, layout, identity)
        plan.check_same(known, identity)
        if storage.exists(layout.record):  # written by the driver that held the lease before
            return _finished_before(layout, known)
        return _Run(settings, layout, known, checkpoint, watch, leases).execute()


def _leases(settings: BulkSettings, layout: RunLayout, checkpoint: Checkpoint) -> list[str]:
    """Return the leases that a driver must hold: the run's, and with --only-new the model's.

    Without the second, a nightly run would process the images of another one that is still running.
    """
    if not settings.only_new:
        return [layout.lease]
    work = settings.work_fingerprint(model=checkpoint.fingerprint)
    return [only_new_lease(layout.results, work), layout.lease]


def _finished_before(layout: RunLayout, known: Plan) -> BulkResult:
    """Return the result of a finished run, and clean up what its driver may have left."""
    with contextlib.suppress(storage.StorageError):
        usage.delete(layout)
    return BulkResult(
        plan=known,
        outcome=load_outcome(layout),
        seconds=0.0,
        images_per_second=None,
        nothing_to_do=True,
    )


class _Run:
    """One driver's work on one run."""

    def __init__(
        self,
        settings: BulkSettings,
        layout: RunLayout,
        known: Plan,
        checkpoint: Checkpoint,
        watch: ProgressCallback,
        leases: list[lease.Lease],
    ) -> None:
        self._settings = settings
        self._layout = layout
        self._plan = known
        self._checkpoint = checkpoint
        self._watch = watch
        self._leases = leases
        self._progress = build_progress(known, layout)
        self._pool = build_pool(settings)
        self._context = build_worker_context(settings, layout, known, self._pool)
        self._usage = UsageLog(layout, self._progress, self._pool.gpus)

    def execute(self) -> BulkResult:
        """Process what is missing, and finalize the run. The resources used are saved always."""
        try:
            return self._execute()
        except BaseException:
            with contextlib.suppress(storage.StorageError):  # the first error is the one to report
                self._usage.save()
            raise

    def _execute(self) -> BulkResult:
        self._watch(self._plan, self._progress)
        rows = RowBuilder(
            run_id=self._layout.run_id,
            model=self._plan.model,
            settings=self._plan.settings,
            classes=self._checkpoint.classes,
        )
        reconciler = Reconciler(self._context, self._pool, rows, self._count)
        self._progress.images_in_work = reconciler.images_in_work
        for part in self._plan.parts:
            reconciler.complete(part)
        with RunFinalizer(self._layout, self._plan, self._checkpoint.classes) as finalizer:
            return self._finalize(finalizer)

    def _finalize(self, finalizer: RunFinalizer) -> BulkResult:
        outcome = finalizer.outcome()
        self._check_outcome(outcome)
        self._check_leases()
        if self._plan.counts.images:
            finalizer.write_classes()
            finalizer.write_done()
        seconds = self._progress.seconds
        rate = self._progress.images_now / seconds if self._progress.images_now else None
        used = self._usage.total()
        finalizer.write_record(
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
        usage.delete(self._layout)
        return BulkResult(plan=self._plan, outcome=outcome, seconds=seconds, images_per_second=rate)

    def _count(self, summary: ShardSummary) -> None:
        """Count a finished shard, report progress, and abort the run if it must not continue."""
        self._progress.add(summary)
        self._usage.save_if_due()
        self._watch(self._plan, self._progress)
        self._check_leases()
        self._check_errors(self._progress.errors.total(), self._progress.errors.most_common(1))

    def _check_leases(self) -> None:
        if any(each.lost.is_set() for each in self._leases):
            raise RunStoppedError("another driver has taken over the run")

    def _check_outcome(self, outcome: Outcome) -> None:
        if outcome.images != self._plan.counts.images:
            raise RunStoppedError(
                f"{outcome.images} rows for {self._plan.counts.images} planned images under "
                f"{self._layout.images}: did another program write or delete files there?"
            )
        self._check_errors(outcome.errors, outcome.errors_by_kind)

    def _check_errors(self, errors: int, kinds: Sequence[tuple[str, int]]) -> None:
        fraction = self._settings.max_error_fraction
        if errors > max(ERRORS_ALWAYS_ALLOWED, fraction * self._plan.counts.images):
            raise RunStoppedError(
                f"{errors} of {self._plan.counts.images} images are errors (mostly "
                f"{kinds[0][0]}), over --max-error-fraction {fraction:g}; finished shards are "
                "kept: raise --max-error-fraction to complete this run, or pass a new --run-id to "
                "start over"
            )
