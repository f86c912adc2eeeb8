"""An evaluator: one process that loads a checkpoint once and evaluates it in several ways.

A plain class without Ray: `ray_pool` runs it in actors, a single process calls it directly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pipeline.data import storage
from pipeline.data.datasets import Split
from pipeline.evaluation.bootstrap import image_counts
from pipeline.evaluation.evaluate import Evaluation, evaluate
from pipeline.metrics import Int64Array
from pipeline.model import optimize, weights
from pipeline.model.config import MAX_SCALE

OnProgress = Callable[[int], None]
"""Called with the number of images evaluated since the last call."""


class WorkersError(RuntimeError):
    """The evaluator processes cannot continue; the message is one line."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How images are evaluated: scales to average over, flips, and the output stride.

    An `output_stride` of None is the checkpoint's own. Raises ValueError on an invalid scale.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    output_stride: int | None = None

    def __post_init__(self) -> None:
        if not self.scales or not all(0 < each <= MAX_SCALE for each in self.scales):
            given = " ".join(f"{each:g}" for each in self.scales) or "without a value"
            raise ValueError(
                f"--scales {given}: give one or more, each over 0 and at most {MAX_SCALE:g}"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluatorSpec:
    """What every process of an evaluation is given.

    `digest` is the checkpoint's sha256; `cpus` is the number of torch's threads.
    """

    checkpoint: str
    digest: str
    split: Split
    cpus: int
    gpu: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class EvalResult:
    """An evaluation, and tp, fp and fn (3, k) int64 of each image, by its index in the split."""

    evaluation: Evaluation
    per_image: dict[int, Int64Array]

    def __add__(self, other: EvalResult) -> EvalResult:
        return EvalResult(
            evaluation=self.evaluation + other.evaluation,
            per_image=self.per_image | other.per_image,
        )


class Evaluator:
    """The checkpoint, loaded and optimized for inference.

    Raises ValueError if the file was replaced or is not a checkpoint, StorageError if it cannot be
    read.
    """

    def __init__(self, spec: EvaluatorSpec) -> None:
        data = weights.read(spec.checkpoint)
        if weights.checkpoint_sha256(data) != spec.digest:
            raise ValueError(f"{spec.checkpoint} was replaced during the evaluation; run it again")
        torch.set_num_threads(spec.cpus)
        model, _ = weights.load(spec.checkpoint, data=data)
        # as in a bulk run, so that both compute the same
        self._model = optimize.optimize_for_inference(model, "cuda" if spec.gpu else "cpu")
        self._split = spec.split

    def evaluate(
        self, config: EvalConfig, indices: Sequence[int], on_progress: OnProgress | None = None
    ) -> EvalResult:
        """Evaluate the checkpoint on these images of the split. Raises as `evaluate` does."""
        per_image: dict[int, Int64Array] = {}

        def on_image(index: int, confusion: Int64Array) -> None:
            per_image[index] = image_counts(confusion)
            if on_progress is not None:
                on_progress(1)

        evaluation = evaluate(
            self._model,
            self._split,
            read=self._read,
            indices=indices,
            scales=config.scales,
            flip=config.flip,
            output_stride=config.output_stride,
            on_image=on_image,
        )
        return EvalResult(evaluation=evaluation, per_image=per_image)

    def _read(self, uri: str) -> bytes:
        """Return the object as it was when the split was opened."""
        return storage.read(uri, self._split.objects[uri].etag)
