"""The night's creator against an API server that keeps RayJobs as Kubernetes does: by name."""

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
PATTERN = {
    "apiVersion": "ray.io/v1",
    "kind": "RayJob",
    "metadata": {
        "name": "segment",
        "labels": {"team": "photos"},
        "uid": "1",
        "resourceVersion": "7",
    },
    "spec": {"suspend": True, "entrypoint": "python -m jobs.segment --images a", "backoffLimit": 2},
}


class Kubernetes(ThreadingHTTPServer):
    """RayJobs by name. One that is created runs, and after `looks` looks it ends as `ends` says."""

    def __init__(self, ends: str = "SUCCEEDED", looks: int = 2) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.jobs: dict[str, dict[str, Any]] = {"segment": PATTERN}
        self.posted: list[dict[str, Any]] = []
        self.ends, self.looks = ends, looks
        self.failures = 0  # answers of 503 still to give to looks at a job that runs

    def status(self, name: str) -> None:
        """Lets time pass for a job that was looked at."""
        job = self.jobs[name]
        left = job.setdefault("looks", self.looks)
        if job["spec"]["suspend"] or "jobStatus" in job.get("status", {}):
            return
        job["looks"] = left - 1
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
    monkeypatch.setattr(nightly, "LOOK_EVERY_S", 0.01)
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


def test_a_night_is_a_rayjob_like_its_pattern_with_the_days_run_id(
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
    metadata = {"name": TODAY, "labels": {"team": "photos"}, "ownerReferences": [owner]}
    assert job["metadata"] == metadata  # and nothing that Kubernetes gives: uid, version


def test_a_night_that_starts_twice_is_one(kubernetes: Kubernetes, tmp_path: Path) -> None:
    kubernetes.looks = 20
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
    assert _night(kubernetes, tmp_path) == 0  # and after its end it is not begun again
    assert len(kubernetes.posted) == 1


def test_a_failed_night_says_so_and_its_retry_goes_on_with_the_same_run(
    kubernetes: Kubernetes, tmp_path: Path
) -> None:
    kubernetes.ends = "FAILED"
    assert _night(kubernetes, tmp_path) == 1
    kubernetes.ends = "SUCCEEDED"
    assert _night(kubernetes, tmp_path) == 0
    first, second = kubernetes.posted
    assert [each["metadata"]["name"] for each in (first, second)] == [TODAY, f"{TODAY}-2"]
    assert first["spec"] == second["spec"]


def test_an_api_server_that_is_away_for_a_while_ends_no_night(
    kubernetes: Kubernetes, tmp_path: Path
) -> None:
    kubernetes.failures = 3
    kubernetes.looks = 5
    (tmp_path / "token").write_text("secret")
    kubernetes.jobs[TODAY] = {**PATTERN, "spec": {**PATTERN["spec"], "suspend": False}}
    server = f"http://127.0.0.1:{kubernetes.server_address[1]}"
    nightly._wait(nightly.RayJobs(server, "deeplab", tmp_path), TODAY)
    assert kubernetes.failures == 0


def test_a_night_without_its_pattern_or_its_rights_fails_in_a_line(
    kubernetes: Kubernetes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del kubernetes.jobs["segment"]
    assert _night(kubernetes, tmp_path) == 1
    assert "there is no RayJob segment: apply the manifests first" in capsys.readouterr().out
    (tmp_path / "token").write_text("another")
    command = ["--template=segment", f"--account={tmp_path}"]
    command += [f"--server=http://127.0.0.1:{kubernetes.server_address[1]}"]
    assert nightly.main(command, {"NAMESPACE": "deeplab"}) == 1
    assert "401" in capsys.readouterr().out


def test_a_retry_after_midnight_belongs_to_the_evening_before() -> None:
    after = datetime(2026, 11, 23, 0, 10, tzinfo=UTC)
    evening = int(datetime(2026, 11, 22, 23, 50, tzinfo=UTC).timestamp() // 60)
    assert nightly.day_of(f"nightly-{evening}", after) == "2026-11-22"
    assert nightly.day_of("first-night", after) == "2026-11-23"
