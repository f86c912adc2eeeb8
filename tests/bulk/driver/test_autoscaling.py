"""A run on a cluster without workers waits until the cluster scales up; then it scales down."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.data import storage
from pipeline.results import query
from tests.bulk.growing_cluster import GrowingCluster, growing_cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[3]
IMAGES = 1500  # Ray Data requests a second node after about twenty seconds of full load


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GrowingCluster]:
    with growing_cluster(tmp_path_factory.mktemp("cluster"), max_workers=2) as found:
        yield found


def _command(prefix: Path, checkpoint: str, *more: str) -> list[str]:
    return [
        *(sys.executable, "jobs/segment.py", "--images", f"{prefix}/images"),
        *("--results", f"{prefix}/results", "--checkpoint", checkpoint, "--run-id", "r"),
        *("--shard-images", "4", *more),
    ]


def _wait_for(condition: Callable[[], bool], seconds: float) -> float:
    """Return the seconds until the condition was true."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds
        time.sleep(0.2)
    return time.monotonic() - started


def test_the_cluster_grows_for_a_run_and_shrinks_afterwards(
    tmp_path: Path, cluster: GrowingCluster, fill: Any, checkpoint: str
) -> None:
    fill(str(tmp_path), IMAGES)
    assert cluster.nodes() == 1
    command = _command(
        tmp_path,
        checkpoint,
        "--cpus-per-actor",
        "1",
        "--actors",
        "1",
        "2",
        "--start-timeout",
        "400",
    )
    driver = subprocess.Popen(
        command, cwd=ROOT, env=cluster.environment, stdout=subprocess.PIPE, text=True
    )
    most = most_at_work = 0
    while driver.poll() is None:
        most = max(most, cluster.nodes())
        most_at_work = max(most_at_work, cluster.actors())
        time.sleep(0.2)
    output, _ = driver.communicate()
    assert driver.returncode == 0, output
    assert f" images={IMAGES} ok={IMAGES} errors=0 " in output
    assert most == 3
    assert most_at_work == 2  # each takes the one CPU of its node
    with query.connect(f"{tmp_path}/results") as con:
        rows = con.execute("select count(*), count(distinct uri) from images").fetchall()
    assert rows == [(IMAGES, IMAGES)]
    _wait_for(lambda: cluster.nodes() == 1, 200)


def test_a_run_gives_up_on_a_missing_node_after_the_start_timeout(
    tmp_path: Path, cluster: GrowingCluster, fill: Any, checkpoint: str
) -> None:
    fill(str(tmp_path), 4)
    command = _command(tmp_path, checkpoint, "--cpus-per-actor", "8", "--start-timeout", "40")
    done = subprocess.run(
        command, cwd=ROOT, env=cluster.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout
    last = done.stdout.splitlines()[-1]
    assert "gave up waiting for a node with 8 CPUs after 4" in last
    assert "s (--start-timeout)" in last
    assert "waiting for a node with 8 CPUs, 3" in done.stderr
    assert not list(storage.list_objects(f"{tmp_path}/results/leases"))
