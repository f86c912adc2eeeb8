"""The learning rate as a function of the step alone, so that it cannot jump after a resume.

Enters: a step counted from 0 and the length of the run. Leaves: a rate. Nothing is remembered.
"""

from __future__ import annotations


def poly(step: int, *, base_lr: float, max_steps: int, power: float) -> float:
    """The rate of the update at `step`: base_lr x (1 - step / max_steps) ** power.

    The first update is at step 0, at the whole `base_lr`; the last is at `max_steps` - 1, and at
    `max_steps` the rate is 0. Raises ValueError for a step outside 0 to `max_steps`.
    Source: arXiv 1706.05587, Sec. 4.1, learning rate policy.
    """
    if max_steps < 1:
        raise ValueError(f"max_steps is {max_steps}; it must be at least 1: a run needs a step")
    if not 0 <= step <= max_steps:
        raise ValueError(
            f"step is {step}; it must be 0 to max_steps, {max_steps}: was the run made longer or "
            "shorter? a longer one is another run"
        )
    rate: float = base_lr * ((max_steps - step) / max_steps) ** power
    return rate
