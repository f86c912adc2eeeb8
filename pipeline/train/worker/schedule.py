"""The "poly" learning rate schedule.

The rate depends on the step alone, so a resumed run continues at the same rate.
"""

from __future__ import annotations

from pipeline.checks import check_at_least


def poly(step: int, *, base_lr: float, max_steps: int, power: float) -> float:
    """Return the learning rate at `step`: base_lr x (1 - step / max_steps) ** power.

    Steps count from 0: the first update uses all of `base_lr`, the last one is at `max_steps` - 1,
    and at `max_steps` the rate is 0. Raises ValueError for a step outside 0 to `max_steps`.
    Source: arXiv 1706.05587, Sec. 4.1, learning rate policy.
    """
    check_at_least("max_steps", max_steps, 1)
    if not 0 <= step <= max_steps:
        raise ValueError(
            f"step {step}: must be from 0 to max_steps, {max_steps}; to change max_steps, "
            "start a new run"
        )
    rate: float = base_lr * ((max_steps - step) / max_steps) ** power
    return rate
