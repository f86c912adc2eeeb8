"""The score of a network on the validation split after a number of training steps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """The validation metrics of the weights after `step` steps, each 0 to 1.

    `ious` has one value per class, None if neither label nor mask contains the class; `time` is in
    seconds since the epoch.
    """

    step: int
    time: float
    miou: float
    pixel_accuracy: float
    ious: tuple[float | None, ...]
