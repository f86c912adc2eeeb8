"""Segment every image below a URI; masks and per-class IoU are written as Parquet.

    python jobs/segment.py --images s3://images/2024 --results s3://masks --checkpoint FILE

Exits 0 if every planned image has a row, 1 if the run stopped early (the same command continues
it), 2 on invalid arguments. The last line is machine-readable: `key=value` pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.bulk.driver.progress import Progress
from pipeline.bulk.driver.run import BulkResult, run
from pipeline.bulk.planning.plan import Plan
from pipeline.bulk.settings import BulkSettings
from pipeline.cli.arguments import parse
from pipeline.cli.exit import hard_exit, last_line, print_line, run_job
from pipeline.cli.progress import Display, duration, size
from pipeline.data.storage import StorageError
from pipeline.results import files
from pipeline.runs import lease, ray_connection
from pipeline.runs.ray_connection import RunStoppedError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job with the command line `argv` and return its exit code."""
    return run_job(
        "segment",
        lambda: _segment(parse(BulkSettings, argv, description=__doc__)),
        expected=(StorageError, RunStoppedError, lease.HeldError),
        interrupted="interrupted; the same command resumes the run",
        on_signal=files.interrupt_queries,
    )


def _segment(settings: BulkSettings) -> str:
    with ray_connection.disconnect_on_exit(), Display() as display:
        ended = run(settings, _PlanAndProgress(settings, display))
    return _last_line(settings, ended)


class _PlanAndProgress:
    """Progress callback: prints the plan once, then displays the progress."""

    def __init__(self, settings: BulkSettings, display: Display) -> None:
        self._settings = settings
        self._display = display
        self._printed = False

    def __call__(self, plan: Plan, progress: Progress) -> None:
        if not self._printed:
            self._printed = True
            print_line("\n".join(_plan_lines(plan, progress)))
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
        lines += _other_model_lines(plan)
    if progress.images_before:
        lines.append(f"  already done: about {progress.images_before} images")
    if inventory := plan.identity.get("inventory"):
        lines.append(f"  from the inventory {inventory}, not a listing")
    if counts.outside:
        lines.append(
            f"  left out: {counts.outside} objects of the inventory that are not (or no longer) "
            f"below {plan.identity['images']}"
        )
    if counts.left_out:
        lines.append(f"  left out: {counts.left_out} objects that --include does not match")
    return lines


def _other_model_lines(plan: Plan) -> list[str]:
    """Say what happens to images that only another model or other settings have processed."""
    if not (done := plan.counts.done_otherwise):
        return []
    answer = {
        "reprocess": "they are processed again",
        "new-only": "they are left out",
        None: "a run needs --on-model-change reprocess or new-only",
    }[plan.identity.get("model_changed")]
    everything = "" if plan.counts.done_before else "everything is new: "
    return [f"  {everything}another model or other settings processed {done} images; {answer}"]


def _estimate_lines(settings: BulkSettings, ended: BulkResult) -> list[str]:
    """Describe the estimate: its figures, its basis and its limits."""
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
        f"    measured on {found.sampled} images ({found.errors} errors): "
        f"{found.seconds_per_image:.2f} s each on {found.device}, load {found.load:.1f}",
        "    not included: start-up (half a minute) and scaling up a cluster; other CPUs, GPUs, "
        "busy machines and storage under load differ",
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
        print_line(f"run {ended.plan.run_id} is already finished; nothing to do")
    elif ended.plan.identity["only_new"] and not ended.plan.counts.images:
        print_line("nothing is new: earlier runs processed every image")
    if settings.dry_run and (lines := _estimate_lines(settings, ended)):
        print_line("\n".join(lines))
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
