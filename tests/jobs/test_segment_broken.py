"""`jobs/segment.py` with unreadable files of its own run: one line, exit code 1, a hint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from jobs.segment import main
from pipeline.bulk.driver import preflight
from pipeline.bulk.planning import plan
from pipeline.bulk.settings import BulkSettings
from pipeline.bulk.worker.segmenter import Segmenter
from pipeline.bulk.worker.shard_worker import images_of
from pipeline.cli.arguments import parse
from pipeline.data import storage
from pipeline.data.storage import s3
from pipeline.results.layout import RunLayout
from tests.proxy import Proxy, Rule
from tests.small_images import DEMO, small_image

Capture = pytest.CaptureFixture[str]


def arguments(prefix: str) -> list[str]:
    checkpoint = str(DEMO / "tfzoo-voc-mobilenetv2.safetensors")
    return [
        *("--images", f"{prefix}/images", "--results", f"{prefix}/results", "--run-id", "a"),
        *("--checkpoint", checkpoint, "--cpus-per-actor", "1"),
    ]


def segmented(prefix: str) -> RunLayout:
    """A run of two images whose driver was killed when all shards were done, without Ray."""
    for number in range(2):
        name, image, _ = small_image(number)
        storage.write(f"{prefix}/images/{name}", image)
    settings = parse(BulkSettings, arguments(prefix), description="")
    layout = RunLayout(results=settings.results, run_id="a")
    identity = settings.identity(model=preflight.preflight(settings).fingerprint)
    made = plan.make(settings, layout, identity)
    work = preflight.build_worker_context(settings, layout, made, preflight.build_pool(settings))
    with closing(Segmenter(work)) as segmenter:
        for row in plan.read_part(layout, made.parts[0]).to_pylist():
            data, _ = segmenter.rows_of(row["shard"], images_of(row["images"]))
            storage.create(layout.shard(row["shard"]), data)
    return layout


def failed(prefix: str, capsys: Capture) -> str:
    """The one line of a job that ends with 1."""
    capsys.readouterr()
    code = main(arguments(prefix))
    out, err = capsys.readouterr()
    last = out.splitlines()[-1]
    assert code == 1
    assert "unexpected error" not in err
    assert last.startswith("segment failed exit=1 reason=")
    return last


@pytest.mark.process
@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("plans/run=a/plan.json", "pass another --run-id to start over"),
        ("plans/run=a/part-*.parquet", "pass another --run-id to start over"),
        ("usage/run=a/0123.json", "delete it, and run the same command again"),
        ("runs/run=a.parquet", "delete it, and run the same command again"),
    ],
)
def test_a_truncated_file_of_the_run_is_named_with_a_way_out(
    name: str, hint: str, tmp_path: Path, capsys: Capture
) -> None:
    layout = segmented(str(tmp_path))
    storage.write(f"{layout.usage}/0123.json", b'{"actor_seconds": 1.0, "gpu_')
    if name.startswith("runs"):
        storage.write(layout.record, b"PAR1 and no more")
    if "part-" in name:
        storage.delete([layout.shard(0)])  # only then it is read
    [path] = (tmp_path / "results").glob(name)
    path.write_bytes(path.read_bytes()[:20])
    printed = failed(str(tmp_path), capsys)
    assert f"{path} is corrupt" in printed
    assert hint in printed
    if "usage" in name or "runs" in name:
        path.unlink()
        storage.delete([f"{layout.usage}/0123.json"])
        assert main(arguments(str(tmp_path))) == 0


@pytest.mark.process
def test_a_truncated_shard_is_named(tmp_path: Path, capsys: Capture) -> None:
    layout = segmented(str(tmp_path))
    storage.write(layout.shard(0), storage.read(layout.shard(0))[:100])
    printed = failed(str(tmp_path), capsys)
    assert f"cannot read results under {layout.results}: " in printed
    assert layout.shard(0) in printed


@pytest.fixture
def proxy(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy that this process's clients go through."""
    made = Proxy(s3_environment["AWS_ENDPOINT_URL"])
    made.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", made.url)
    clients = (s3.filesystem, s3.retrying_filesystem)
    for client in clients:
        client.cache_clear()
    yield made
    made.stop()
    for client in clients:
        client.cache_clear()


@pytest.mark.s3
def test_storage_that_fails_at_the_end_of_a_run_is_one_line_and_the_run_resumes(
    s3_prefix: str, proxy: Proxy, capsys: Capture
) -> None:
    layout = segmented(s3_prefix)
    with proxy.ruled(Rule(fault="denied", path=r"/images/.*parquet$", in_a_row=1000)):
        printed = failed(s3_prefix, capsys)
    assert f"cannot read results under {layout.results}: PermissionError: " in printed
    assert "; rerun the same command once they are readable" in printed
    assert main(arguments(s3_prefix)) == 0
