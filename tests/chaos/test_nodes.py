"""kill -9 of a raylet, and with it of all that its node does, in a cluster of two and a head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from kills import Killer
from outcomes import check, watched
from ray.cluster_utils import Cluster
from world import World, results_of

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.s3, pytest.mark.timeout(900)]


class Nodes:
    """A cluster of a head without CPUs and nodes of two, hooked as the processes of a run are."""

    def __init__(self, variables: dict[str, str]) -> None:
        self._variables = variables
        with self._environment():
            head = {"num_cpus": 0, "include_dashboard": False}
            self.cluster: Any = Cluster(initialize_head=True, head_node_args=head)

    def add(self) -> None:
        """Adds a node."""
        with self._environment():
            self.cluster.add_node(num_cpus=2)

    @contextmanager
    def _environment(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self._variables.items():
                patch.setenv(name, value)
            yield


@pytest.fixture
def killer(world: World, seed: int) -> Killer:
    return world.killer("nodes", seed)


@pytest.fixture
def nodes(world: World, killer: Killer) -> Iterator[Nodes]:
    nodes = Nodes({**killer.variables, **world.variables})
    try:
        nodes.add()
        nodes.add()
        yield nodes
    finally:
        nodes.cluster.shutdown()


def _parent(pid: int) -> int:
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[1])


def test_raylets_that_are_killed_while_their_node_works(
    world: World, killer: Killer, nodes: Nodes
) -> None:
    variables = {**killer.variables, "RAY_ADDRESS": nodes.cluster.address}
    with watched("kill -9 of a raylet: infer, create, fetch", results_of("nodes")) as line:
        run = world.run("nodes", "--actors", "2 2", variables=variables)
        for stage in ("infer", "create", "fetch"):
            killer.kill(stage, victim=_parent, alive=run.alive)
            nodes.add()
        assert run.wait() == 0, run.said
        line.injected = len(killer.hits)
    assert all("raylet" in hit.victim for hit in killer.hits), killer.hits
    check(world, "nodes", line)
