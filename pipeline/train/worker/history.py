"""What a training run went through: its steps and its scores on val.

Enters: a step or a score at a time. Leaves: JSON that travels with a checkpoint, and what curves
are drawn from. A checkpoint keeps a copy, and a run that goes on from it goes on with that, so
that nothing is in a history twice. Plain numbers: neither torch nor Ray.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pipeline.evaluation.score import Score

VERSION = 1

Entry = TypeVar("Entry", "Step", "Score")


@dataclass(frozen=True)
class Step:
    """One step of the optimiser, or a few as one row: the means of `loss`, speed and `wait_share`.

    `step` counts the steps done, this one included; `time` is seconds since the epoch;
    `wait_share`, 0 to 1, is the part of the step that waited for data.
    """

    step: int
    time: float
    loss: float
    lr: float
    images_per_second: float
    wait_share: float


@dataclass(kw_only=True)
class History:
    """Steps and scores, each in the order in which they were made.

    `losses` are those of the steps that are in no row of `steps` yet: a run that goes on between
    two rows means the same steps as one that was never interrupted.
    """

    steps: list[Step] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)

    @property
    def best(self) -> Score | None:
        """The score with the largest mIoU, the first of equal ones; None before the first."""
        return max(self.scores, key=lambda score: score.miou, default=None)

    def add(self, row: Step) -> None:
        """Appends the row that all of `losses` are in."""
        self.steps.append(row)
        self.losses.clear()

    def copy(self) -> History:
        """What a checkpoint keeps: later entries of this one are not in it."""
        return History(steps=[*self.steps], losses=[*self.losses], scores=[*self.scores])

    def to_json(self) -> str:
        """This history as one line of JSON: a list of values for each field."""
        content = {
            "version": VERSION,
            "steps": _columns(Step, self.steps),
            "losses": self.losses,
            "scores": _columns(Score, self.scores),
        }
        return json.dumps(content, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> History:
        """The history that `to_json` wrote. Raises ValueError on any other text.

        An older one lacks the losses: its next row is the mean of fewer steps.
        """
        try:
            content: Any = json.loads(text)
            if content["version"] != VERSION:
                raise ValueError(f"version {content['version']!r}, known is {VERSION}")
            steps, scores = _rows(Step, content["steps"]), _rows(Score, content["scores"])
            losses = [float(each) for each in content.get("losses", ())]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            said = f"{type(error).__name__}: {error}"
            raise ValueError(f"the history is not one of ours: {said:.200}") from None
        scores = [dataclasses.replace(score, ious=tuple(score.ious)) for score in scores]
        return cls(steps=steps, losses=losses, scores=scores)


def _columns(kind: type[Entry], entries: list[Entry]) -> dict[str, list[Any]]:
    names = [each.name for each in dataclasses.fields(kind)]
    return {name: [getattr(entry, name) for entry in entries] for name in names}


def _rows(kind: type[Entry], columns: dict[str, list[Any]]) -> list[Entry]:
    names = [each.name for each in dataclasses.fields(kind)]
    return [kind(*values) for values in zip(*(columns[name] for name in names), strict=True)]
