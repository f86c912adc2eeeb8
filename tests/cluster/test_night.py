"""The nightly script against an API server that stores RayJobs by name, as Kubernetes does."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "cluster" / "kubernetes" / "base"))

import nightly

TODAY = f"nightly-{datetime.now(UTC).date().isoformat()}"
TEMPLATE = {
    "apiVersion": "ray.io/v1",
    "kind": "RayJob",
    "metadata": {
        "name": "segment",
        "labels": {"team": "images"},
        "uid": "1",
        "resourceVersion": "7",
    },
    "spec": {"suspend": True, "entrypoint": "python -m jobs.segment --images a", "backoffLimit": 2},
}


class Kubernetes(ThreadingHTTPServer):
    """Stores RayJobs by name; a created job ends with status `ends` after `polls` polls."""

    def __init__(self, ends: str = "SUCCEEDED", polls: int = 2) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.jobs: dict[str, dict[str, Any]] = {"segment": TEMPLATE}
        self.posted: list[dict[str, Any]] = []
        self.ends, self.polls = ends, polls
        self.failures = 0  # replies of 503 still to send to polls of a running job

    def status(self, name: str) -> None:
        """Advance a job that was polled."""
        job = self.jobs[name]
        left = job.setdefault("polls", self.polls)
        if job["spec"]["suspend"] or "jobStatus" in job.get("status", {}):
            return
        job["polls"] = left - 1
        job["status"] = {"jobDeploymentStatus": "Running"}
        if left <= 0:
            done = "Complete" if self.ends == "SUCCEEDED" else "Failed"
            job["status"] = {"jobDeploymentStatus": done, "jobStatus": self.ends}


class _Handler(BaseHTTPRequestHandler):
    server: Kubernetes
    prefix = "/apis/ray.io/v1/namespaces/deeplab/rayjobs"

    def do_GET(self) -> None:
        name = self.path.removeprefix(f"{self.prefix}/")
        if name not in self.server.jobs:
            return self._answer(404, {})
        if self.server.failures and name != "segment":
            self.server.failures -= 1
            return self._answer(503, {})
        self.server.status(name)
        return self._answer(200, self.server.jobs[name])

    def do_POST(self) -> None:
        assert self.path == self.prefix
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if job["metadata"]["name"] in self.server.jobs:
            return self._answer(409, {})
        self.server.posted.append(job)
        self.server.jobs[job["metadata"]["name"]] = dict(job)
        return self._answer(201, job)

    def _answer(self, code: int, body: dict[str, Any]) -> None:
        if self.headers["Authorization"] != "Bearer secret":
            code, body = 401, {}
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def kubernetes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kubernetes]:
    monkeypatch.setattr(nightly, "POLL_INTERVAL_S", 0.01)
    server = Kubernetes()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def _night(server: Kubernetes, folder: Path, job_name: str = "first-night") -> int:
    if not (folder / "token").exists():
        (folder / "token").write_text("secret\n")
    command = ["--template=segment", f"--account={folder}"]
    command += [f"--server=http://127.0.0.1:{server.server_address[1]}"]
    command += ["--", "--only-new", "--start-timeout=3600"]
    environment = {"NAMESPACE": "deeplab", "JOB_NAME": job_name, "JOB_UID": "u-1"}
    return nightly.main(command, environment)


def test_a_night_is_a_copy_of_its_template_with_the_run_id_of_the_day(
    kubernetes: Kubernetes, tmp_path: Path
) -> None:
    assert _night(kubernetes, tmp_path) == 0
    [job] = kubernetes.posted
    assert job["spec"] == {
        "suspend": False,
        "entrypoint": f"python -m jobs.segment --images a --run-id {TODAY} --only-new "
        "--start-timeout=3600",
        "backoffLimit": 2,
    }
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": "first-night", "uid": "u-1"}
    metadata = {"name": TODAY, "labels": {"team": "images"}, "ownerReferences": [owner]}
    assert job["metadata"] == metadata  # without the fields that Kubernetes adds: uid, version


def test_a_night_that_starts_twice_is_one(kubernetes: Kubernetes, tmp_path: Path) -> None:
    kubernetes.polls = 20
    (tmp_path / "token").write_text("secret")
    codes: list[int] = []
    threads = [
        threading.Thread(target=lambda: codes.append(_night(kubernetes, tmp_path)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [0, 0, 0]
    assert len(kubernetes.posted) == 1
    assert _night(kubernetes, tmp_path) == 0  # a finished night is not started again
    assert len(kubernetes.posted) == 1


def test_a_failed_night_exits_1_and_its_retry_resumes_the_same_run(
    kubernetes: Kubernetes, tmp_path: Path
) -> None:
    kubernetes.ends = "FAILED"
    assert _night(kubernetes, tmp_path) == 1
    kubernetes.ends = "SUCCEEDED"
    assert _night(kubernetes, tmp_path) == 0
    first, second = kubernetes.posted
    assert [each["metadata"]["name"] for each in (first, second)] == [TODAY, f"{TODAY}-2"]
    assert first["spec"] == second["spec"]


def test_a_night_survives_a_short_outage_of_the_api_server(
    kubernetes: Kubernetes, tmp_path: Path
) -> None:
    kubernetes.failures = 3
    kubernetes.polls = 5
    (tmp_path / "token").write_text("secret")
    kubernetes.jobs[TODAY] = {**TEMPLATE, "spec": {**TEMPLATE["spec"], "suspend": False}}
    server = f"http://127.0.0.1:{kubernetes.server_address[1]}"
    nightly._wait(nightly.RayJobs(server, "deeplab", tmp_path), TODAY)
    assert kubernetes.failures == 0


def test_a_night_without_its_template_or_its_rights_fails_with_one_line(
    kubernetes: Kubernetes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del kubernetes.jobs["segment"]
    assert _night(kubernetes, tmp_path) == 1
    assert "RayJob segment does not exist: apply the manifests first" in capsys.readouterr().out
    (tmp_path / "token").write_text("another")
    command = ["--template=segment", f"--account={tmp_path}"]
    command += [f"--server=http://127.0.0.1:{kubernetes.server_address[1]}"]
    assert nightly.main(command, {"NAMESPACE": "deeplab"}) == 1
    assert "401" in capsys.readouterr().out


def test_a_retry_after_midnight_belongs_to_the_scheduled_day() -> None:
    after = datetime(2026, 11, 23, 0, 10, tzinfo=UTC)
    evening = int(datetime(2026, 11, 22, 23, 50, tzinfo=UTC).timestamp() // 60)
    assert nightly.day_of(f"nightly-{evening}", after) == "2026-11-22"
    assert nightly.day_of("first-night", after) == "2026-11-23"
