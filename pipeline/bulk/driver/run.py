"""A bulk run from its settings to its record: check, plan, waves, reconcile, finish.

Whatever stops a run leaves whole files behind and nothing else; the same command continues it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.bulk.driver import preflight, usage
from pipeline.bulk.driver.dry_run import dry_run
from pipeline.bulk.driver.estimate import Estimate
from pipeline.bulk.driver.finalize import Outcome, RunFinalizer, load_outcome
from pipeline.bulk.driver.preflight import (
    Checkpoint,
    build_pool,
    build_progress,
    build_worker_context,
)
from pipeline.bulk.driver.progress import Progress
from pipeline.bulk.driver.reconcile import Reconciler
from pipeline.bulk.driver.usage import UsageLog
from pipeline.bulk.planning import plan
from pipeline.bulk.planning.plan import Plan
from pipeline.bulk.settings import Settings
from pipeline.bulk.worker.rows import RowBuilder
from pipeline.bulk.worker.summary import ShardSummary
from pipeline.data import storage
from pipeline.results.layout import RunLayout, only_new_lease
from pipeline.runs import lease, ray_connection
from pipeline.runs.ray_connection import RunStoppedError

ProgressCallback = Callable[[Plan, Progress], None]
"""Is told how far the run is: once when it begins, and after every shard."""

ERRORS_ALWAYS_ALLOWED = 10
"""Errors that stop no run, however small: one broken photo of a night's three is over any fraction,
and an unfinished run is what every following night takes up first."""


@dataclass(frozen=True, kw_only=True)
class BulkResult:
    """How a run ended."""

    plan: Plan
    outcome: Outcome | None  # None after a dry run
    seconds: float
    images_per_second: float | None
    nothing_to_do: bool = False
    estimate: Estimate | None = None  # of a dry run
    no_estimate: str = ""  # why there is none


def run(settings: Settings, watch: ProgressCallback) -> BulkResult:
    """Does what the settings ask, or what is left of it.

    Raises ValueError or StorageError for what the settings name and cannot be used,
    lease.HeldError where another driver works on the run, RunStoppedError where it cannot go on.
    """
    checkpoint = preflight.preflight(settings)
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
    with contextlib.ExitStack() as leases:
        held = [
            leases.enter_context(lease.hold(uri, layout.run_id, within=layout.results))
            for uri in _leases(settings, layout, checkpoint)
        ]
        known = plan.load(layout) or plan.make(settings, layout, identity)
        plan.check_same(known, identity)
        if storage.exists(layout.record):  # by the driver that had the lease before
            return _finished_before(layout, known)
        return _Run(settings, layout, known, checkpoint, watch, held).to_its_end()


def _leases(settings: Settings, layout: RunLayout, checkpoint: Checkpoint) -> list[str]:
    """What a driver must hold: the run, and with --only-new all that is new to this model.

    A night that is still at work when the next begins has photos that no file tells of yet.
    """
    if not settings.only_new:
        return [layout.lease]
    work = settings.work(model=checkpoint.fingerprint)
    return [only_new_lease(layout.results, work), layout.lease]


def _finished_before(layout: RunLayout, known: Plan) -> BulkResult:
    """What a finished run says again; its driver may have died before it had tidied up."""
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
        settings: Settings,
        layout: RunLayout,
        known: Plan,
        checkpoint: Checkpoint,
        watch: ProgressCallback,
        held: list[lease.Lease],
    ) -> None:
        self._settings = settings
        self._layout = layout
        self._plan = known
        self._checkpoint = checkpoint
        self._watch = watch
        self._held = held
        self._progress = build_progress(known, layout)
        self._pool = build_pool(settings)
        self._work = build_worker_context(settings, layout, known, self._pool)
        self._usage = UsageLog(layout, self._progress, self._pool.gpus)

    def to_its_end(self) -> BulkResult:
        try:
            return self._to_its_end()
        except BaseException:
            with contextlib.suppress(storage.StorageError):  # what ended it is said, not this
                self._usage.save()
            raise

    def _to_its_end(self) -> BulkResult:
        self._watch(self._plan, self._progress)
        rows = RowBuilder(
            run_id=self._layout.run_id,
            model=self._plan.model,
            settings=self._plan.settings,
            classes=self._checkpoint.classes,
        )
        reconciler = Reconciler(self._work, self._pool, rows, self._count)
        self._progress.in_work = reconciler.photos_in_work
        for part in self._plan.parts:
            reconciler.complete(part)
        with RunFinalizer(self._layout, self._plan, self._checkpoint.classes) as finish:
            return self._finish(finish)

    def _finish(self, finish: RunFinalizer) -> BulkResult:
        outcome = finish.outcome()
        self._check_outcome(outcome)
        self._check_held()
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
        usage.delete(self._layout)
        return BulkResult(plan=self._plan, outcome=outcome, seconds=seconds, images_per_second=rate)

    def _count(self, summary: ShardSummary) -> None:
        """Counts a shard, tells who watches, and stops the run by the rules."""
        self._progress.add(summary)
        self._usage.save_sometimes()
        self._watch(self._plan, self._progress)
        self._check_held()
        self._check_errors(self._progress.errors.total(), self._progress.errors.most_common(1))

    def _check_held(self) -> None:
        if any(each.lost.is_set() for each in self._held):
            raise RunStoppedError("another driver took the run over")

    def _check_outcome(self, outcome: Outcome) -> None:
        if outcome.images != self._plan.counts.images:
            raise RunStoppedError(
                f"{outcome.images} rows for {self._plan.counts.images} planned photos below "
                f"{self._layout.images}: did something else write or delete there?"
            )
        self._check_errors(outcome.errors, outcome.errors_by_kind)

    def _check_errors(self, errors: int, kinds: Any) -> None:
        fraction = self._settings.max_error_fraction
        if errors > max(ERRORS_ALWAYS_ALLOWED, fraction * self._plan.counts.images):
            raise RunStoppedError(
                f"{errors} of {self._plan.counts.images} photos are errors (mostly "
                f"{kinds[0][0]}), over --max-error-fraction {fraction:g}; "
                "what is done stays: a larger fraction ends this run, another --run-id begins anew"
            )
