"""`ray job submit` as in the README, to a Ray that requires a token: segmentation and training."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cluster.local import with_descendants
from jobs.demo.images import demo_images
from pipeline.model import weights
from tests.tiny_training import arguments, write_dataset

ROOT = Path(__file__).parents[2]
RAY = str(Path(sysconfig.get_path("scripts")) / "ray")
CHECKPOINT = "jobs/demo/tfzoo-voc-mobilenetv2.safetensors"

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Yield the environment variables of a head node started for these tests."""
    tmp_path = tmp_path_factory.mktemp("head")
    (tmp_path / "token").write_text("t" * 64)
    environment = {**os.environ, "RAY_AUTH_MODE": "token"}
    environment |= {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    environment["PATH"] = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
    environment.pop("RAY_ADDRESS", None)
    port, dashboard, agent = _free_port(), _free_port(), _free_port()
    command = [RAY, "start", "--head", "--block", "--num-cpus=3", "--disable-usage-stats"]
    command += ["--node-ip-address=127.0.0.1", f"--port={port}", f"--dashboard-port={dashboard}"]
    command += [f"--dashboard-agent-listen-port={agent}"]  # another Ray may have the usual one
    with (tmp_path / "head.log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        while "Ray runtime started" not in (tmp_path / "head.log").read_text():
            assert process.poll() is None, (tmp_path / "head.log").read_text()
            time.sleep(0.2)
        yield {**environment, "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
        for pid in with_descendants(process.pid):  # asked to, it would take half a minute
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def test_a_submitted_job_returns_its_rows_and_its_exit_code(
    head: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "chelsea.png").write_bytes(demo_images()["chelsea.png"])
    job = ["python", "jobs/segment.py", "--images", f"{tmp_path}/images"]
    job += ["--results", f"{tmp_path}/results", "--checkpoint", CHECKPOINT, "--run-id", "job"]
    good = _submit(job, head)
    assert good.returncode == 0, good.stdout + good.stderr
    assert "segment finished run=job images=1 ok=1" in good.stdout
    rows = pq.read_table(f"{tmp_path}/results/images/run=job/shard-000000.parquet").to_pylist()
    assert [row["status"] for row in rows] == ["ok"]
    assert "cat" in {each["class_name"] for each in rows[0]["classes"]}
    bad = _submit([*job, "--scales", "0"], head)
    assert bad.returncode != 0
    assert "--scales 0.0: each must be over 0" in bad.stdout


def test_a_submitted_training_leaves_its_network(head: dict[str, str], tmp_path: Path) -> None:
    write_dataset(f"{tmp_path}/set")
    # as many CPUs a worker as the cluster has room for
    more = ("--max-steps", "2", "--workers", "2", "--cpus-per-worker", "None")
    trained = _submit(["python", "jobs/train.py", *arguments(str(tmp_path), *more)], head)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert "train finished steps=2 " in trained.stdout
    assert "Traceback" not in trained.stdout
    _, classes = weights.load(f"{tmp_path}/out/model.safetensors")
    assert classes.names == ("red", "green", "blue", "never")


def _submit(job: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Wait for the end of the job, as at a terminal."""
    command = [RAY, "job", "submit", "--working-dir", ".", "--", *job]
    while True:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        if "No available agent" not in done.stderr:
            return done
        time.sleep(2)  # the head is up before its agent is
