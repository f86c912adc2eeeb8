"""kill -9 of whatever works on a run, at a named stage: each image is there once, undamaged."""

from __future__ import annotations

import signal

import pytest

from tests.chaos.outcomes import check, watched
from tests.chaos.world import World, results_of

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.s3, pytest.mark.timeout(900)]


def test_actors_that_are_killed_at_each_of_their_stages(world: World, seed: int) -> None:
    killer = world.killer(seed)
    with watched("kill -9 of an actor: fetch, decode, infer, create", results_of("actors")) as line:
        run = world.run("actors", "--actors", "2 2")
        for stage in ("infer", "fetch", "create", "decode", "infer", "create", "create", "fetch"):
            killer.kill(stage, alive=run.alive)
        assert run.wait() == 0, run.said
        line.injected = len(killer.hits)
    assert all("Worker" in hit.victim for hit in killer.hits), killer.hits
    check(world, "actors", line)


def test_decoders_that_are_killed_while_they_decode(world: World, seed: int) -> None:
    killer = world.killer(seed)
    with watched("kill -9 of a decoder process", results_of("decoders")) as line:
        run = world.run("decoders")
        for _ in range(6):
            killer.kill("decoder", place="begin", alive=run.alive)
        assert run.wait() == 0, run.said
        line.injected = len(killer.hits)
    assert all("decoder_process" in hit.victim for hit in killer.hits), killer.hits
    check(world, "decoders", line)


def test_drivers_that_are_killed_at_each_of_their_stages(world: World, seed: int) -> None:
    killer = world.killer(seed)
    own = ["plan", "reconcile", "classes", "done", "record"]
    with watched(f"kill -9 of the driver: create, {', '.join(own)}", results_of("drivers")) as line:
        for stage in ["plan", "reconcile", "create", "create", "classes", "done", "record"]:
            run = world.run("drivers")
            # an actor's stage says when; the driver is who dies
            driver = None if stage in own else lambda _, run=run: run.process.pid
            killer.kill(stage, victim=driver, alive=run.alive)
            assert run.wait(30) == -signal.SIGKILL
        world.done("drivers")
        line.injected = len(killer.hits)
    assert all("segment.py" in hit.victim for hit in killer.hits), killer.hits
    check(world, "drivers", line)
