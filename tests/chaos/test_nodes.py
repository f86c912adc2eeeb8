"""SIGKILL of raylets, and with them of their nodes' workers, in a cluster of two nodes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.nodes import Nodes
from tests.chaos.outcomes import check, watched
from tests.chaos.world import World, results_of

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.s3, pytest.mark.timeout(900)]


@pytest.fixture
def nodes(world: World) -> Iterator[Nodes]:
    """A separate cluster: a head, and two nodes with two CPUs each."""
    nodes = Nodes(world.variables)
    nodes.add(cpus=2)
    nodes.add(cpus=2)
    yield nodes
    nodes.close()


def _parent(pid: int) -> int:
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[1])


def test_nodes_that_are_lost_while_working_lose_no_image(
    world: World, seed: int, nodes: Nodes
) -> None:
    killer = world.killer(seed)
    with watched("kill -9 of a raylet: infer, create, fetch", results_of("nodes")) as line:
        run = world.run("nodes", "--actors", "2 2", nodes=nodes)
        # both nodes at once: a remaining one might finish the short run before the next kill
        for stages in (("infer", "create"), ("fetch",)):
            for stage in stages:
                killer.kill(stage, victim=_parent, alive=run.alive)
            for _ in stages:
                nodes.add(cpus=2)
        assert run.wait() == 0, run.log
        line.injected = len(killer.hits)
    assert all("raylet" in hit.victim for hit in killer.hits), killer.hits
    check(world, "nodes", line)
