"""Concurrency: drivers of the same run, other runs, late writes, and changes to the images."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.data import storage
from tests.chaos.outcomes import check, watched
from tests.chaos.world import BUCKET, World, results_of, rows_of, undisturbed, wait_for_shards
from tests.plain_loop import seen
from tests.proxy import Rule
from tests.small_images import small_image

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.s3, pytest.mark.timeout(900)]


@contextmanager
def _gate(folder: Path) -> Iterator[None]:
    """Block inference while the block runs, for runs whose faults are in `folder`."""
    gate = folder / "gate"
    gate.touch()
    try:
        yield
    finally:
        gate.unlink()


def test_a_second_driver_on_a_run_is_refused(world: World) -> None:
    killer = world.killer()
    results = results_of("two")
    with watched("two drivers on one run", results) as line:
        with _gate(killer.folder):
            first = world.run("two")
            _wait_for(f"{results}/plans/run=two/plan.json", first)
            second = world.run("two")
            assert second.wait() == 1
            assert "run two is being worked on by" in second.last_line
        assert first.wait() == 0, first.log
        line.injected = 1
    check(world, "two", line)


def test_a_frozen_driver_whose_run_was_taken_over_does_no_harm(world: World) -> None:
    results = results_of("frozen")
    with watched("a driver frozen, and resumed after a takeover", results) as line:
        frozen = world.run("frozen")
        wait_for_shards(frozen, results, "frozen", 1)
        os.kill(frozen.process.pid, signal.SIGSTOP)
        second = world.run("frozen")
        wait_for_shards(second, results, "frozen", 12)
        os.kill(frozen.process.pid, signal.SIGCONT)
        assert second.wait() == 0, second.log
        code = frozen.wait()  # it finds the run finished or taken over
        assert code == 0 or "another driver" in frozen.last_line, frozen.log
        line.injected = 1
    check(world, "frozen", line)


def test_four_runs_at_once_share_one_results_prefix(world: World) -> None:
    results = results_of("four")
    names = {f"four-{number}" for number in range(4)}
    with watched("four runs at once with the same results prefix", results, names) as line:
        runs = {name: world.run(name, "--results", results) for name in sorted(names)}
        for run in runs.values():
            assert run.wait() == 0, run.log
        line.injected = len(runs)
    for name in names:
        check(world, name, line, results=results)


def test_puts_that_arrive_after_the_run_has_ended_change_nothing(world: World) -> None:
    results = results_of("zombie")
    late = Rule(
        fault="late", methods="PUT", path=r"/shard-00000[2-5]|/classes/|/done/|/runs/|/plan\.json"
    )
    with watched("puts that arrive after their run has ended", results) as line:
        with world.proxy.ruled(late):
            world.done("zombie")
        before = sorted(storage.list_objects(f"{results}/images"))
        arrived = world.proxy.arrived
        world.proxy.let_go(late)
        deadline = time.monotonic() + 30
        while world.proxy.arrived < arrived + late.struck and time.monotonic() < deadline:
            time.sleep(0.05)
        line.injected = world.proxy.arrived - arrived
        assert line.injected == late.struck == 8
        assert sorted(storage.list_objects(f"{results}/images")) == before
    check(world, "zombie", line)
    again = world.done("zombie")
    assert "nothing to do" in again.log


def test_images_deleted_replaced_or_added_during_a_run(world: World) -> None:
    results, moving = results_of("moving"), f"{BUCKET}/moving"
    names = [f"{moving}/{number:02d}-{what}.jpg" for number in range(20) for what in ("a", "b")]
    for number, uri in enumerate(names):
        storage.write(uri, small_image(3 * number + 1)[1])
    old = undisturbed(moving)
    gone, replaced, kept = names[0::4], names[1::4], [*names[2::4], *names[3::4]]
    killer = world.killer()
    images = ("--images", BUCKET, "--include", "night/* moving/*")
    with watched("images deleted, replaced, added", results) as line:
        with _gate(killer.folder):  # the first shard, of changing images, may be fetched already
            run = world.run("moving", *images)
            _wait_for(f"{results}/plans/run=moving/plan.json", run)
            _change(gone[::2], replaced[::2], [f"{moving}/added-0.jpg"])
        wait_for_shards(run, results, "moving", 1)
        _change(gone[1::2], replaced[1::2], [f"{moving}/added-1.jpg"])
        assert run.wait() == 0, run.log
        line.injected = len(gone) + len(replaced) + 2
    kinds = {uri: ["vanished", None] for uri in gone} | {u: ["changed", None] for u in replaced}
    check(world, "moving", line, kinds=kinds, rows=world.rows | {uri: old[uri] for uri in kept})
    _assert_old_bytes_with_the_old_etag(rows_of(results, "moving"), old)


def _wait_for(uri: str, run: Any) -> None:
    while not storage.exists(uri):
        assert run.alive(), run.log
        time.sleep(0.05)


def _change(gone: list[str], replaced: list[str], added: list[str]) -> None:
    storage.delete(gone)
    for number, uri in enumerate(replaced + added):
        storage.write(uri, small_image(3 * number + 2)[1])


def _assert_old_bytes_with_the_old_etag(
    rows: list[dict[str, Any]], old: Mapping[str, dict[str, Any]]
) -> None:
    moved = [row for row in rows if row["uri"] in old]
    assert len(moved) == len(old)
    assert {row["error_kind"] for row in moved} >= {"changed", "vanished"}
    for row in moved:
        assert row["etag"] == old[row["uri"]]["etag"]
        assert row["status"] == "error" or seen(row) == seen(old[row["uri"]])
