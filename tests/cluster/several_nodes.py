"""A cluster of several nodes with an S3 server beside it, jobs submitted to it, and a table.

Jobs are submitted as README says, `ray job submit --working-dir . -- python jobs/...`. Nodes have
one CPU and actors take one, so that each is on a node of its own, and on one thread: what they see
is byte for byte what a plain loop sees.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sysconfig
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cluster.local import HEAD, Cluster
from pipeline.data import storage
from pipeline.results.layout import RunLayout
from tests.plain_loop import seen

ROOT = Path(__file__).parents[2]
RAY = str(Path(sysconfig.get_path("scripts")) / "ray")
CHECKPOINT = "jobs/demo/tfzoo-voc-mobilenetv2.safetensors"
IMAGES = "s3://images/night"
SCALES = (1.0, 2.0, 3.0, 4.0)  # a third of a second of one CPU per image: a node arrives in time
IMAGE_COUNT = 120
SHARD_IMAGES = 2
PATIENCE_S = 420.0  # for what takes seconds on a machine with nothing else to do


@dataclass
class Scenario:
    """A line of the table."""

    name: str
    nodes: str
    unit: str = "rows"
    expected: int = 0
    found: int = 0
    seconds: float = 0.0


SCENARIOS: list[Scenario] = []
"""Of this test session, in order."""


def as_table() -> str:
    """A table in Markdown."""
    lines = ["| scenario | nodes | expected | found | seconds |", "|---|---|---|---|---|"]
    for each in SCENARIOS:
        expected = f"{each.expected} {each.unit}"
        lines.append(
            f"| {each.name} | {each.nodes} | {expected} | {each.found} | {each.seconds:.0f} |"
        )
    return "\n".join(lines)


@contextmanager
def timed(name: str, nodes: str, unit: str = "rows") -> Iterator[Scenario]:
    """A line of the table, which it becomes when the block ends well."""
    scenario = Scenario(name, nodes, unit)
    started = time.monotonic()
    yield scenario
    scenario.seconds = time.monotonic() - started
    SCENARIOS.append(scenario)


@dataclass
class Submission:
    """A submitted job and its output."""

    process: subprocess.Popen[bytes]
    output: Path
    started: float = field(default_factory=time.monotonic)

    def wait(self) -> int:
        """Wait for `ray job submit` and return its exit code."""
        try:
            return self.process.wait(PATIENCE_S)
        finally:
            self.process.kill()

    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def log(self) -> str:
        return self.output.read_text()


@dataclass
class World:
    """The cluster, and operations on it."""

    cluster: Cluster
    folder: Path
    rows: dict[str, dict[str, Any]]  # uri -> what a plain loop sees

    def ray_job(self, *words: str) -> Submission:
        """`ray job WORDS`, as a process of its own."""
        output = self.folder / f"{words[0]}-{time.monotonic_ns()}.log"
        environment = {**os.environ, **self.cluster.environment}
        with output.open("wb") as log:
            process = subprocess.Popen(
                [RAY, "job", *words], cwd=ROOT, env=environment, stdout=log, stderr=log
            )
        return Submission(process, output)

    def submit(self, job_id: str, *job: str) -> Submission:
        """Submit the job as in the README, with its own id."""
        return self.ray_job(
            "submit", "--submission-id", job_id, "--working-dir", ".", "--", "python", *job
        )

    def segment(self, run: str, *flags: str, job_id: str | None = None) -> Submission:
        """Submit a segmentation of all images, with the run id and results of `run`."""
        command = ["jobs/segment.py", "--images", IMAGES, "--results", results_of(run)]
        command += ["--checkpoint", CHECKPOINT, "--run-id", run, "--cpus-per-actor", "1"]
        command += ["--shard-images", str(SHARD_IMAGES), "--scales", *map(str, SCALES)]
        return self.submit(job_id or run, *command, *flags)

    def state(self, kind: str) -> list[dict[str, Any]]:
        """Ray's own `actors` or `nodes`."""
        url = f"{self.cluster.environment['RAY_ADDRESS']}/api/v0/{kind}?detail=1&limit=10000"
        token = (self.cluster.folder / "token").read_text()
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            found: list[dict[str, Any]] = json.load(reply)["data"]["result"]["result"]
        return found

    def at_work(self, word: str) -> set[int]:
        """Return the numbers of the nodes with live actors whose class name contains `word`."""
        addresses = {each["node_id"]: each["node_ip"] for each in self.state("nodes")}
        living = [
            addresses[each["node_id"]]
            for each in self.state("actors")
            if each["state"] == "ALIVE" and word in each["class_name"]
        ]
        numbers = (HEAD, *self.cluster.nodes)
        return {each for each in numbers if self.cluster.network.address(each) in living}

    def need(self, nodes: int) -> None:
        """Make exactly this many nodes run, whatever happened before."""
        addresses = [e["node_ip"] for e in self.state("nodes") if e["state"] == "ALIVE"]
        for number in self.cluster.nodes:
            if self.cluster.network.address(number) not in addresses:
                self.cluster.drop(number)
        while len(self.cluster.nodes) > nodes:
            self.cluster.drop(max(self.cluster.nodes))
        while len(self.cluster.nodes) < nodes:
            self.cluster.add()
        until(lambda: self._alive() == nodes + 1)  # Ray takes its time to believe a death

    def _alive(self) -> int:
        """Return the number of nodes alive according to Ray, including the head."""
        return sum(each["state"] == "ALIVE" for each in self.state("nodes"))

    def check(self, run: str, scenario: Scenario) -> None:
        """Assert that the rows of the run are those of a plain loop, each image once."""
        found = rows_of(run)
        scenario.expected, scenario.found = len(self.rows), len(found)
        assert Counter(row["uri"] for row in found) == Counter(list(self.rows))
        for row in found:
            assert seen(row) == seen(self.rows[row["uri"]]), row["uri"]


def until(what: Callable[[], Any], job: Submission | None = None) -> Any:
    """Wait until `what` returns a true value and return it. Raises if `job` ends or time is up."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := what()):
        if job is not None and not job.alive():
            raise TimeoutError(f"the job ended before: {job.log[-3000:]}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {PATIENCE_S:g} s: {job.log[-3000:] if job else ''}")
        time.sleep(0.5)
    return found


def results_of(run: str) -> str:
    """Return the results URI of a run; each run has its own."""
    return f"s3://results/{run}"


def files_of(run: str) -> dict[str, str]:
    """Return the etag of each shard of the run by uri."""
    layout = RunLayout(results=results_of(run), run_id=run)
    return {item.uri: item.etag for item in storage.list_objects(layout.images)}


def rows_of(run: str) -> list[dict[str, Any]]:
    """Return all rows that a glob over the images of the run finds."""
    found: list[dict[str, Any]] = []
    for uri in files_of(run):
        found += pq.read_table(io.BytesIO(storage.read(uri))).to_pylist()
    return found
