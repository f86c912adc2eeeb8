"""A local Ray started by a run: its addresses, its shutdown, and errors when starting it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from cluster.local import with_descendants
from pipeline.runs import ray_connection

ROOT = Path(__file__).parents[2]

_START = """
import os, sys
import ray
from pipeline.runs import ray_connection
ray_connection.connect(workers=1, cpus=1, gpus=0, quiet=True)
assert ray.get(ray.remote(lambda: 7).remote()) == 7  # a worker listens too
print("up", flush=True)
sys.stdin.read()
"""


def listening(pids: set[int]) -> dict[str, set[str]]:
    """Return address -> programs of these processes that listen on TCP there, from /proc."""
    sockets = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                packed = bytes.fromhex(fields[1].partition(":")[0])
                words = [packed[i : i + 4][::-1] for i in range(0, len(packed), 4)]
                family = socket.AF_INET if table == "tcp" else socket.AF_INET6
                sockets[f"socket:[{fields[9]}]"] = socket.inet_ntop(family, b"".join(words))
    found: dict[str, set[str]] = {}
    for pid in pids:
        try:
            program = Path(f"/proc/{pid}/comm").read_text().strip()
            held = [os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue
        for address in (sockets[each] for each in held if each in sockets):
            found.setdefault(address, set()).add(program)
    return found


@pytest.mark.ray
@pytest.mark.slow
def test_a_local_ray_listens_on_loopback_only_and_has_no_dashboard() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with subprocess.Popen(
        [sys.executable, "-c", _START],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == "up"
            pids = set(with_descendants(process.pid))
            found = listening(pids)
            commands = [Path(f"/proc/{pid}/cmdline").read_text() for pid in pids]
        finally:
            process.communicate("")
    assert any("raylet" in program for programs in found.values() for program in programs)
    assert set(found) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, found
    # Ray starts the dashboard process anyway, for its own metrics
    dashboards = [each for each in commands if "dashboard/dashboard.py" in each]
    assert all("--disable-frontend" in each for each in dashboards), dashboards


def test_a_ray_that_does_not_start_in_time_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def slow(**_: object) -> None:
        raise Exception("The current node timed out during startup. This could happen because")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", slow)
    with pytest.raises(ray_connection.RunStoppedError, match="did not start on this machine"):
        ray_connection.connect(workers=1, cpus=1, gpus=0)


@pytest.mark.parametrize(
    ("before", "ends_with", "left"),
    [
        (False, None, True),
        (False, ValueError, True),
        (False, KeyboardInterrupt, False),  # a shutdown takes seconds
        (True, None, False),  # the caller's
    ],
)
def test_a_ray_started_by_a_job_is_shut_down_at_its_end(
    monkeypatch: pytest.MonkeyPatch,
    before: bool,
    ends_with: type[BaseException] | None,
    left: bool,
) -> None:
    state = {"up": before}
    monkeypatch.setattr(ray, "is_initialized", lambda: state["up"])
    monkeypatch.setattr(ray, "shutdown", lambda: state.update(up=False))
    with contextlib.suppress(ValueError, KeyboardInterrupt), ray_connection.disconnect_on_exit():
        state["up"] = True
        if ends_with is not None:
            raise ends_with
    assert state["up"] is not left
