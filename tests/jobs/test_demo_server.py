"""The S3 server of the demo and the tests: its buckets exist when it says so."""

from __future__ import annotations

from pathlib import Path

import botocore.session
import pytest

from jobs.demo import server
from jobs.demo.server import s3_server


@pytest.mark.s3
def test_its_buckets_exist_once_it_is_ready(tmp_path: Path) -> None:
    ports = server.free_ports()
    client = botocore.session.Session().create_client(
        "s3",
        region_name="us-east-1",
        endpoint_url=f"http://127.0.0.1:{ports['s3']}",
        aws_access_key_id=server.ACCESS_KEY,
        aws_secret_access_key=server.SECRET_KEY,
    )
    with s3_server(tmp_path / "s3", buckets=("images", "results"), ports=ports):
        found = client.list_buckets()["Buckets"]
        client.close()
    assert {each["Name"] for each in found} == {"images", "results"}


@pytest.mark.s3
def test_a_bucket_that_it_does_not_create_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_READY_S", 5.0)
    with (
        pytest.raises(RuntimeError, match=r"did not start with the buckets images, b2;"),
        s3_server(tmp_path / "s3", buckets=("images", "b2")),
    ):
        pass
