"""Segments every photo below a URI: masks and per-class IoU as Parquet.

    python jobs/segment.py --images s3://photos/2024 --results s3://masks --checkpoint FILE

Exits 0 when every planned photo has its row, 1 when the run stopped (the same command continues
it), 2 on arguments that cannot be right. The last line is for log readers: `key=value` pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.bulk.driver.progress import Progress
from pipeline.bulk.driver.run import BulkResult, run
from pipeline.bulk.planning.plan import Plan
from pipeline.bulk.settings import BulkSettings
from pipeline.cli.arguments import parse
from pipeline.cli.exit import hard_exit, last_line, run_job
from pipeline.cli.progress import Display, duration, size
from pipeline.data.storage import StorageError
from pipeline.results import files
from pipeline.runs import lease, ray_connection
from pipeline.runs.ray_connection import RunStoppedError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job with the command line `argv`; its exit code."""
    return run_job(
        "segment",
        lambda: _segment(parse(BulkSettings, argv, description=__doc__)),
        expected=(StorageError, RunStoppedError, lease.HeldError),
        interrupted="interrupted; the same command continues the run",
        on_signal=files.interrupt_queries,
    )


def _segment(settings: BulkSettings) -> str:
    with ray_connection.disconnect_on_exit(), Display() as display:
        ended = run(settings, _Announced(settings, display))
    return _last_line(settings, ended)


class _Announced:
    """Says once what the run will do, then shows how far it is."""

    def __init__(self, settings: BulkSettings, display: Display) -> None:
        self._settings = settings
        self._display = display
        self._said = False

    def __call__(self, plan: Plan, progress: Progress) -> None:
        if not self._said:
            self._said = True
            print("\n".join(_plan_lines(plan, progress)), flush=True)
        if not self._settings.dry_run and plan.counts.images:
            self._display(progress)


def _plan_lines(plan: Plan, progress: Progress) -> list[str]:
    counts = plan.counts
    lines = [
        f"run {plan.run_id}: {counts.images} images ({size(counts.bytes)}) in "
        f"{counts.shards} shards"
    ]
    if plan.identity["labels"] is not None:
        lines.append(f"  labels: {counts.labels} of the images have one")
    if plan.identity["only_new"]:
        lines.append(f"  done by earlier runs: {counts.done_before} images")
        lines += _otherwise_lines(plan)
    if progress.images_before:
        lines.append(f"  done already: about {progress.images_before} images")
    if inventory := plan.identity.get("inventory"):
        lines.append(f"  from the inventory {inventory}, not a listing")
    if counts.outside:
        lines.append(
            f"  left out: {counts.outside} objects of the inventory that are not (or not any "
            f"more) below {plan.identity['images']}"
        )
    if counts.left_out:
        lines.append(f"  left out: {counts.left_out} objects that --include does not take")
    return lines


def _otherwise_lines(plan: Plan) -> list[str]:
    """What becomes of photos that only another model or other settings have done."""
    if not (done := plan.counts.done_otherwise):
        return []
    answer = {
        "reprocess": "they are done again",
        "new-only": "they are left out",
        None: "a run needs --on-model-change reprocess or new-only",
    }[plan.identity.get("model_changed")]
    everything = "" if plan.counts.done_before else "everything is new: "
    return [f"  {everything}another model or other settings have done {done} images; {answer}"]


def _estimate_lines(settings: BulkSettings, ended: BulkResult) -> list[str]:
    """What the run would take, on what that was measured, and where it does not hold."""
    if (found := ended.estimate) is None:
        return [f"  no estimate: {ended.no_estimate}"] if ended.no_estimate else []
    pool = found.pool
    each = f"{pool.cpus} CPUs" + (f" and {pool.gpus:g} GPUs" if pool.gpus else "")
    hours = f"{found.cpu_hours:.2f} CPU hours"
    if pool.gpus:
        hours = f"{found.gpu_hours:.2f} GPU hours"
        if settings.price_per_gpu_hour:
            hours += f" (cost {found.gpu_hours * settings.price_per_gpu_hour:.2f})"
    return [
        f"  estimate: {duration(found.seconds)} on {pool.max_actors} actors of {each}, {hours}, "
        f"{size(found.bytes_written)} written",
        f"    by {found.sampled} photos ({found.errors} errors) that took "
        f"{found.seconds_per_image:.2f} s each on {found.device}, load {found.load:.1f}",
        "    without starting (about half a minute, a cluster's growing apart); other CPUs and "
        "GPUs, a storage that is slow for many, and a busy machine differ",
    ]


def _last_line(settings: BulkSettings, ended: BulkResult) -> str:
    facts: dict[str, object] = {"run": ended.plan.run_id, "images": ended.plan.counts.images}
    if ended.outcome is not None:
        facts |= {"ok": ended.outcome.ok, "errors": ended.outcome.errors}
        facts |= {"label_errors": ended.outcome.label_errors}
    facts |= {"shards": ended.plan.counts.shards, "seconds": f"{ended.seconds:.1f}"}
    if ended.images_per_second is not None:
        facts["images_per_second"] = f"{ended.images_per_second:.2f}"
    if ended.plan.identity["only_new"]:
        facts["done_before"] = ended.plan.counts.done_before
    if ended.nothing_to_do:
        print(f"run {ended.plan.run_id} was finished before: there is nothing to do")
    elif ended.plan.identity["only_new"] and not ended.plan.counts.images:
        print("nothing is new: earlier runs have done every photo")
    if settings.dry_run:
        print("".join(f"{line}\n" for line in _estimate_lines(settings, ended)), end="")
    if ended.estimate is not None:
        facts |= {
            "estimated_seconds": f"{ended.estimate.seconds:.0f}",
            "estimated_cpu_hours": f"{ended.estimate.cpu_hours:.3f}",
            "estimated_gpu_hours": f"{ended.estimate.gpu_hours:.3f}",
            "estimated_bytes_written": ended.estimate.bytes_written,
        }
    state = "planned" if settings.dry_run else "finished"
    facts["results"] = settings.results
    return last_line(f"segment {state}", facts)


if __name__ == "__main__":
    hard_exit(main())
