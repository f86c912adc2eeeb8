"""Outcomes of injected faults: the rows found, compared with those of an undisturbed loop."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from pipeline.data import storage
from pipeline.results.layout import run_id_of
from tests.chaos.watcher import Watcher
from tests.chaos.world import World, results_of, rows_of
from tests.plain_loop import seen


@dataclass
class Outcome:
    """A row of the table of outcomes."""

    fault: str
    injected: int = 0
    expected: int = 0
    found: int = 0
    duplicates: int = 0
    lost: int = 0
    seconds: float = 0.0


OUTCOMES: list[Outcome] = []
"""The outcomes of this test session, in order."""


def as_table(outcomes: Iterable[Outcome]) -> str:
    """Return the outcomes as a Markdown table."""
    lines = ["| fault | injected | rows expected | found | duplicates | lost | seconds |"]
    lines.append("|---|---|---|---|---|---|---|")
    for each in outcomes:
        numbers = (each.injected, each.expected, each.found, each.duplicates, each.lost)
        cells = " | ".join(map(str, numbers))
        lines.append(f"| {each.fault} | {cells} | {each.seconds:.0f} |")
    return "\n".join(lines)


@contextmanager
def watched(fault: str, results: str, run_ids: set[str] | None = None) -> Iterator[Outcome]:
    """Yield an outcome for the faults injected in the block, while a reader polls the results.

    At the end of the block, all runs must be finished and `results` must hold nothing else; by
    default there is one run, with the name of the results folder.
    """
    outcome = Outcome(fault)
    started = time.monotonic()
    with Watcher(results) as watcher:
        yield outcome
        outcome.seconds = time.monotonic() - started
    assert watcher.wrong == []
    assert watcher.looks > 1
    check_tidy(results, run_ids or {results.rpartition("/")[2]})
    OUTCOMES.append(outcome)


def instead(outcome: Outcome, injected: Mapping[str, int]) -> None:
    """Replace the outcome of a run by one for each of the faults injected into it."""
    OUTCOMES.remove(outcome)
    OUTCOMES.extend(replace(outcome, fault=f, injected=times) for f, times in injected.items())


def check(
    world: World,
    name: str,
    outcome: Outcome,
    *,
    results: str | None = None,
    kinds: Mapping[str, Collection[str]] | None = None,
    rows: Mapping[str, dict[str, Any]] | None = None,
) -> None:
    """Check that the run's rows are those of the undisturbed loop, each image once.

    `kinds` maps the URIs of images that must be errors to the kinds allowed; `rows` are those of
    the undisturbed loop, by default for all of the world's images; `results` defaults to the run's
    own folder.
    """
    kinds = kinds or {}
    undisturbed = world.rows if rows is None else rows
    wanted = set(undisturbed) | set(kinds)
    found = rows_of(results or results_of(name), name)
    times = Counter(row["uri"] for row in found)
    outcome.expected += len(wanted)
    outcome.found += len(found)
    outcome.duplicates += sum(count - 1 for count in times.values())
    outcome.lost += len(wanted - set(times))
    assert (outcome.duplicates, outcome.lost) == (0, 0)
    assert set(times) == wanted
    for row in found:
        if row["uri"] in kinds:
            assert row["error_kind"] in kinds[row["uri"]], row
        else:
            right = seen(undisturbed[row["uri"]])
            differ = {k: v for k, v in seen(row).items() if v != right[k] and k != "mask"}
            assert seen(row) == right, differ


def check_tidy(results: str, run_ids: set[str]) -> None:
    """Check that all results belong to the runs, and that no temporary files are left."""
    left = [item.uri for item in storage.list_objects(results)]
    assert {run_id_of(results, uri) for uri in left} == run_ids
    passing = [uri for uri in left if "/leases/" in uri or "/singles/" in uri]
    assert passing == []
    assert storage.leftovers(results) == []
