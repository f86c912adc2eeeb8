"""Deletes one whole run, in an order in which it never looks finished while rows are missing."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pipeline.data import storage
from pipeline.results.layout import FOLDERS, RunLayout, only_new_lease
from pipeline.results.query import connect
from pipeline.runs import cleanup, lease
from pipeline.runs.lease import HeldError
from tests.results.synthetic_runs import write_run

HEARTBEAT_S, STALE_S = 0.2, 1.5


def write_all(results: str, run_id: str, *, finished: bool = True) -> RunLayout:
    """Write a run with an object in each folder, and a lease that is an hour old."""
    run = RunLayout(results=results, run_id=run_id)
    write_run(results, run_id, finished=finished)
    storage.write(run.single(17, 3), b"row")
    storage.write(run.done_part(0), b"keys")
    storage.write(f"{run.usage}/0123456789abcdef.json", b"{}")
    write_lease(run, age_s=3600)
    return run


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", HEARTBEAT_S)
    monkeypatch.setattr(lease, "STALE_S", STALE_S)


def write_lease(run: RunLayout, *, age_s: float) -> None:
    storage.write(run.lease, lease_of(age_s))


def lease_of(age_s: float) -> bytes:
    """Return a lease of another machine, its heartbeat `age_s` old by this machine's clock."""
    beat = datetime.now(UTC) - timedelta(seconds=age_s)
    return json.dumps({"host": "node7", "pid": 42, "heartbeat": beat.isoformat()}).encode()


