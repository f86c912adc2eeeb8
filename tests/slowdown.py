"""How much longer everything takes while other processes want the same CPUs."""

from __future__ import annotations

import os


def slowdown() -> float:
    """Return the processes per CPU of the last minute, at least 1: a factor for time limits."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
