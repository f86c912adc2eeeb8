"""Start tonight's run on Kubernetes and wait until it ends.

    python nightly.py --template segment -- --only-new --on-model-change=new-only

Runs in the pod of the CronJob with the Python standard library alone. Creates a copy of the
suspended RayJob `--template`, named after the day, with the run id of the day and the flags after
`--` in its command. Exits 0 if the run succeeded and 1 if it failed, so that the history of the
CronJob shows the result of each night.

A day has one run id, however often it is started: a RayJob of the day that is still running is
waited for; one that failed is followed by another (`-2`, `-3`) that resumes the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
MAX_JOBS = 5  # of one day
POLL_INTERVAL_S = 15.0
UNREACHABLE_S = 600.0

_ENDED = ("Complete", "Failed", "ValidationFailed")


class NightError(RuntimeError):
    """The nightly run could not be started, or it failed."""


class RayJobs:
    """The RayJobs of a namespace, accessed through the Kubernetes API."""

    def __init__(self, server: str, namespace: str, account: Path) -> None:
        self._url = f"{server}/apis/ray.io/v1/namespaces/{namespace}/rayjobs"
        self._token = account / "token"  # read for each request: Kubernetes replaces it every hour
        ca = account / "ca.crt"
        self._tls = ssl.create_default_context(cafile=str(ca)) if ca.exists() else None

    def get(self, name: str) -> dict[str, Any] | None:
        """Return the RayJob of that name, or None."""
        try:
            return self._ask(f"{self._url}/{name}")
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise

    def create(self, job: Mapping[str, Any]) -> bool:
        """Create the RayJob; return False if one of that name exists."""
        try:
            self._ask(self._url, json.dumps(job).encode())
        except urllib.error.HTTPError as error:
            if error.code == 409:
                return False
            raise
        return True

    def _ask(self, url: str, body: bytes | None = None) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self._token.read_text().strip()}"}
        headers |= {"Content-Type": "application/json"} if body else {}
        request = urllib.request.Request(url, data=body, headers=headers)
        with urllib.request.urlopen(request, timeout=30, context=self._tls) as reply:
            found: dict[str, Any] = json.load(reply)
        return found


def run_night(
    jobs: RayJobs, template: str, run_id: str, flags: Sequence[str], owner: dict[str, Any] | None
) -> str:
    """Run the RayJob of the day until it has succeeded, and return its name. Raises NightError."""
    for number in range(1, MAX_JOBS + 1):
        name = run_id if number == 1 else f"{run_id}-{number}"
        found = jobs.get(name)
        if found is None:
            _create(jobs, template, name, run_id, flags, owner)
        elif _has_ended(found) and not _has_succeeded(found):
            _log(f"{name} failed earlier")
            continue
        _wait(jobs, name)
        return name
    raise NightError(f"{MAX_JOBS} RayJobs of {run_id} failed; see their logs")


def build_job(
    template: dict[str, Any],
    name: str,
    run_id: str,
    flags: Sequence[str],
    owner: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return a copy of `template` for the run `run_id`, not suspended and owned by `owner`."""
    command = f"{template['spec']['entrypoint']} {shlex.join(['--run-id', run_id, *flags])}"
    metadata: dict[str, Any] = {"name": name, "labels": template["metadata"].get("labels", {})}
    if owner is not None:
        metadata["ownerReferences"] = [owner]
    return {
        "apiVersion": template["apiVersion"],
        "kind": template["kind"],
        "metadata": metadata,
        "spec": {**template["spec"], "suspend": False, "entrypoint": command},
    }


def day_of(job_name: str, now: datetime) -> str:
    """Return the scheduled day: names of a CronJob's Jobs end in minutes since 1970; else today."""
    minutes = re.search(r"-(\d{8})$", job_name)
    scheduled = datetime.fromtimestamp(int(minutes[1]) * 60, UTC) if minutes else now
    return scheduled.date().isoformat()


def _create(
    jobs: RayJobs,
    template: str,
    name: str,
    run_id: str,
    flags: Sequence[str],
    owner: dict[str, Any] | None,
) -> None:
    found = jobs.get(template)
    if found is None:
        raise NightError(f"RayJob {template} does not exist: apply the manifests first")
    if jobs.create(build_job(found, name, run_id, flags, owner)):
        _log(f"{name} created")


def _wait(jobs: RayJobs, name: str) -> None:
    """Wait until the RayJob has succeeded. Raises NightError if it fails."""
    shown, answered = "", time.monotonic()
    while True:
        try:
            found = jobs.get(name)
            answered = time.monotonic()
        except OSError as error:  # an API server that is being replaced does not answer for a while
            if time.monotonic() - answered > UNREACHABLE_S:
                raise NightError(f"Kubernetes does not answer: {error}") from error
            time.sleep(POLL_INTERVAL_S)
            continue
        if found is None:
            raise NightError(f"{name} was deleted before it ended")
        status = found.get("status", {})
        now = f"{status.get('jobDeploymentStatus', 'New')} {status.get('jobStatus', '')}".strip()
        if now != shown:
            shown = now
            _log(f"{name}: {now}")
        if _has_succeeded(found):
            return
        if _has_ended(found):
            raise NightError(f"{name} failed: {status.get('message') or now}")
        time.sleep(POLL_INTERVAL_S)


def _has_ended(job: Mapping[str, Any]) -> bool:
    state: str = job.get("status", {}).get("jobDeploymentStatus", "")
    return state in _ENDED


def _has_succeeded(job: Mapping[str, Any]) -> bool:
    state: str = job.get("status", {}).get("jobStatus", "")
    return state == "SUCCEEDED"


def _log(line: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} {line}", flush=True)


def main(argv: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ) -> int:
    """Run the night and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--template", required=True, help="RayJob to copy for tonight")
    parser.add_argument("--server", default="https://kubernetes.default.svc")
    parser.add_argument("--account", type=Path, default=ACCOUNT, help="folder of token and ca.crt")
    parser.add_argument("flags", nargs="*", help="flags of the job, after --")
    given = parser.parse_args(argv)
    owner = None
    if environment.get("JOB_UID"):
        owner = {"apiVersion": "batch/v1", "kind": "Job"}
        owner |= {"name": environment["JOB_NAME"], "uid": environment["JOB_UID"]}
    run_id = f"nightly-{day_of(environment.get('JOB_NAME', ''), datetime.now(UTC))}"
    try:
        jobs = RayJobs(given.server, environment["NAMESPACE"], given.account)
        name = run_night(jobs, given.template, run_id, given.flags, owner)
    except (NightError, OSError) as error:
        _log(f"the night failed: {error}")
        return 1
    _log(f"{name} succeeded")
    return 0


if __name__ == "__main__":
    sys.exit(main())
