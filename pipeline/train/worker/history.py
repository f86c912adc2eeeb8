"""The history of a training run: its steps and its scores on val.

It is stored as JSON in every checkpoint and is what curves are drawn from. A resumed run continues
with the history of its checkpoint, so no entry occurs twice.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pipeline.evaluation.score import Score
from pipeline.text import one_line

VERSION = 1

Entry = TypeVar("Entry", "Step", "Score")


@dataclass(frozen=True)
class Step:
    """A row of the history: one optimizer step, or the mean of several.

    `step` is the number of steps done, including this one; `time` is in seconds since the epoch;
    `wait_share`, 0 to 1, is the fraction of the time spent waiting for data.
    """

    step: int
    time: float
    loss: float
    lr: float
    images_per_second: float
    wait_share: float


@dataclass(kw_only=True)
class History:
    """Steps and scores, in the order in which they were made.

    `losses` are the losses of the steps since the last row of `steps`. They are kept so that a run
    resumed between two rows averages the same steps as an uninterrupted one.
    """

    steps: list[Step] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)

    @property
    def best(self) -> Score | None:
        """The first of the scores with the largest mIoU; None before the first evaluation."""
        return max(self.scores, key=lambda score: score.miou, default=None)

    def add(self, row: Step) -> None:
        """Append a row that averages all of `losses`, and clear them."""
        self.steps.append(row)
        self.losses.clear()

    def copy(self) -> History:
        """Return a copy that later entries of this history do not change."""
        return History(steps=[*self.steps], losses=[*self.losses], scores=[*self.scores])

    def to_json(self) -> str:
        """Return the history as one line of JSON: a list of values for each field."""
        content = {
            "version": VERSION,
            "steps": _to_columns(Step, self.steps),
            "losses": self.losses,
            "scores": _to_columns(Score, self.scores),
        }
        return json.dumps(content, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> History:
        """Return the history that `to_json` wrote. Raises ValueError for any other text.

        Older histories have no losses: their next row averages fewer steps.
        """
        try:
            content: Any = json.loads(text)
            if content["version"] != VERSION:
                raise ValueError(f"version {content['version']!r}, must be {VERSION}")
            steps = _from_columns(Step, content["steps"])
            scores = _from_columns(Score, content["scores"])
            losses = [float(loss) for loss in content.get("losses", ())]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            reason = one_line(f"{type(error).__name__}: {error}", 200)
            raise ValueError(f"not a training history: {reason}") from None
        scores = [dataclasses.replace(score, ious=tuple(score.ious)) for score in scores]
        return cls(steps=steps, losses=losses, scores=scores)


def _to_columns(kind: type[Entry], entries: list[Entry]) -> dict[str, list[Any]]:
    names = [entry.name for entry in dataclasses.fields(kind)]
    return {name: [getattr(entry, name) for entry in entries] for name in names}


def _from_columns(kind: type[Entry], columns: dict[str, list[Any]]) -> list[Entry]:
    names = [entry.name for entry in dataclasses.fields(kind)]
    return [kind(*values) for values in zip(*(columns[name] for name in names), strict=True)]
