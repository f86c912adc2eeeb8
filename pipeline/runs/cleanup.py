"""What may be deleted below a results URI: a whole run, or what killed runs left behind.

Finding and deleting are apart, so that what is found can be shown first. A run goes in an order in
which it never looks finished while rows of it are missing: its record first, what it was to do
last. A deletion that was killed half way is ended by another one.
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
"""A temporary file written since is somebody's."""

_THREADS = 16
_CHUNK_OBJECTS = 100


def find_run(results: str, run_id: str) -> list[storage.Object]:
    """Every object of the run, in the order in which they are to be deleted.

    The lease of an unfinished run is watched first, for `lease.STALE_S` at most.
    Raises ValueError where `run_id` could be none, LookupError where nothing is of that run,
    HeldError where it is unfinished and somebody works on it.
    """
    run = RunLayout(results=storage.normalize(results), run_id=run_id)
    record, held = storage.stat_object(run.record), storage.stat_object(run.lease)
    if held and not record:
        _refuse_if_held(run)
    found = [item for item in (record, storage.stat_object(run.done)) if item]
    # a plan that lost parts must not be taken up again: plan.json goes before them
    plan = storage.join(run.plan, "plan.json")
    for folder in (run.done_parts, run.classes, run.images, run.plan, run.singles, run.usage):
        found += sorted(storage.list_objects(folder), key=lambda item: (item.uri != plan, item))
        found += _temporary(folder)
    found += [held] if held else []
    if not found:
        raise LookupError(f"no run {run_id} lies at {run.results}")
    return found


def find_leftovers(results: str) -> list[storage.Object]:
    """What killed runs left that nobody needs.

    Temporary files; leases, single rows and accounts of finished runs; files beside a plan that it
    does not name; leases and files of runs that died before they had a plan. A temporary file
    younger than `FRESH_S` may be a living writer's and stays. Leases that somebody may hold are
    watched first, all together, for `lease.STALE_S` at most.
    Raises LookupError where nothing lies.
    """
    results = storage.normalize(results)
    if not (any(storage.list_pages(results)) or storage.leftovers(results)):
        raise LookupError(f"no results lie at {results}")
    found = _unplanned(results)
    for run in _finished(results):
        found += [*storage.list_objects(run.singles), *storage.list_objects(run.usage)]
        if held := storage.stat_object(run.lease):
            found.append(held)
    return [*found, *_unnamed_parts(results), *filter(_is_old, _temporary(results))]


def delete(results: str, objects: Iterable[storage.Object]) -> None:
    """Deletes the objects, folder after folder in their order, and the local folders they empty."""
    results = storage.normalize(results)
    with ThreadPoolExecutor(_THREADS) as pool:
        for _, group in groupby(objects, lambda item: folder_of(results, item)):
            uris = [item.uri for item in group]
            # alone, because the order within plans counts: plan.json comes first
            storage.delete(uris[:1], within=results)
            rest = uris[1:]
            chunks = [rest[i : i + _CHUNK_OBJECTS] for i in range(0, len(rest), _CHUNK_OBJECTS)]
            list(pool.map(lambda chunk: storage.delete(chunk, within=results), chunks))


def folder_of(results: str, item: storage.Object) -> str:
    """The folder right below `results` that the object lies in; "." for `results` itself."""
    folder, slash, _ = storage.relative(storage.normalize(results), item.uri).partition("/")
    return folder if slash else "."


def _refuse_if_held(run: RunLayout) -> None:
    if living := lease.find_live([run.lease], run.run_id):
        held = lease.describe_holder(living[run.lease], run.run_id)
        raise lease.HeldError(f"{held}; stop it, and clean then")


def _finished(results: str) -> list[RunLayout]:
    runs = storage.join(results, "runs")
    ids = {layout.run_id_of(results, item.uri) for item in storage.list_objects(runs)}
    return [RunLayout(results=results, run_id=run_id) for run_id in sorted(filter(None, ids))]


def _unplanned(results: str) -> list[storage.Object]:
    """Leases that nobody holds, of --only-new and of runs without a plan; the files of those."""
    leases = list(storage.list_objects(storage.join(results, "leases")))
    new = [item for item in leases if layout.is_only_new_lease(results, item.uri)]
    runs = {
        item: RunLayout(results=results, run_id=run_id)
        for item in leases
        if (run_id := layout.run_id_of(results, item.uri))
    }
    unplanned = [item for item, run in runs.items() if _has_no_plan(run)]
    living = lease.find_live((item.uri for item in [*new, *unplanned]), "unknown")
    found = [item for item in new if item.uri not in living]
    for item in unplanned:
        if item.uri not in living and _has_no_plan(runs[item]):
            found += [*storage.list_objects(runs[item].plan), item]
    return found


def _has_no_plan(run: RunLayout) -> bool:
    """Whether it died, or is, before its plan; a finished run never is, whatever was deleted."""
    plan = storage.join(run.plan, "plan.json")
    return not (storage.exists(plan) or storage.exists(run.record))


def _unnamed_parts(results: str) -> list[storage.Object]:
    """Files beside a plan.json that it does not name; without a plan.json one may be coming."""
    found = []
    listed = sorted(storage.list_objects(storage.join(results, "plans")))
    for folder, group in groupby(listed, lambda item: item.uri.rpartition("/")[0]):
        files = {storage.relative(folder, item.uri): item for item in group}
        if files.pop("plan.json", None):
            named = _parts(f"{folder}/plan.json")
            found += [item for name, item in files.items() if named and name not in named]
    return found


def _parts(plan: str) -> set[str]:
    """The names of the plan's files; none where it cannot be read: then all must stay."""
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
    return False  # its writer lives, and is done with it
