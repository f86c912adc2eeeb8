"""Faults of S3 and the network: six in a row are survived, permanent ones are a clear error.

Each fault hits an object of its own, all concurrently, so that the retries' pauses overlap.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.data import storage
from pipeline.data.storage import s3
from tests.proxy import Fault, Proxy, Rule

pytestmark = pytest.mark.s3

IN_A_ROW = 6
ANY: tuple[Fault, ...] = ("slow_down", "internal", "reset", "hang")
READING: tuple[Fault, ...] = (*ANY, "truncated", "flipped", "slow_bytes")
WRITING: tuple[Fault, ...] = (*ANY, "lost_reply")


@pytest.fixture
def proxy(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy between this process's client, with shorter timeouts, and the server."""
    made = Proxy(s3_environment["AWS_ENDPOINT_URL"])
    made.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", made.url)
    monkeypatch.setitem(s3._TIMEOUTS_S, "read_timeout", 1)
    monkeypatch.setattr(s3, "INITIAL_BACKOFF_S", 0.01)
    s3.filesystem.cache_clear()
    yield made
    made.stop()
    s3.filesystem.cache_clear()


def _rules(faults: tuple[Fault, ...], methods: str, *, in_a_row: int = IN_A_ROW) -> list[Rule]:
    return [
        Rule(fault=fault, methods=methods, path=f"/{fault}$", in_a_row=in_a_row) for fault in faults
    ]


def _content(fault: str) -> bytes:
    return f"content of {fault}".encode() * 1000


def test_reads_survive_six_faults_in_a_row(s3_prefix: str, proxy: Proxy) -> None:
    for fault in READING:
        storage.write(f"{s3_prefix}/{fault}", _content(fault))
    etags = {item.uri: item.etag for item in storage.list_objects(s3_prefix)}
    rules = _rules(READING, "GET")
    with proxy.ruled(*rules), ThreadPoolExecutor(len(READING)) as pool:
        uris = [f"{s3_prefix}/{fault}" for fault in READING]
        read = list(pool.map(lambda uri: storage.read(uri, etags[uri]), uris))
    assert read == [_content(fault) for fault in READING]
    # slow bytes are late, not wrong: the first response is used
    assert [rule.struck for rule in rules] == [*[IN_A_ROW] * (len(READING) - 1), 1]


def test_writes_survive_six_faults_in_a_row(s3_prefix: str, proxy: Proxy) -> None:
    names = [f"{put}/{fault}" for put in ("create", "write") for fault in WRITING]

    def put(name: str) -> bool | None:
        how = storage.create if name.startswith("create") else storage.write
        return how(f"{s3_prefix}/{name}", _content(name))

    rules = _rules(WRITING, "PUT")
    with proxy.ruled(*rules), ThreadPoolExecutor(len(names)) as pool:
        made = dict(zip(names, pool.map(put, names), strict=True))
    assert made == {name: True if name.startswith("create") else None for name in names}
    assert [rule.struck for rule in rules] == [2 * IN_A_ROW] * len(WRITING)
    written = {storage.relative(s3_prefix, item.uri) for item in storage.list_objects(s3_prefix)}
    assert written == set(names)
    for name in names:
        assert storage.read(f"{s3_prefix}/{name}") == _content(name)


def test_a_lost_response_does_not_make_the_second_writer_win(s3_prefix: str, proxy: Proxy) -> None:
    storage.write(f"{s3_prefix}/lost_reply", b"of the first")
    with proxy.ruled(*_rules(("lost_reply",), "PUT")):
        assert not storage.create(f"{s3_prefix}/lost_reply", b"of the second")
    assert storage.read(f"{s3_prefix}/lost_reply") == b"of the first"


@pytest.mark.parametrize("fault", ["slow_down", "reset", "truncated", "garbled"])
def test_a_listing_survives_six_faults_in_a_row(fault: Fault, s3_prefix: str, proxy: Proxy) -> None:
    storage.write(f"{s3_prefix}/a", b"1")
    rule = Rule(fault=fault, path=r"^/tests/?$", in_a_row=IN_A_ROW)
    with proxy.ruled(rule):
        assert [item.uri for item in storage.list_objects(s3_prefix)] == [f"{s3_prefix}/a"]
    assert rule.struck == IN_A_ROW


def test_permanent_faults_are_errors_naming_the_object_and_the_fault(
    s3_prefix: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "MAX_ATTEMPTS", 4)
    expected = {
        "slow_down": ("access", "SlowDown"),
        "internal": ("access", "InternalError"),
        "reset": ("access", ""),
        "hang": ("timeout", ""),
        "truncated": ("access", ""),
        "flipped": ("access", "checksum"),
        "denied": ("access", r"denied \(AccessDenied\); check the AWS credentials"),
        "expired": ("access", r"denied \(ExpiredToken\); check the AWS credentials"),
    }
    for fault in expected:
        storage.write(f"{s3_prefix}/{fault}", _content(fault))

    def refused(fault: str) -> storage.StorageError:
        with pytest.raises(storage.StorageError, match=f"{s3_prefix}/{fault}: .") as error:
            storage.read(f"{s3_prefix}/{fault}")
        return error.value

    rules = _rules(tuple(expected), "GET", in_a_row=100)  # type: ignore[arg-type]
    with proxy.ruled(*rules), ThreadPoolExecutor(len(expected)) as pool:
        errors = dict(zip(expected, pool.map(refused, expected), strict=True))
    for fault, (kind, words) in expected.items():
        assert errors[fault].kind == kind, errors[fault]
        assert re.search(words, str(errors[fault])), errors[fault]
    struck = {rule.fault: rule.struck for rule in rules}
    assert struck.pop("reset") >= 4  # the HTTP client itself retries once
    assert struck.pop("denied") == struck.pop("expired") == 1  # retrying would not help
    assert set(struck.values()) == {4}


def test_a_put_that_arrives_after_its_retry_succeeded_changes_nothing(
    s3_prefix: str, proxy: Proxy
) -> None:
    uri = f"{s3_prefix}/one"
    zombie = Rule(fault="late", methods="PUT", path="/one$")
    with proxy.ruled(zombie):
        assert storage.create(uri, b"what came through")
    etag = storage.stat_object(uri)
    proxy.let_go(zombie)
    deadline = time.monotonic() + 10
    while proxy.arrived < 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert proxy.arrived == zombie.struck == 1
    assert storage.stat_object(uri) == etag
