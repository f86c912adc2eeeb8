"""What every fault is injected into: 600 images on a real S3 server behind the proxy, and runs.

Runs are real ones, `python jobs/segment.py` as a process of its own, on a Ray that is started once
for all of them: that is what takes most of a small run's time. What they leave is compared
with the rows of a plain loop that no fault met.

Images that a test adds lie beside the 600, so that `--images s3://images` takes both.
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
PHOTOS = f"{BUCKET}/night"
CHECKPOINT = "jobs/demo/tfzoo-voc-mobilenetv2.safetensors"
GOOD, BROKEN = 582, 18
SHARD_IMAGES = 16


@dataclass
class Run:
    """One run's process, its output, and when it began."""

    process: subprocess.Popen[bytes]
    output: Path
    started: float = field(default_factory=time.monotonic)

    def wait(self, within_s: float = 600.0) -> int:
        """The exit code; a run that takes longer is ended, and TimeoutExpired raised."""
        try:
            return self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            self.end()
            raise

    def alive(self) -> bool:
        """Whether it still runs."""
        return self.process.poll() is None

    def end(self) -> None:
        """Ends it where it still runs, with all that it started."""
        if self.alive():
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    @property
    def said(self) -> str:
        """What it printed, both streams."""
        return self.output.read_text()

    @property
    def last_line(self) -> str:
        return self.said.strip().splitlines()[-1]


class World:
    """The server, the proxy, the images, and the rows that undisturbed images have."""

    def __init__(self, folder: Path, put: Callable[[str], None]) -> None:
        self.folder = folder
        # seconds that others cost a run, for each second it takes on free cores
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
        put(PHOTOS)
        self.rows = undisturbed(PHOTOS)
        assert len(self.rows) == GOOD + BROKEN

    def close(self) -> None:
        for run in self._runs:
            run.end()
        self.nodes.close()
        self.proxy.stop()
        self._server.close()

    def start_server(self) -> None:
        """Starts the S3 server, where it was before if it was started before."""
        variables = self._server.enter_context(
            s3_server(self.folder / "s3", buckets=("images", "results"), ports=self._ports)
        )
        os.environ.update(variables)

    def kill_server(self) -> None:
        """kill -9 of the S3 server, with all that it has not written yet."""
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
        """Who kills processes of runs, and what else is told to those; nothing is at first."""
        return Killer(self.folder / "faults", seed)

    def run(self, name: str, *flags: str, nodes: Nodes | None = None) -> Run:
        """Starts the run `name` on all images, through the proxy, on the world's Ray or `nodes`.

        `flags` are names and values.
        """
        output = self.folder / f"{name}-{time.monotonic_ns()}.log"
        given = {
            "--images": PHOTOS,
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
        """The run, once it has ended well."""
        run = self.run(name, *flags)
        code = run.wait(within_s)
        assert code == 0, f"exit code {code}: {run.said}"
        return run


def results_of(name: str) -> str:
    """Where the results of the run `name` go: each has a place of its own."""
    return f"s3://results/{name}"


def shards_of(results: str, run_id: str) -> list[storage.Object]:
    """The files that the run has committed so far."""
    return list(storage.list_objects(RunLayout(results=results, run_id=run_id).images))


def wait_for_shards(run: Run, results: str, run_id: str, count: int = 3) -> None:
    """Returns once so many shards are there, and the run goes on."""
    while len(shards_of(results, run_id)) < count:
        assert run.alive(), run.said
        time.sleep(0.1)


def rows_of(results: str, run_id: str) -> list[dict[str, Any]]:
    """All rows that a glob over the run's images finds."""
    found: list[dict[str, Any]] = []
    for item in shards_of(results, run_id):
        found += pq.read_table(io.BytesIO(storage.read(item.uri))).to_pylist()
    return found


def undisturbed(images: str) -> dict[str, dict[str, Any]]:
    """uri -> the row of what lies there now, by a plain loop, broken images too."""
    return plain_loop.rows(images, CHECKPOINT, Inference(), include=("*",))
