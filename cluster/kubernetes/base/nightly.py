"""Starts tonight's run on Kubernetes, and waits for its end.

    python nightly.py --template segment -- --only-new --on-model-change=new-only

Runs in the CronJob's pod, with Python alone. Enters: a RayJob at rest, the pattern. Leaves: a
RayJob like it, called after its day, whose command has the day's run id and the flags after `--`.
Exits 0 when the run succeeded, 1 when it failed, so that the CronJob's history says how the nights
were.

A day has one run id, whoever starts it how often: a RayJob of the day that runs is waited for, one
that failed before is followed by another (`-2`, `-3`) that goes on with the same run.
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
MOST_JOBS = 5  # of one day
LOOK_EVERY_S = 15.0
UNREACHABLE_S = 600.0

_ENDED = ("Complete", "Failed", "ValidationFailed")


class NightError(RuntimeError):
    """There is no night to wait for, or it failed."""


class RayJobs:
    """The RayJobs of a namespace, through Kubernetes' API."""

    def __init__(self, server: str, namespace: str, account: Path) -> None:
        self._url = f"{server}/apis/ray.io/v1/namespaces/{namespace}/rayjobs"
        self._token = account / "token"  # read anew each time: Kubernetes changes it every hour
        ca = account / "ca.crt"
        self._tls = ssl.create_default_context(cafile=str(ca)) if ca.exists() else None

    def get(self, name: str) -> dict[str, Any] | None:
        """The RayJob of that name, None where there is none."""
        try:
            return self._ask(f"{self._url}/{name}")
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise

    def create(self, job: Mapping[str, Any]) -> bool:
        """Whether the RayJob was created: False where one of that name is there."""
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


def night(
    jobs: RayJobs, template: str, run_id: str, flags: Sequence[str], owner: dict[str, Any] | None
) -> str:
    """The name of the day's RayJob, which has succeeded. Raises NightError."""
    for number in range(1, MOST_JOBS + 1):
        name = run_id if number == 1 else f"{run_id}-{number}"
        found = jobs.get(name)
        if found is None:
            _create(jobs, template, name, run_id, flags, owner)
        elif _has_ended(found) and not _has_succeeded(found):
            _say(f"{name} failed before")
            continue
        _wait(jobs, name)
        return name
    raise NightError(f"{MOST_JOBS} RayJobs of {run_id} failed; what is wrong is in their logs")


def made(
    pattern: dict[str, Any],
    name: str,
    run_id: str,
    flags: Sequence[str],
    owner: dict[str, Any] | None,
) -> dict[str, Any]:
    """A RayJob like `pattern`, not at rest, for the run `run_id`; it goes when `owner` goes."""
    command = f"{pattern['spec']['entrypoint']} {shlex.join(['--run-id', run_id, *flags])}"
    metadata: dict[str, Any] = {"name": name, "labels": pattern["metadata"].get("labels", {})}
    if owner is not None:
        metadata["ownerReferences"] = [owner]
    return {
        "apiVersion": pattern["apiVersion"],
        "kind": pattern["kind"],
        "metadata": metadata,
        "spec": {**pattern["spec"], "suspend": False, "entrypoint": command},
    }


def day_of(job_name: str, now: datetime) -> str:
    """The day that the CronJob meant: its Jobs' names end in minutes since 1970; else today's."""
    minutes = re.search(r"-(\d{8})$", job_name)
    meant = datetime.fromtimestamp(int(minutes[1]) * 60, UTC) if minutes else now
    return meant.date().isoformat()


def _create(
    jobs: RayJobs,
    template: str,
    name: str,
    run_id: str,
    flags: Sequence[str],
    owner: dict[str, Any] | None,
) -> None:
    pattern = jobs.get(template)
    if pattern is None:
        raise NightError(f"there is no RayJob {template}: apply the manifests first")
    if jobs.create(made(pattern, name, run_id, flags, owner)):
        _say(f"{name} created")


def _wait(jobs: RayJobs, name: str) -> None:
    """Comes back when the RayJob has succeeded. Raises NightError where it has not."""
    said, answered = "", time.monotonic()
    while True:
        try:
            found = jobs.get(name)
            answered = time.monotonic()
        except OSError as error:  # an API server that is being replaced answers nobody for a while
            if time.monotonic() - answered > UNREACHABLE_S:
                raise NightError(f"Kubernetes does not answer: {error}") from error
            time.sleep(LOOK_EVERY_S)
            continue
        if found is None:
            raise NightError(f"{name} was deleted before it ended")
        status = found.get("status", {})
        now = f"{status.get('jobDeploymentStatus', 'New')} {status.get('jobStatus', '')}".strip()
        if now != said:
            said = now
            _say(f"{name}: {now}")
        if _has_succeeded(found):
            return
        if _has_ended(found):
            raise NightError(f"{name} failed: {status.get('message') or now}")
        time.sleep(LOOK_EVERY_S)


def _has_ended(job: Mapping[str, Any]) -> bool:
    state: str = job.get("status", {}).get("jobDeploymentStatus", "")
    return state in _ENDED


def _has_succeeded(job: Mapping[str, Any]) -> bool:
    state: str = job.get("status", {}).get("jobStatus", "")
    return state == "SUCCEEDED"


def _say(line: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} {line}", flush=True)


def main(argv: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ) -> int:
    """Runs the night; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--template", required=True, help="the RayJob to make tonight's from")
    parser.add_argument("--server", default="https://kubernetes.default.svc")
    parser.add_argument("--account", type=Path, default=ACCOUNT, help="folder of token and ca.crt")
    parser.add_argument("flags", nargs="*", help="of the job, after --")
    given = parser.parse_args(argv)
    owner = None
    if environment.get("JOB_UID"):
        owner = {"apiVersion": "batch/v1", "kind": "Job"}
        owner |= {"name": environment["JOB_NAME"], "uid": environment["JOB_UID"]}
    run_id = f"nightly-{day_of(environment.get('JOB_NAME', ''), datetime.now(UTC))}"
    try:
        jobs = RayJobs(given.server, environment["NAMESPACE"], given.account)
        name = night(jobs, given.template, run_id, given.flags, owner)
    except (NightError, OSError) as error:
        _say(f"the night failed: {error}")
        return 1
    _say(f"{name} succeeded")
    return 0


if __name__ == "__main__":
    sys.exit(main())
