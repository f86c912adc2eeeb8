"""Credentials go to the S3 server and nowhere else."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from PIL import Image

from jobs.demo.images import demo_images
from jobs.demo.server import s3_server

ROOT = Path(__file__).parents[2]
CHECKPOINT = "jobs/demo/tfzoo-voc-mobilenetv2.safetensors"

_SHOW = """
import io, pyarrow.parquet as pq
for item in storage.list_objects("s3://results"):
    data = storage.read(item.uri)
    file = pq.ParquetFile(io.BytesIO(data)) if item.uri.endswith(".parquet") else None
    print(item.uri, (file.read().to_pylist(), file.schema_arrow.metadata) if file else data)
"""
"""Prints everything in the results, tables as their rows: the files are compressed."""


@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.slow
def test_a_run_leaves_the_secret_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "wJalrXUtnFEMI-K7MDENG-this-is-secret"
    monkeypatch.setattr("jobs.demo.server.SECRET_KEY", secret)
    image = io.BytesIO()
    Image.open(io.BytesIO(demo_images()["chelsea.png"])).crop((0, 0, 160, 120)).save(image, "PNG")
    # Ray's sockets need a short path
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as ray_files,
        s3_server(tmp_path / "s3", buckets=("images", "results")) as variables,
    ):
        environment = {**os.environ, **variables, "RAY_TMPDIR": ray_files}
        for name, data in (("good.png", image.getvalue()), ("bad.png", b"no image")):
            _python(f"storage.write('s3://images/{name}', {data!r})", environment)
        job = ["jobs/segment.py", "--images", "s3://images", "--results", "s3://results"]
        job += ["--checkpoint", CHECKPOINT, "--max-error-fraction", "1"]
        run = subprocess.run(
            [sys.executable, *job], cwd=ROOT, env=environment, capture_output=True, check=False
        )
        assert run.returncode == 0, run.stdout + run.stderr
        listed = _python(_SHOW, environment)
        logs = [path for path in Path(ray_files).rglob("*") if path.is_file()]
        left = b"".join([run.stdout, run.stderr, *(path.read_bytes() for path in logs)])
        assert len(logs) > 10  # it looked where Ray logs
        assert len(listed.splitlines()) >= 5  # shard, classes, done, record, plan and its part
    assert secret.encode() not in left
    assert b"s3://images/bad.png" in listed  # what is compressed was read
    assert secret.encode() not in listed


@pytest.mark.s3
@pytest.mark.slow
@pytest.mark.parametrize("fault", ["no bucket", "wrong secret", "no images"])
def test_a_failed_run_neither_prints_nor_leaves_the_secret(
    tmp_path: Path, s3_environment: dict[str, str], s3_prefix: str, fault: str
) -> None:
    environment = {**os.environ, **s3_environment, "TMPDIR": str(tmp_path)}
    secret = environment["AWS_SECRET_ACCESS_KEY"]
    _python(f"storage.write('{s3_prefix}/images/a.jpg', b'no image')", environment)
    results = "s3://no-such-bucket/x" if fault == "no bucket" else f"{s3_prefix}/results"
    if fault == "wrong secret":
        secret = environment["AWS_SECRET_ACCESS_KEY"] = "another-wJalrXUtnFEMI-secret"
    images = f"{s3_prefix}/nothing" if fault == "no images" else f"{s3_prefix}/images"
    job = ["jobs/segment.py", "--images", images, "--results", results]
    run = subprocess.run(
        [sys.executable, *job, "--checkpoint", CHECKPOINT],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        check=False,
    )
    assert run.returncode in (1, 2), run.stdout + run.stderr
    assert b"segment failed" in run.stdout
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    left = b"".join([run.stdout, run.stderr, *(path.read_bytes() for path in files)])
    assert secret.encode() not in left
    assert s3_environment["AWS_SECRET_ACCESS_KEY"].encode() not in run.stdout + run.stderr


def _python(code: str, environment: dict[str, str]) -> bytes:
    command = [sys.executable, "-c", f"from pipeline.data import storage\n{code}"]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, check=True
    ).stdout
