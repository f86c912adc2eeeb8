"""Score a checkpoint on labeled images: IoU by class, mIoU, pixel accuracy.

    python jobs/evaluate.py --checkpoint FILE --data s3://voc --layout voc --split val

Exits 0 with the scores, 1 if an image, a label or a worker fails (a score over fewer images would
mislead), 2 on invalid arguments. The last line is machine-readable: `key=value` pairs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipeline.bulk.driver.progress import Progress
from pipeline.bulk.worker.summary import ShardSummary
from pipeline.cli.arguments import parse
from pipeline.cli.evaluation_plan import EvaluateArguments, EvaluationPlan, plan_evaluation
from pipeline.cli.exit import hard_exit, last_line, print_line, run_job
from pipeline.cli.progress import Display
from pipeline.cli.tables import Scores, class_table, mean_table
from pipeline.data.samples import SampleError
from pipeline.evaluation.evaluator import Evaluator, EvaluatorSpec, WorkersError

if TYPE_CHECKING:
    from pipeline.evaluation.ray_pool import DistributedEvaluator


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job with the command line `argv` and return its exit code."""
    return run_job(
        "evaluate",
        lambda: _evaluate(parse(EvaluateArguments, argv, description=__doc__)),
        expected=(OSError, SampleError, WorkersError),
        interrupted="interrupted",
    )


def _evaluate(arguments: EvaluateArguments) -> str:
    started = time.monotonic()
    plan = plan_evaluation(arguments)
    rows = _scores(arguments, plan)
    print_line("\n".join(_report(arguments, plan, rows)))
    return last_line("evaluate finished", _facts(arguments, rows, time.monotonic() - started))


def _scores(arguments: EvaluateArguments, plan: EvaluationPlan) -> list[Scores]:
    """Evaluate with every configuration of the plan. Raises as the evaluators' `evaluate` does."""
    rows = []
    with Display(count_errors=False) as display, _evaluator(arguments, plan.work) as evaluator:
        for name, config in plan.configs.items():
            progress = Progress(images=len(plan.indices), images_before=0)

            def report(images: int, name: str = name, progress: Progress = progress) -> None:
                progress.add(ShardSummary(shard=0, images=images))
                display(progress, name)

            result = evaluator.evaluate(config, plan.indices, report)
            rows.append(Scores.from_result(name, result, plan.over))
    return rows


@contextmanager
def _evaluator(
    arguments: EvaluateArguments, work: EvaluatorSpec
) -> Iterator[Evaluator | DistributedEvaluator]:
    """Evaluate in this process, or on Ray's actors."""
    if arguments.workers == 1:
        yield Evaluator(work)
        return
    from pipeline.evaluation.ray_pool import DistributedEvaluator
    from pipeline.runs import ray_connection  # Ray: not needed by a single process

    with (
        ray_connection.disconnect_on_exit(),
        DistributedEvaluator(
            work, workers=arguments.workers, gpus=arguments.gpus_per_worker
        ) as pool,
    ):
        yield pool


def _report(
    arguments: EvaluateArguments, plan: EvaluationPlan, rows: Sequence[Scores]
) -> list[str]:
    split = plan.work.split
    of = f" (of {len(split)})" if len(plan.indices) < len(split) else ""
    lines = [f"{arguments.checkpoint} on {len(plan.indices)} images{of} of {split.name}", ""]
    lines += [*class_table(rows, split.classes), "", *mean_table(rows, arguments.over)]
    if any(None in row.ious for row in rows):
        lines.append("-: in no label and no mask; left out of every mean")
    if arguments.over:
        lines.append(f"over {len(plan.over)}: {', '.join(arguments.over)}")
    return [*lines, ""]


def _facts(
    arguments: EvaluateArguments, rows: Sequence[Scores], seconds: float
) -> dict[str, object]:
    """Return the values of the last line; in a table the name of its row is part of the key."""
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
