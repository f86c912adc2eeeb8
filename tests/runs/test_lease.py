"""One driver per run: the lease of a live one is respected, that of a dead one is taken once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipeline.data import storage
from pipeline.runs import lease
from pipeline.runs.lease import HeldError, Lease

HEARTBEAT_S, STALE_S = 0.2, 2.0
LONG_S = 60.0
"""For tests in which staleness must not end a wait; a busy machine may need seconds."""

_EXITS = """
import os, sys
from pipeline.runs.lease import Lease
Lease(sys.argv[1], "r").acquire()
os._exit(0)
"""


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", HEARTBEAT_S)
    monkeypatch.setattr(lease, "STALE_S", STALE_S)


@pytest.fixture
def uri(prefix: str) -> str:
    return f"{prefix}/leases/run=r.json"


def _of_an_exited_process(uri: str) -> None:
    subprocess.run([sys.executable, "-c", _EXITS, uri], check=True, cwd=Path(__file__).parents[2])


def _of_a_silent_host(uri: str) -> None:
    content = {"run_id": "r", "token": "x", "host": "elsewhere", "pid": os.getpid(), "boot": "y"}
    storage.write(uri, json.dumps(content).encode())


def _token(uri: str) -> str:
    return str(json.loads(storage.read(uri))["token"])


def test_a_second_driver_is_refused_while_the_first_is_alive(uri: str) -> None:
    with lease.hold(uri, "r") as first:
        for _ in range(2):
            with pytest.raises(HeldError, match=f"run r is being worked on by .*:{os.getpid()}"):
                Lease(uri, "r").acquire()
        assert not first.lost.is_set()
    with lease.hold(uri, "r"):  # it was released
        pass
    assert not storage.exists(uri)


def test_the_refusal_names_the_holder_its_start_and_its_run(uri: str) -> None:
    with lease.hold(uri, "first"):
        since = json.loads(storage.read(uri))["since"]
        assert abs((datetime.now(UTC) - datetime.fromisoformat(since)).total_seconds()) < 60
        with pytest.raises(HeldError) as refused:
            Lease(uri, "second").acquire()
    holder = f"{socket.gethostname()}:{os.getpid()}"
    assert str(refused.value) == (
        f"run first is being worked on by {holder} since {since}, "
        "and run second would do the same work"
    )


def test_other_runs_have_other_leases(prefix: str) -> None:
    with lease.hold(f"{prefix}/a.json", "a"), lease.hold(f"{prefix}/b.json", "b"):
        pass


def test_a_lease_is_released_when_its_driver_fails(uri: str) -> None:
    with pytest.raises(RuntimeError, match="stopped"), lease.hold(uri, "r"):
        raise RuntimeError("stopped")
    assert not storage.exists(uri)


@pytest.mark.process
def test_the_lease_of_an_exited_process_is_taken_at_once(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "STALE_S", LONG_S)
    _of_an_exited_process(uri)
    assert storage.exists(uri)
    started = time.monotonic()
    with lease.hold(uri, "r") as held:
        assert time.monotonic() - started < LONG_S
        assert not held.lost.is_set()
    assert not storage.exists(uri)


@pytest.mark.process
def test_only_the_lease_of_an_exited_process_is_cleared(uri: str) -> None:
    lease.clear_stale(uri)  # it does not exist
    _of_a_silent_host(uri)
    lease.clear_stale(uri)
    assert _token(uri) == "x"
    storage.delete([uri])
    with lease.hold(uri, "r"):
        lease.clear_stale(uri)
        assert storage.exists(uri)
    _of_an_exited_process(uri)
    lease.clear_stale(uri)
    assert not storage.exists(uri)


def test_the_lease_of_a_silent_host_is_taken_once_it_is_stale(uri: str) -> None:
    _of_a_silent_host(uri)
    started = time.monotonic()
    with lease.hold(uri, "r"):
        assert time.monotonic() - started >= STALE_S
        assert _token(uri) != "x"


def test_a_lease_released_while_it_is_watched_is_taken(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "STALE_S", LONG_S)
    _of_a_silent_host(uri)
    timer = threading.Timer(0.3, storage.delete, [[uri]])
    timer.start()
    started = time.monotonic()
    with lease.hold(uri, "r") as held:
        assert time.monotonic() - started < LONG_S
        assert not held.lost.is_set()


def test_a_driver_notices_that_another_took_its_lease_and_leaves_it(uri: str) -> None:
    with lease.hold(uri, "r") as held:
        _of_a_silent_host(uri)
        assert held.lost.wait(30)
    assert _token(uri) == "x"


def test_a_deleted_lease_is_written_again(uri: str) -> None:
    with lease.hold(uri, "r") as held:
        storage.delete([uri])
        deadline = time.monotonic() + 30
        while not storage.exists(uri) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert storage.exists(uri)
        assert not held.lost.is_set()


@pytest.mark.process
@pytest.mark.parametrize("left_behind", [_of_an_exited_process, _of_a_silent_host])
def test_only_one_of_many_drivers_gets_a_stale_lease(tmp_path: Path, left_behind: object) -> None:
    uri = str(tmp_path / "leases" / "run=r.json")
    assert callable(left_behind)
    left_behind(uri)
    start = threading.Barrier(4)

    def driver(_: int) -> Lease | None:
        wanted = Lease(uri, "r")
        start.wait()
        try:
            wanted.acquire()
        except HeldError:
            return None
        return wanted

    with ThreadPoolExecutor(4) as pool:
        taken = [each for each in pool.map(driver, range(4)) if each is not None]
    time.sleep(3 * HEARTBEAT_S)
    working = [each for each in taken if not each.lost.is_set()]
    for each in taken:
        each.release()
    assert len(working) == 1
    assert not storage.exists(uri)
