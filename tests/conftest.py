"""Fixtures of all tests: one S3 server, one Ray cluster, and the rules of the quick tier."""

from __future__ import annotations

import secrets
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from jobs.demo.server import s3_server

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a shell ignores Ctrl-C for background jobs, and the tests that send it would hang
    signal.signal(signal.SIGINT, signal.default_int_handler)

# on a busy machine the duration of an example says nothing about the code
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")

_MARKED_BY = {"ray_session": "ray", "s3_environment": "s3"}
"""Fixture -> the marker of every test that uses it."""

_HEAVY = {"ray", "s3", "process", "slow", "gpu", "interop", "cluster", "chaos"}
"""Markers of tests that are not in the quick tier."""

_STARTS = {"subprocess.Popen", "os.fork", "os.posix_spawn"}
_started: list[str] = []
sys.addaudithook(lambda event, args: _started.append(str(args[:1])) if event in _STARTS else None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use Ray or the S3 server."""
    for item in items:
        for fixture in set(_MARKED_BY) & set(getattr(item, "fixturenames", ())):
            item.add_marker(_MARKED_BY[fixture])


@pytest.fixture(autouse=True)
def quick_tests_start_no_process(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail tests of the quick tier that start a process: they need a marker."""
    before = len(_started)
    yield
    if not _HEAVY & {marker.name for marker in request.node.iter_markers()}:
        assert _started[before:] == [], "starts a process: mark it with pytest.mark.process"


@pytest.fixture(scope="session")
def s3_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment variables of the session's SeaweedFS server."""
    with (
        s3_server(tmp_path_factory.mktemp("s3"), buckets=("tests",)) as variables,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in variables.items():
            patch.setenv(name, value)
        patch.delenv("AWS_PROFILE", raising=False)
        yield variables


@pytest.fixture(scope="session")
def ray_session(s3_environment: dict[str, str]) -> Iterator[None]:
    """One Ray cluster per session, with enough CPUs that actors do not starve other stages.

    Its processes inherit the environment variables of the S3 server.
    """
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def s3_prefix(s3_environment: dict[str, str]) -> str:
    """An empty prefix on the S3 server."""
    return f"s3://tests/{secrets.token_hex(4)}"


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def prefix(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty storage prefix, once in a local folder and once on S3."""
    if request.param == "local":
        return str(tmp_path / "store")
    found: str = request.getfixturevalue("s3_prefix")
    return found
