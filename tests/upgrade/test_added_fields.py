"""A field that this version added is in the table that keeps older runs resumable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.train.driver import run_identity
from pipeline.train.recipes.experiment import Experiment

RUN = Path(__file__).parent / "84b697e" / "trained" / "run.json"


def flat(values: dict[str, Any], prefix: str = "") -> set[str]:
    """Dotted names of all values."""
    names = set()
    for name, value in values.items():
        is_group = isinstance(value, dict)
        names |= flat(value, f"{prefix}{name}.") if is_group else {f"{prefix}{name}"}
    return names


def test_every_field_of_an_experiment_is_old_or_in_the_table() -> None:
    stored = json.loads(RUN.read_text())
    first = flat(stored["experiment"])
    now = flat(json.loads(Experiment().to_json()))
    assert now - first == set(run_identity.ADDED_LATER)
    assert first <= now
    assert tuple(stored) == run_identity.KEYS