@contextlib.contextmanager
def beating(uri: str, *, age_s: float = 0.0) -> Iterator[None]:
    """Hold the lease as a driver on another machine, whose clock is `age_s` behind."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(HEARTBEAT_S):
            storage.write(uri, lease_of(age_s))

    storage.write(uri, lease_of(age_s))
    driver = threading.Thread(target=beat)
    driver.start()
    yield
    ended.set()
    driver.join()


def names(results: str) -> set[str]:
    return {storage.relative(results, item.uri) for item in storage.list_objects(results)}


def found(results: str, objects: list[storage.Object]) -> list[str]:
    return [storage.relative(results, item.uri) for item in objects]


def test_a_run_is_deleted_whole_and_runs_with_similar_names_stay(prefix: str) -> None:
    for run_id in ("a1", "a.b", "a-", "A", "a_parquet"):
        write_all(prefix, run_id)
    others = names(prefix)
    write_all(prefix, "a")
    objects = cleanup.find_run(prefix, "a")
    assert set(found(prefix, objects)) == names(prefix) - others
    cleanup.delete(prefix, objects)
    assert names(prefix) == others


def test_the_record_is_deleted_first_and_the_plan_before_its_parts(prefix: str) -> None:
    write_all(prefix, "a")
    order = found(prefix, cleanup.find_run(prefix, "a"))
    folders = list(dict.fromkeys(name.partition("/")[0] for name in order))
    assert folders == ["runs", "done", "classes", "images", "plans", "singles", "usage", "leases"]
    assert set(folders) == set(FOLDERS)
    assert order.index("plans/run=a/plan.json") < order.index("plans/run=a/part-00000-aa.parquet")


@pytest.mark.slow
def test_an_interrupted_deletion_can_be_repeated_and_shows_no_finished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "STALE_S", 0.0)
    results = str(tmp_path)
    write_all(results, "other")
    write_all(results, "a")
    while left := [name for name in names(results) if "run=a" in name]:
        cleanup.delete(results, cleanup.find_run(results, "a")[:1])
        with connect(results) as con:
            assert con.execute("SELECT run_id FROM runs").fetchall() == [("other",)]
            con.execute("SELECT * FROM classes").fetchall()
        assert len([name for name in names(results) if "run=a" in name]) == len(left) - 1
    with pytest.raises(LookupError, match="there is no run a under"):
        cleanup.find_run(results, "a")


def test_empty_local_folders_and_temporary_files_are_deleted_too(tmp_path: Path) -> None:
    results = tmp_path / "store"
    run = write_all(str(results), "a")
    (Path(run.images) / f".shard-000009.parquet.{'0' * 16}.tmp").write_bytes(b"half")
    cleanup.delete(str(results), cleanup.find_run(str(results), "a"))
    assert list(tmp_path.rglob("*")) in ([], [results])


def test_many_objects_are_deleted(prefix: str) -> None:
    run = RunLayout(results=prefix, run_id="a")
    for i in range(250):
        storage.write(run.single(0, i), b".")
    cleanup.delete(prefix, cleanup.find_run(prefix, "a"))
    assert names(prefix) == set()


@pytest.mark.parametrize("behind_s", [0, 90, 86_400, -90])
def test_an_unfinished_run_with_a_live_driver_is_kept_whatever_its_clock(
    prefix: str, behind_s: float
) -> None:
    run = write_all(prefix, "a", finished=False)
    before = names(prefix)
    with (
        beating(run.lease, age_s=behind_s),
        pytest.raises(HeldError, match=r"run a is being worked on by node7:42"),
    ):
        cleanup.find_run(prefix, "a")
    assert names(prefix) == before


@pytest.mark.parametrize("content", [lease_of(3600), lease_of(0), lease_of(-3600), b"half a lea"])
def test_an_unfinished_run_with_a_stale_lease_is_deleted(
    prefix: str, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    run = write_all(prefix, "a", finished=False)
    storage.write(run.lease, content)
    started = time.monotonic()
    assert set(found(prefix, cleanup.find_run(prefix, "a"))) == names(prefix)
    assert time.monotonic() - started >= STALE_S
    assert f"watching it for {STALE_S:g} s for a heartbeat" in caplog.text


@pytest.mark.process
def test_a_missing_lease_or_an_exited_process_is_known_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results = str(tmp_path)
    run = write_all(results, "a", finished=False)
    storage.delete([run.lease])
    assert cleanup.find_run(results, "a")
    code = "import os, sys; from pipeline.runs.lease import Lease; Lease(*sys.argv[1:]).acquire()"
    command = [sys.executable, "-c", f"{code}; os._exit(0)", run.lease, "a"]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    assert cleanup.find_run(results, "a")
    assert caplog.text == ""


def test_a_finished_run_is_deleted_whatever_its_lease(prefix: str) -> None:
    write_lease(write_all(prefix, "a"), age_s=0)
    assert cleanup.find_run(prefix, "a")


def test_leftovers_include_what_finished_runs_no_longer_need(prefix: str) -> None:
    write_all(prefix, "done")
    write_all(prefix, "open", finished=False)
    assert set(found(prefix, cleanup.find_leftovers(prefix))) == {
        "leases/run=done.json",
        "singles/run=done/000017/00003.parquet",
        "usage/run=done/0123456789abcdef.json",
    }


def test_a_lease_of_only_new_is_a_leftover_once_it_is_free(prefix: str) -> None:
    write_run(prefix, "open", finished=False)
    run = RunLayout(results=prefix, run_id="open")
    write_lease(run, age_s=5)
    with beating(only_new_lease(prefix, "held")):
        assert found(prefix, cleanup.find_leftovers(prefix)) == []
        storage.write(only_new_lease(prefix, "old"), storage.read(run.lease))
        storage.write(f"{prefix}/leases/notes.txt", b"of the user")
        assert found(prefix, cleanup.find_leftovers(prefix)) == ["leases/only-new-old.json"]


def test_parts_that_a_plan_does_not_name_are_leftovers(prefix: str) -> None:
    write_run(prefix, "planned", finished=False)
    for run_id in ("planned", "planning", "broken"):
        plan = RunLayout(results=prefix, run_id=run_id).plan
        storage.write(f"{plan}/part-00000-bb.parquet", b"of the second planner")
    storage.write(f"{RunLayout(results=prefix, run_id='broken').plan}/plan.json", b"{}")
    assert found(prefix, cleanup.find_leftovers(prefix)) == [
        "plans/run=planned/part-00000-bb.parquet"
    ]
    assert len(cleanup.find_run(prefix, "planning")) == 1


def test_temporary_files_are_leftovers_once_they_are_old(tmp_path: Path) -> None:
    write_run(str(tmp_path), "a", finished=False)
    for name, age_s in (("old", 3600), ("young", 5)):
        file = tmp_path / "images" / "run=a" / f".{name}.{'0' * 16}.tmp"
        file.write_bytes(b"half")
        os.utime(file, (time.time() - age_s,) * 2)
    assert found(str(tmp_path), cleanup.find_leftovers(str(tmp_path))) == [
        f"images/run=a/.old.{'0' * 16}.tmp"
    ]


def test_a_run_id_with_a_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run id .*must be 1 to 100 letters"):
        cleanup.find_run(str(tmp_path), "../a")


def test_files_of_a_run_that_crashed_before_its_plan_are_leftovers(prefix: str) -> None:
    crashed = RunLayout(results=prefix, run_id="crashed")
    planning = RunLayout(results=prefix, run_id="planning")
    for run in (crashed, planning):
        storage.write(f"{run.plan}/part-00000-0.parquet", b"part")
    write_lease(crashed, age_s=-1)
    with beating(planning.lease, age_s=3600):
        assert set(found(prefix, cleanup.find_leftovers(prefix))) == {
            "leases/run=crashed.json",
            "plans/run=crashed/part-00000-0.parquet",
        }


def test_a_results_prefix_without_objects_is_an_error(prefix: str) -> None:
    with pytest.raises(LookupError, match="there are no results under"):
        cleanup.find_leftovers(f"{prefix}/typo")
