"""What a fault came to: rows expected and found, compared with those of an undisturbed loop."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from watcher import Watcher
from world import World, results_of, rows_of, seen

from pipeline.data import storage
from pipeline.results.layout import run_of


@dataclass
class Outcome:
    """A line of the table."""

    fault: str
    injected: int = 0
    expected: int = 0
    found: int = 0
    duplicates: int = 0
    lost: int = 0
    seconds: float = 0.0


OUTCOMES: list[Outcome] = []
"""Of this test session, in order."""


def as_table(outcomes: Iterable[Outcome]) -> str:
    """A table in Markdown."""
    lines = ["| fault | injected | rows expected | found | duplicates | lost | seconds |"]
    lines.append("|---|---|---|---|---|---|---|")
    for each in outcomes:
        numbers = (each.injected, each.expected, each.found, each.duplicates, each.lost)
        cells = " | ".join(map(str, numbers))
        lines.append(f"| {each.fault} | {cells} | {each.seconds:.0f} |")
    return "\n".join(lines)


@contextmanager
def watched(fault: str, results: str) -> Iterator[Outcome]:
    """A line of the table for what happens in the block; a reader looks on all the while."""
    outcome = Outcome(fault)
    started = time.monotonic()
    with Watcher(results) as watcher:
        yield outcome
        outcome.seconds = time.monotonic() - started
    assert watcher.wrong == []
    assert watcher.looks > 1
    OUTCOMES.append(outcome)


def check(
    world: World,
    name: str,
    outcome: Outcome,
    *,
    kinds: Mapping[str, str] | None = None,
    run_id: str | None = None,
    expected: Iterable[str] | None = None,
) -> None:
    """Asserts that the run's rows are those of the undisturbed loop, each photo once.

    `kinds` are photos that must be errors, by URI; `expected` the photos of the plan.
    """
    kinds = kinds or {}
    wanted = set(world.rows if expected is None else expected) | set(kinds)
    rows = rows_of(name, run_id)
    times = Counter(row["uri"] for row in rows)
    outcome.expected += len(wanted)
    outcome.found += len(rows)
    outcome.duplicates += sum(count - 1 for count in times.values())
    outcome.lost += len(wanted - set(times))
    assert (outcome.duplicates, outcome.lost) == (0, 0)
    assert set(times) == wanted
    for row in rows:
        if row["uri"] in kinds:
            assert row["error_kind"] == kinds[row["uri"]], row
        else:
            undisturbed = seen(world.rows[row["uri"]])
            differ = {k: v for k, v in seen(row).items() if v != undisturbed[k] and k != "mask"}
            assert seen(row) == undisturbed, differ
    check_tidy(name, {run_id or name})


def check_tidy(name: str, run_ids: set[str]) -> None:
    """Asserts that nothing lies in the results that belongs to no run, and nothing half done."""
    results = results_of(name)
    left = [item.uri for item in storage.list_objects(results)]
    assert {run_of(results, uri) for uri in left} <= run_ids
    passing = [uri for uri in left if "/leases/" in uri or "/singles/" in uri]
    assert passing == []
