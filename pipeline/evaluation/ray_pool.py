"""An evaluation distributed over Ray actors, each image exactly once.

Images are assigned in small parts to idle actors, so that a slow machine does not hold up the
others; a part is counted when its result is back, so an actor that crashes and restarts does not
change the counts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError

from pipeline.data.samples import SampleError
from pipeline.evaluation.evaluate import Evaluation
from pipeline.evaluation.evaluator import (
    EvalConfig,
    EvalResult,
    Evaluator,
    EvaluatorSpec,
    OnProgress,
    WorkersError,
)
from pipeline.runs import ray_connection
from pipeline.runs.ray_connection import RunStoppedError

_PART_IMAGES = 8
_MAX_CRASHES = 3  # of one actor, before the evaluation fails


class EvaluatorActor:
    """The actor. Expected errors are returned; an exception is a bug."""

    def __init__(self) -> None:
        self._evaluator: Evaluator | None = None

    def ready(self) -> None:
        """Return once the actor has started."""

    def evaluate(
        self, spec: EvaluatorSpec, config: EvalConfig, part: Sequence[int]
    ) -> EvalResult | SampleError | str:
        """Return the result on a part of the images, or the error."""
        try:
            if self._evaluator is None:
                self._evaluator = Evaluator(spec)
            return self._evaluator.evaluate(config, part)
        except SampleError as error:
            return error
        except (OSError, ValueError) as error:
            return f"a worker failed: {error}"


class DistributedEvaluator:
    """`workers` actors with the checkpoint, for any number of evaluations within a `with` block.

    Raises WorkersError if Ray does not respond.
    """

    def __init__(self, spec: EvaluatorSpec, *, workers: int, gpus: float = 0.0) -> None:
        try:
            ray_connection.connect(workers=workers, cpus=spec.cpus, gpus=gpus)
        except RunStoppedError as error:
            raise WorkersError(str(error)) from error
        self._spec = spec
        actor: Any = ray.remote(EvaluatorActor)
        options = actor.options(
            num_cpus=spec.cpus,
            num_gpus=gpus,
            max_restarts=_MAX_CRASHES - 1,
            max_task_retries=_MAX_CRASHES - 1,
        )
        # passed with each call: a restarted actor may not find a constructor's argument any more
        self._spec_ref = ray.put(spec)
        self.actors = [options.remote() for _ in range(workers)]

    def __enter__(self) -> DistributedEvaluator:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self.actors:
            ray.kill(actor)

    def evaluate(
        self, config: EvalConfig, indices: Sequence[int], on_progress: OnProgress | None = None
    ) -> EvalResult:
        """Do what `Evaluator.evaluate` does. Raises WorkersError if a worker keeps crashing."""
        parts = deque(
            indices[start : start + _PART_IMAGES] for start in range(0, len(indices), _PART_IMAGES)
        )
        num_classes = self._spec.split.classes.num_classes
        total = EvalResult(evaluation=Evaluation.zeros(num_classes), per_image={})
        # only actors that have started get parts: one that is not scheduled holds up none
        waiting: dict[Any, tuple[Any, Sequence[int]]] = {
            actor.ready.remote(): (actor, ()) for actor in self.actors
        }
        while total.evaluation.images < len(indices):
            [first], _ = ray.wait(list(waiting), num_returns=1)
            actor, part = waiting.pop(first)
            found = self._result(first, part)
            if found is not None:
                total += found
                if on_progress is not None:
                    on_progress(found.evaluation.images)
            if parts:
                part = parts.popleft()
                waiting[actor.evaluate.remote(self._spec_ref, config, part)] = (actor, part)
        return total

    def _result(self, reference: Any, part: Sequence[int]) -> EvalResult | None:
        try:
            found: EvalResult | SampleError | str | None = ray.get(reference)
        except RayActorError as error:
            names = [self._spec.split.pairs[index].image for index in part]
            last = f", last on a part that begins with {names[0]}" if names else ""
            raise WorkersError(
                f"a worker crashed {_MAX_CRASHES} times{last}; if memory is short, give fewer "
                "workers or smaller scales"
            ) from error
        if isinstance(found, SampleError):
            raise found
        if isinstance(found, str):
            raise WorkersError(found)
        return found
