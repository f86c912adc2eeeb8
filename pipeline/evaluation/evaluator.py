"""One process that evaluates: a checkpoint, loaded once, that looks at photos in several ways.

A plain class without Ray: what `spread` runs on many machines, and what one process calls itself.
Enters: which photos, and how to look at them. Leaves: an evaluation, and the counts of each photo,
from which an interval is drawn.
"""

from __future__ import annotations

import hashlib
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


class WorkersError(RuntimeError):
    """The processes that look cannot go on; the message is one line."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How photos are looked at: averaged over `scales` and mirrored copies, at `output_stride`.

    None is the checkpoint's own stride. Raises ValueError on scales that no photo can have.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    output_stride: int | None = None

    def __post_init__(self) -> None:
        if not self.scales or not all(0 < each <= MAX_SCALE for each in self.scales):
            given = " ".join(f"{each:g}" for each in self.scales) or "none"
            raise ValueError(
                f"scales are {given}; give one or more over 0 and at most {MAX_SCALE:g}"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluatorSpec:
    """What every process of an evaluation shares.

    `digest` is what `digest_of` says of the checkpoint; `cpus` are torch's threads.
    """

    checkpoint: str
    digest: str
    split: Split
    cpus: int
    gpu: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class EvalResult:
    """An evaluation, and tp, fp and fn (3, k) int64 of each photo, by its index in the split."""

    evaluation: Evaluation
    per_image: dict[int, Int64Array]

    def __add__(self, other: EvalResult) -> EvalResult:
        return EvalResult(
            evaluation=self.evaluation + other.evaluation,
            per_image=self.per_image | other.per_image,
        )


class Evaluator:
    """The checkpoint, ready. Raises ValueError where it was replaced or is none, StorageError."""

    def __init__(self, work: EvaluatorSpec) -> None:
        data = weights.read(work.checkpoint)
        if digest_of(data) != work.digest:
            raise ValueError(f"{work.checkpoint} was replaced meanwhile; evaluate it again")
        torch.set_num_threads(work.cpus)
        model, _ = weights.load(work.checkpoint, data=data)
        # as a bulk run does it, so that both compute the same
        self._model = optimize.prepare(model, "cuda" if work.gpu else "cpu")
        self._split = work.split

    def evaluate(
        self, how: EvalConfig, indices: Sequence[int], tell: OnProgress | None = None
    ) -> EvalResult:
        """What the checkpoint makes of these photos of the split; `tell` hears of each: 1.

        Raises as `evaluate` does.
        """
        per_image: dict[int, Int64Array] = {}

        def note(index: int, confusion: Int64Array) -> None:
            per_image[index] = image_counts(confusion)
            if tell is not None:
                tell(1)

        evaluation = evaluate(
            self._model,
            self._split,
            read=self._read,
            indices=indices,
            scales=how.scales,
            flip=how.flip,
            output_stride=how.output_stride,
            on_image=note,
        )
        return EvalResult(evaluation=evaluation, per_image=per_image)

    def _read(self, uri: str) -> bytes:
        """The object as it was when the split was opened."""
        return storage.read(uri, self._split.objects[uri].etag)


def digest_of(data: bytes) -> str:
    """The checkpoint's sha256, as hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()
