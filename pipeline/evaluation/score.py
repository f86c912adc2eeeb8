"""The score of a network on val after a number of training steps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """What the weights after `step` steps score on val, each 0 to 1.

    `ious` has one value a class, None where neither label nor mask holds it; `time` is seconds
    since the epoch.
    """

    step: int
    time: float
    miou: float
    pixel_accuracy: float
    ious: tuple[float | None, ...]
