"""SIGKILL of a run's processes at each stage: every image has one correct row."""

from __future__ import annotations

import signal

import pytest

from tests.chaos.outcomes import check, watched
from tests.chaos.world import World, results_of

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.s3, pytest.mark.timeout(900)]


def test_actors_killed_at_any_stage_lose_no_image(world: World, seed: int) -> None:
    killer = world.killer(seed)
    with watched("kill -9 of an actor: fetch, decode, infer, create", results_of("actors")) as line:
        run = world.run("actors", "--actors", "2 2")
        for stage in ("infer", "fetch", "create", "decode", "infer", "create", "create", "fetch"):
            killer.kill(stage, alive=run.alive)
        assert run.wait() == 0, run.log
        line.injected = len(killer.hits)
    assert all("Worker" in hit.victim for hit in killer.hits), killer.hits
    check(world, "actors", line)


def test_decoders_killed_while_decoding_lose_no_image(world: World, seed: int) -> None:
    killer = world.killer(seed)
    with watched("kill -9 of a decoder process", results_of("decoders")) as line:
        run = world.run("decoders")
        for _ in range(6):
            killer.kill("decoder", place="begin", alive=run.alive)
        assert run.wait() == 0, run.log
        line.injected = len(killer.hits)
    assert all("decoder_process" in hit.victim for hit in killer.hits), killer.hits
    check(world, "decoders", line)


def test_drivers_killed_at_any_stage_are_resumed(world: World, seed: int) -> None:
    killer = world.killer(seed)
    own = ["plan", "reconcile", "classes", "done", "record"]
    with watched(f"kill -9 of the driver: create, {', '.join(own)}", results_of("drivers")) as line:
        for stage in ["plan", "reconcile", "create", "create", "classes", "done", "record"]:
            run = world.run("drivers")
            # the stage of an actor triggers the kill of the driver
            driver = None if stage in own else lambda _, run=run: run.process.pid
            killer.kill(stage, victim=driver, alive=run.alive)
            assert run.wait(30) == -signal.SIGKILL
        world.done("drivers")
        line.injected = len(killer.hits)
    assert all("segment.py" in hit.victim for hit in killer.hits), killer.hits
    check(world, "drivers", line)
