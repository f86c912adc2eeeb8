"""The cluster shared by the scenarios, and their table of results."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.local import Cluster
from cluster.networks import has_namespaces
from jobs.demo.server import s3_server
from pipeline.bulk.settings import Inference
from pipeline.data import storage
from tests import plain_loop
from tests.cluster.several_nodes import (
    CHECKPOINT,
    IMAGE_COUNT,
    IMAGES,
    SCALES,
    SCENARIOS,
    World,
    as_table,
)
from tests.small_images import small_image


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A head without CPUs, three nodes of one CPU each, and images on an S3 server."""
    if not has_namespaces():
        pytest.skip("nodes on loopback have one address: run as root, with iproute2")
    folder = tmp_path_factory.mktemp("cluster")
    made = Cluster(folder / "cluster", cpus=1)
    made.network.open()
    try:
        with (
            pytest.MonkeyPatch.context() as patch,
            s3_server(
                folder / "s3",
                buckets=("images", "results", "sets"),
                address=made.network.gateway,
            ) as variables,
        ):
            for name, value in variables.items():
                patch.setenv(name, value)
            for name in ("AWS_PROFILE", "RAY_ADDRESS"):
                patch.delenv(name, raising=False)
            for number in range(IMAGE_COUNT):
                name, data, _ = small_image(number)
                storage.write(f"{IMAGES}/{name}", data)
            rows = plain_loop.rows(IMAGES, CHECKPOINT, Inference(scales=SCALES))
            assert len(rows) == IMAGE_COUNT
            made.start(3, {**variables, "DEEPLAB_CACHE": str(folder / "cache")})
            yield World(made, folder, rows)
    finally:
        made.stop()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the table, and writes it where $CLUSTER_TABLE says."""
    if SCENARIOS:
        terminalreporter.section("a cluster of several nodes")
        terminalreporter.write_line(as_table())
        if path := os.environ.get("CLUSTER_TABLE"):
            Path(path).write_text(as_table() + "\n")
