"""What tests of several rooms share: an S3 server, and buckets of their own on it."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from jobs.demo.server import s3_server

# machines that run tests are busy: how long an example takes says nothing of the code
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


@pytest.fixture(scope="session")
def s3_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The variables that lead to a SeaweedFS which lives as long as the test session."""
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
    """The one Ray of the test session, large enough that actors starve nothing else.

    Its processes inherit the variables that lead to the S3 server.
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
    """An empty place to store, once local and once on S3."""
    if request.param == "local":
        return str(tmp_path / "store")
    found: str = request.getfixturevalue("s3_prefix")
    return found
