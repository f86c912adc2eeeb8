"""Storage faults during a run: the run survives them, or aborts with a reason and is resumed."""

from __future__ import annotations

import time

import pytest

from tests.chaos.outcomes import check, instead, watched
from tests.chaos.world import World, results_of, wait_for_shards
from tests.proxy import Rule

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.s3, pytest.mark.timeout(900)]

IN_A_ROW = 6

READ = {
    # images 0010, 0110, 0210 etc. are in few shards, so that their retries overlap
    "503 SlowDown": Rule(fault="slow_down", path=r"/0[0-2]10-", in_a_row=IN_A_ROW),
    "500": Rule(fault="internal", path=r"/0[0-2]12-", in_a_row=IN_A_ROW),
    "connection reset": Rule(fault="reset", path=r"/0[0-2]14-", in_a_row=IN_A_ROW),
    "truncated body": Rule(fault="truncated", path=r"/0[0-2]16-", in_a_row=IN_A_ROW),
    "flipped byte": Rule(fault="flipped", path=r"/0[0-2]18-", in_a_row=IN_A_ROW),
    "slow bytes": Rule(fault="slow_bytes", path=r"/0[0-2]20-", in_a_row=IN_A_ROW),
    "hang": Rule(fault="hang", path=r"/00(22|24)-"),
    "listing: 503 SlowDown": Rule(fault="slow_down", path=r"^/images/?$", in_a_row=IN_A_ROW),
}
WRITTEN = {
    "503 SlowDown": Rule(fault="slow_down", path=r"/shard-000003", in_a_row=IN_A_ROW),
    "500": Rule(fault="internal", path=r"/shard-000004", in_a_row=IN_A_ROW),
    "connection reset": Rule(fault="reset", path=r"/shard-000005", in_a_row=IN_A_ROW),
    "reply lost after the write": Rule(
        fault="lost_reply", path=r"/plan\.json|/shard-000007|/classes/|/done/", in_a_row=IN_A_ROW
    ),
    "hang": Rule(fault="hang", path=r"/shard-000012"),
}


def test_a_run_survives_every_storage_fault_six_times_in_a_row(world: World) -> None:
    for rule in WRITTEN.values():
        rule.methods = "PUT"
    rules = {f"GET: {fault}": rule for fault, rule in READ.items()}
    rules |= {f"PUT: {fault}": rule for fault, rule in WRITTEN.items()}
    with (
        watched("storage", results_of("storage")) as line,
        world.proxy.ruled(*rules.values()),
    ):
        world.done("storage")
    check(world, "storage", line)
    for fault, rule in rules.items():
        assert rule.struck == rule.paths * rule.in_a_row > 0 or rule.fault == "slow_bytes", fault
    instead(line, {fault: rule.struck for fault, rule in rules.items()})


def test_a_run_survives_a_restart_of_the_s3_server(world: World) -> None:
    with watched("kill -9 of the S3 server, restarted", results_of("server")) as line:
        run = world.run("server")
        for shards in (3, 12):
            wait_for_shards(run, results_of("server"), "server", shards)
            world.kill_server()
            line.injected += 1
            time.sleep(2)
            world.start_server()
        assert run.wait() == 0, run.log
    check(world, "server", line)


def test_a_lasting_server_error_aborts_the_run_which_is_resumed(world: World) -> None:
    with watched("S3 answers 500 until the run aborts, then recovers", results_of("away")) as line:
        run = world.run("away")
        wait_for_shards(run, results_of("away"), "away")
        fault = Rule(fault="internal", methods="GET PUT HEAD POST DELETE", in_a_row=10**9)
        with world.proxy.ruled(fault):
            assert run.wait() == 1
            line.injected = fault.struck
        assert "InternalError" in run.last_line
        world.done("away")
    check(world, "away", line)
