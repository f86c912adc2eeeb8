"""Segmentation on three nodes with faults on one of them."""

from __future__ import annotations

import re
import threading
import time

import pytest

from tests.cluster.several_nodes import (
    IMAGE_COUNT,
    SHARD_IMAGES,
    Submission,
    World,
    files_of,
    timed,
    until,
)

pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.s3, pytest.mark.timeout(900)]

STAGE = "MapWorker"  # what Ray Data's actors are called
CUT_S = 12.0


def test_three_nodes_give_the_rows_of_one_machine(world: World) -> None:
    world.need(3)
    with timed("segment", "3") as scenario:
        job = world.segment("three", "--actors", "3", "3")
        until(lambda: len(world.at_work(STAGE)) == 3, job)
        assert job.wait() == 0, job.log
    world.check("three", scenario)
    assert f"segment finished run=three images={IMAGE_COUNT} ok={IMAGE_COUNT} errors=0 " in job.log
    assert re.search(rf"\d+ of {IMAGE_COUNT} images \(\d+%\) after", job.log)  # progress, as lines
    again = world.segment("three", "--actors", "3", "3", job_id="three")
    assert again.wait() != 0
    assert "three already exists" in again.log


def test_a_stopped_job_is_resumed(world: World) -> None:
    world.need(3)
    with timed("ray job stop in mid-run, then again", "3") as scenario:
        job = world.segment("stopped", "--actors", "3", "3")
        until(lambda: files_of("stopped"), job)
        assert world.ray_job("stop", "stopped").wait() == 0
        job.wait()
        assert "interrupted; the same command resumes the run" in job.log
        before = files_of("stopped")
        assert 0 < len(before) < IMAGE_COUNT // SHARD_IMAGES
        job = world.segment("stopped", "--actors", "3", "3", job_id="stopped-2")
        assert job.wait() == 0, job.log
    assert before.items() <= files_of("stopped").items()
    world.check("stopped", scenario)


def test_a_link_cut_and_restored_loses_nothing(world: World) -> None:
    world.need(3)
    with timed(f"link cut for {CUT_S:g} s in mid-run", "3") as scenario:
        job = world.segment("cut", "--actors", "3", "3")
        until(lambda: files_of("cut") and len(world.at_work(STAGE)) == 3, job)
        number = max(world.cluster.nodes)
        world.cluster.cut(number)
        time.sleep(CUT_S)
        world.cluster.restore(number)
        assert job.wait() == 0, job.log
    world.check("cut", scenario)


def test_a_dropped_node_loses_nothing(world: World) -> None:
    world.need(3)
    with timed("node dropped for good in mid-run", "3, then 2") as scenario:
        job = world.segment("dropped", "--actors", "2", "3")
        world.cluster.drop(_at_work(world, "dropped", job))
        assert job.wait() == 0, job.log
    world.check("dropped", scenario)


def test_an_added_node_is_used(world: World) -> None:
    world.need(1)
    with timed("node added in mid-run", "1, then 2") as scenario:
        job = world.segment("added", "--actors", "1", "2")
        until(lambda: files_of("added"), job)
        added = world.cluster.add()
        until(lambda: added in world.at_work(STAGE), job)
        assert job.wait() == 0, job.log
    world.check("added", scenario)


def test_a_preempted_node_loses_nothing(world: World) -> None:
    world.need(3)
    with timed("node preempted (SIGTERM, gone after 30 s)", "3, then 2") as scenario:
        job = world.segment("preempted", "--actors", "2", "3")
        going = _at_work(world, "preempted", job)
        preemption = threading.Thread(target=world.cluster.preempt, args=(going,))
        preemption.start()
        assert job.wait() == 0, job.log
        preemption.join()
    world.check("preempted", scenario)


def _at_work(world: World, run: str, job: Submission) -> int:
    """A node that works on the run, as soon as two do and the first shards are there."""
    return max(until(lambda: files_of(run) and _several(world.at_work(STAGE)), job))


def _several(nodes: set[int]) -> set[int]:
    return nodes if len(nodes) > 1 else set()
