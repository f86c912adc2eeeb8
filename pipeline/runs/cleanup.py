"""Find and delete a whole run, or what crashed runs left behind, under a results URI.

Finding and deleting are separate, so that the objects can be shown first. The order of deletion
keeps a run from ever looking finished while rows are missing: its record goes first, its plan last.
An interrupted deletion is completed by repeating it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import groupby

from pipeline.data import storage
from pipeline.results import layout
from pipeline.results.layout import RunLayout
from pipeline.runs import lease

FRESH_S = 60.0
"""A temporary file younger than this may be in use."""

_THREADS = 16
_CHUNK_OBJECTS = 100


def find_run(results: str, run_id: str) -> list[storage.Object]:
    """Return every object of the run, in the order in which they must be deleted.

    The lease of an unfinished run is watched first, for at most `lease.STALE_S`.
    Raises ValueError if `run_id` is not valid, LookupError if the run has no objects, HeldError if
    it is unfinished and a driver works on it.
    """
    run = RunLayout(results=storage.normalize(results), run_id=run_id)
    record, held = storage.stat_object(run.record), storage.stat_object(run.lease)
    if held and not record:
        _check_not_held(run)
    found = [item for item in (record, storage.stat_object(run.done)) if item]
    # a plan that lost parts must not be resumed: plan.json goes before them
    plan = storage.join(run.plan, "plan.json")
    for folder in (run.done_parts, run.classes, run.images, run.plan, run.singles, run.usage):
        found += sorted(storage.list_objects(folder), key=lambda item: (item.uri != plan, item))
        found += _temporary(folder)
    found += [held] if held else []
    if not found:
        raise LookupError(f"there is no run {run_id} under {run.results}")
    return found


def find_leftovers(results: str) -> list[storage.Object]:
    """Return the objects that crashed runs left behind and nothing needs.

    These are: temporary files older than `FRESH_S`; leases, single rows and usage files of finished
    runs; plan parts that plan.json does not name; leases and files of runs that crashed before they
    had a plan. Leases that may be held are watched first, together, for at most `lease.STALE_S`.
    Raises LookupError if there is nothing under `results`.
    """
    results = storage.normalize(results)
    if not (any(storage.list_pages(results)) or storage.leftovers(results)):
        raise LookupError(f"there are no results under {results}")
    found = _unplanned(results)
    for run in _finished(results):
        found += [*storage.list_objects(run.singles), *storage.list_objects(run.usage)]
        if held := storage.stat_object(run.lease):
            found.append(held)
    return [*found, *_unnamed_parts(results), *filter(_is_old, _temporary(results))]


def delete(results: str, objects: Iterable[storage.Object]) -> None:
    """Delete the objects, one folder after another, and local folders that become empty."""
    results = storage.normalize(results)
    with ThreadPoolExecutor(_THREADS) as pool:
        for _, group in groupby(objects, lambda item: folder_of(results, item)):
            uris = [item.uri for item in group]
            # the first one alone: plan.json must be deleted before the other files of a plan
            storage.delete(uris[:1], within=results)
            rest = uris[1:]
            chunks = [rest[i : i + _CHUNK_OBJECTS] for i in range(0, len(rest), _CHUNK_OBJECTS)]
            list(pool.map(lambda chunk: storage.delete(chunk, within=results), chunks))


def folder_of(results: str, item: storage.Object) -> str:
    """Return the folder directly under `results` that holds the object; "." for `results`."""
    folder, slash, _ = storage.relative(storage.normalize(results), item.uri).partition("/")
    return folder if slash else "."


def _check_not_held(run: RunLayout) -> None:
    if live := lease.find_live([run.lease], run.run_id):
        held = lease.describe_holder(live[run.lease], run.run_id)
        raise lease.HeldError(f"{held}; stop it before you delete the run")


def _finished(results: str) -> list[RunLayout]:
    runs = storage.join(results, "runs")
    ids = {layout.run_id_of(results, item.uri) for item in storage.list_objects(runs)}
    return [RunLayout(results=results, run_id=run_id) for run_id in sorted(filter(None, ids))]


def _unplanned(results: str) -> list[storage.Object]:
    """Return free leases of --only-new and of runs without a plan, and the files of those runs."""
    leases = list(storage.list_objects(storage.join(results, "leases")))
    new = [item for item in leases if layout.is_only_new_lease(results, item.uri)]
    runs = {
        item: RunLayout(results=results, run_id=run_id)
        for item in leases
        if (run_id := layout.run_id_of(results, item.uri))
    }
    unplanned = [item for item, run in runs.items() if _has_no_plan(run)]
    live = lease.find_live((item.uri for item in [*new, *unplanned]), "unknown")
    found = [item for item in new if item.uri not in live]
    for item in unplanned:
        if item.uri not in live and _has_no_plan(runs[item]):
            found += [*storage.list_objects(runs[item].plan), item]
    return found


def _has_no_plan(run: RunLayout) -> bool:
    """Return whether the run has not been planned yet; a finished run was, even if deleted."""
    plan = storage.join(run.plan, "plan.json")
    return not (storage.exists(plan) or storage.exists(run.record))


def _unnamed_parts(results: str) -> list[storage.Object]:
    """Return plan parts that their plan.json does not name; without one, it may be coming."""
    found = []
    listed = sorted(storage.list_objects(storage.join(results, "plans")))
    for folder, group in groupby(listed, lambda item: item.uri.rpartition("/")[0]):
        files = {storage.relative(folder, item.uri): item for item in group}
        if files.pop("plan.json", None):
            named = _parts(f"{folder}/plan.json")
            found += [item for name, item in files.items() if named and name not in named]
    return found


def _parts(plan: str) -> set[str]:
    """Return the names of the plan's parts; empty if it cannot be read, so that all are kept."""
    try:
        return {part["name"] for part in json.loads(storage.read(plan))["parts"]}
    except (storage.StorageError, ValueError, KeyError, TypeError):
        return set()


def _temporary(prefix: str) -> list[storage.Object]:
    found = [storage.stat_object(uri) for uri in storage.leftovers(prefix)]
    return [item for item in found if item]


def _is_old(item: storage.Object) -> bool:
    with suppress(FileNotFoundError):
        return os.path.getmtime(item.uri) < time.time() - FRESH_S
    return False  # its writer has just renamed it
