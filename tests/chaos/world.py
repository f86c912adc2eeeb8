"""The environment that faults are injected into: 600 images on an S3 server behind a proxy.

Each run is a process, `python jobs/segment.py`, on one Ray cluster for all of them, since starting
Ray takes most of a small run's time. Its results are compared with the rows of an undisturbed
plain loop.

A test stores its own images beside the 600, so that `--images s3://images` includes both.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from jobs.demo.server import free_ports, s3_server
from pipeline.bulk.settings import Inference
from pipeline.data import storage
from pipeline.results.layout import RunLayout
from tests import plain_loop
from tests.chaos.kills import Killer, hooked
from tests.chaos.nodes import Nodes
from tests.proxy import Proxy
from tests.slowdown import slowdown

ROOT = Path(__file__).parents[2]
BUCKET = "s3://images"
IMAGES = f"{BUCKET}/night"
CHECKPOINT = "jobs/demo/tfzoo-voc-mobilenetv2.safetensors"
GOOD, BROKEN = 582, 18
SHARD_IMAGES = 16


@dataclass
class Run:
    """A run's process, its output, and its start time."""

    process: subprocess.Popen[bytes]
    output: Path
    started: float = field(default_factory=time.monotonic)

    def wait(self, within_s: float = 600.0) -> int:
        """Return the exit code. Kills a run that takes longer, and raises TimeoutExpired."""
        try:
            return self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            self.end()
            raise

    def alive(self) -> bool:
        """Return whether the run is still active."""
        return self.process.poll() is None

    def end(self) -> None:
        """Kill the run and its child processes, if it is still active."""
        if self.alive():
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    @property
    def log(self) -> str:
        """The output so far, stdout and stderr."""
        return self.output.read_text()

    @property
    def last_line(self) -> str:
        return self.log.strip().splitlines()[-1]


class World:
    """The server, the proxy, the images, and the rows of an undisturbed loop."""

    def __init__(self, folder: Path, put: Callable[[str], None]) -> None:
        self.folder = folder
        # slowdown by other load: seconds here per second on an idle machine
        self.crowd = slowdown()
        self._runs: list[Run] = []
        self._ports = free_ports()
        self._server = ExitStack()
        self.start_server()
        self.proxy = Proxy(os.environ["AWS_ENDPOINT_URL"])
        self.proxy.start()
        self.variables = {"AWS_ENDPOINT_URL": self.proxy.url, **hooked(folder / "faults")}
        self.nodes = Nodes(self.variables)
        self.nodes.add(cpus=8)
        put(IMAGES)
        self.rows = undisturbed(IMAGES)
        assert len(self.rows) == GOOD + BROKEN

    def close(self) -> None:
        for run in self._runs:
            run.end()
        self.nodes.close()
        self.proxy.stop()
        self._server.close()

    def start_server(self) -> None:
        """Start the S3 server, always on the same ports and folder."""
        variables = self._server.enter_context(
            s3_server(self.folder / "s3", buckets=("images", "results"), ports=self._ports)
        )
        os.environ.update(variables)

    def kill_server(self) -> None:
        """Send SIGKILL to the S3 server; unwritten data is lost."""
        marker = f"-dir={self.folder / 's3'}".encode()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                found = marker in (process / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if found:
                os.kill(int(process.name), signal.SIGKILL)
        self._server.close()

    def killer(self, seed: int = 0) -> Killer:
        """Return a new killer for the processes of runs; no faults are armed."""
        return Killer(self.folder / "faults", seed)

    def run(self, name: str, *flags: str, nodes: Nodes | None = None) -> Run:
        """Start the run `name` on all images, through the proxy, on the world's Ray or `nodes`.

        `flags` alternates names and values.
        """
        output = self.folder / f"{name}-{time.monotonic_ns()}.log"
        given = {
            "--images": IMAGES,
            "--results": results_of(name),
            "--checkpoint": CHECKPOINT,
            "--run-id": name,
            "--shard-images": str(SHARD_IMAGES),
            "--cpus-per-actor": "1",
            "--max-error-fraction": "0.06",
        }
        given |= dict(zip(flags[::2], flags[1::2], strict=True))
        command = [sys.executable, "jobs/segment.py"]
        for flag, value in given.items():
            command += [flag, *value.split()]
        ray_address = (nodes or self.nodes).address
        environment = {**os.environ, **self.variables, "RAY_ADDRESS": ray_address}
        with output.open("wb") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        self._runs.append(Run(process, output))
        return self._runs[-1]

    def done(self, name: str, *flags: str, within_s: float = 600.0) -> Run:
        """Start a run, wait until it has succeeded, and return it."""
        run = self.run(name, *flags)
        code = run.wait(within_s)
        assert code == 0, f"exit code {code}: {run.log}"
        return run


def results_of(name: str) -> str:
    """Return the results prefix of the run `name`; each run has its own."""
    return f"s3://results/{name}"


def shards_of(results: str, run_id: str) -> list[storage.Object]:
    """Return the files that the run has committed so far."""
    return list(storage.list_objects(RunLayout(results=results, run_id=run_id).images))


def wait_for_shards(run: Run, results: str, run_id: str, count: int = 3) -> None:
    """Wait until the run has committed `count` shards; fail if it ends before."""
    while len(shards_of(results, run_id)) < count:
        assert run.alive(), run.log
        time.sleep(0.1)


def rows_of(results: str, run_id: str) -> list[dict[str, Any]]:
    """Return all rows of the run's `images` table."""
    found: list[dict[str, Any]] = []
    for item in shards_of(results, run_id):
        found += pq.read_table(io.BytesIO(storage.read(item.uri))).to_pylist()
    return found


def undisturbed(images: str) -> dict[str, dict[str, Any]]:
    """Return the rows of a plain loop over the images stored now, broken ones too, by URI."""
    return plain_loop.rows(images, CHECKPOINT, Inference(), include=("*",))
