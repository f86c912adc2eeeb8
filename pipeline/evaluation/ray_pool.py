"""An evaluation spread over Ray's actors: every photo once, whoever looks at it.

Enters: what a `Looker` takes. Leaves: the sum of what the lookers saw. Photos go out in small
parts to whoever is free, so that a slow machine holds up nobody; a part counts when it is back, so
an actor that dies and starts again changes no count.
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

_PART_PHOTOS = 8
_DEATHS = 3  # of one actor, before the evaluation ends


class EvaluatorActor:
    """The actor. What is expected to go wrong is a value; what is raised is a bug."""

    def __init__(self) -> None:
        self._looker: Evaluator | None = None

    def ready(self) -> None:
        """Comes back when the actor lives."""

    def evaluate(
        self, work: EvaluatorSpec, how: EvalConfig, part: Sequence[int]
    ) -> EvalResult | SampleError | str:
        """What is seen of a part of the photos, or why it is not."""
        try:
            if self._looker is None:
                self._looker = Evaluator(work)
            return self._looker.evaluate(how, part)
        except SampleError as error:
            return error
        except (OSError, ValueError) as error:
            return f"a worker cannot go on: {error}"


class DistributedEvaluator:
    """So many actors with the checkpoint, for as many evaluations as it is entered for.

    Raises WorkersError where Ray does not answer.
    """

    def __init__(self, work: EvaluatorSpec, *, workers: int, gpus: float = 0.0) -> None:
        try:
            ray_connection.connect(workers=workers, cpus=work.cpus, gpus=gpus)
        except RunStoppedError as error:
            raise WorkersError(str(error)) from error
        self._work = work
        stage: Any = ray.remote(EvaluatorActor)
        options = stage.options(
            num_cpus=work.cpus,
            num_gpus=gpus,
            max_restarts=_DEATHS - 1,
            max_task_retries=_DEATHS - 1,
        )
        # with each call, not in the constructor: an actor that starts again may not find it there
        self._shared = ray.put(work)
        self.actors = [options.remote() for _ in range(workers)]

    def __enter__(self) -> DistributedEvaluator:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self.actors:
            ray.kill(actor)

    def evaluate(
        self, how: EvalConfig, indices: Sequence[int], tell: OnProgress | None = None
    ) -> EvalResult:
        """As `Looker.look`; `tell` hears how many photos came back. Raises WorkersError too."""
        parts = deque(
            indices[start : start + _PART_PHOTOS] for start in range(0, len(indices), _PART_PHOTOS)
        )
        total = EvalResult(
            evaluation=Evaluation.zeros(self._work.split.classes.num_classes), per_image={}
        )
        # parts go to actors that live: one that finds no place in the cluster keeps none waiting
        waiting: dict[Any, tuple[Any, Sequence[int]]] = {
            actor.ready.remote(): (actor, ()) for actor in self.actors
        }
        while total.evaluation.images < len(indices):
            [first], _ = ray.wait(list(waiting), num_returns=1)
            actor, part = waiting.pop(first)
            seen = self._came_back(first, part)
            if seen is not None:
                total += seen
                if tell is not None:
                    tell(seen.evaluation.images)
            if parts:
                part = parts.popleft()
                waiting[actor.evaluate.remote(self._shared, how, part)] = (actor, part)
        return total

    def _came_back(self, reference: Any, part: Sequence[int]) -> EvalResult | None:
        try:
            found: EvalResult | SampleError | str | None = ray.get(reference)
        except RayActorError as error:
            names = [self._work.split.pairs[index].image for index in part]
            last = f", last on a part that begins with {names[0]}" if names else ""
            raise WorkersError(
                f"a worker died {_DEATHS} times{last}; fewer workers, or smaller scales, need "
                "less memory"
            ) from error
        if isinstance(found, SampleError):
            raise found
        if isinstance(found, str):
            raise WorkersError(found)
        return found
