"""Scores a checkpoint on photos with labels: IoU by class, mIoU, pixel accuracy.

    python jobs/evaluate.py --checkpoint FILE --data s3://voc --layout voc --split val

Exits 0 with the scores, 1 when a photo, a label or a worker fails (a score over fewer photos is no
score), 2 on arguments that cannot be right. The last line is for log readers: `key=value` pairs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipeline.bulk.driver.progress import Progress
from pipeline.bulk.worker.summary import ShardSummary
from pipeline.cli.arguments import parse
from pipeline.cli.evaluation_plan import Arguments, Plan, plan_of
from pipeline.cli.exit import hard_exit, last_line, run_job
from pipeline.cli.progress import Display
from pipeline.cli.tables import Scores, class_table, mean_table
from pipeline.data.samples import SampleError
from pipeline.evaluation.evaluator import Evaluator, EvaluatorSpec, WorkersError

if TYPE_CHECKING:
    from pipeline.evaluation.ray_pool import DistributedEvaluator


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job with the command line `argv`; its exit code."""
    return run_job(
        "evaluate",
        lambda: _evaluate(parse(Arguments, argv, description=__doc__)),
        expected=(OSError, SampleError, WorkersError),
        interrupted="interrupted",
    )


def _evaluate(arguments: Arguments) -> str:
    started = time.monotonic()
    plan = plan_of(arguments)
    rows = _scores(arguments, plan)
    print("\n".join(_report(arguments, plan, rows)))
    return last_line("evaluate finished", _facts(arguments, rows, time.monotonic() - started))


def _scores(arguments: Arguments, plan: Plan) -> list[Scores]:
    """Looks at the photos in every way. Raises as the evaluators' `evaluate` does."""
    rows = []
    with Display(count_errors=False) as display, _lookers(arguments, plan.work) as lookers:
        for name, look in plan.looks.items():
            progress = Progress(images=len(plan.indices), images_before=0)

            def tell(images: int, name: str = name, progress: Progress = progress) -> None:
                progress.add(ShardSummary(shard=0, images=images))
                display(progress, name)

            seen = lookers.evaluate(look, plan.indices, tell)
            rows.append(Scores.of(name, seen, plan.over))
    return rows


@contextmanager
def _lookers(
    arguments: Arguments, work: EvaluatorSpec
) -> Iterator[Evaluator | DistributedEvaluator]:
    """Who looks: this process, or Ray's actors."""
    if arguments.workers == 1:
        yield Evaluator(work)
        return
    from pipeline.evaluation.ray_pool import DistributedEvaluator
    from pipeline.runs import ray_connection  # Ray, which one process does not need

    with (
        ray_connection.disconnect_on_exit(),
        DistributedEvaluator(
            work, workers=arguments.workers, gpus=arguments.gpus_per_worker
        ) as spread,
    ):
        yield spread


def _report(arguments: Arguments, plan: Plan, rows: Sequence[Scores]) -> list[str]:
    split = plan.work.split
    of = f" (of {len(split)})" if len(plan.indices) < len(split) else ""
    lines = [f"{arguments.checkpoint} on {len(plan.indices)} photos{of} of {split.name}", ""]
    lines += [*class_table(rows, split.classes), "", *mean_table(rows, arguments.over)]
    if any(None in row.ious for row in rows):
        lines.append("-: neither in a label nor in a mask, and in no mean")
    if arguments.over:
        lines.append(f"over {len(plan.over)}: {', '.join(arguments.over)}")
    return [*lines, ""]


def _facts(arguments: Arguments, rows: Sequence[Scores], seconds: float) -> dict[str, object]:
    """The last line's: one evaluation's means as they are, those of a table with its row's name."""
    facts: dict[str, object] = {"images": rows[0].images}
    for row in rows:
        words = row.name.lower().replace("+ ", "").split()
        suffix = "_" + "_".join(words) if arguments.table else ""
        facts |= {f"{name}{suffix}": value for name, value in row.facts().items()}
    return facts | {
        "seconds": f"{seconds:.1f}",
        "checkpoint": arguments.checkpoint,
        "data": arguments.data,
        "split": arguments.split,
    }


if __name__ == "__main__":
    hard_exit(main())
