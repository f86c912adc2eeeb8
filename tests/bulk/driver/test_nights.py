"""The same command every night processes what is new, whatever happened before."""

from __future__ import annotations

import io
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs.segment import main
from pipeline.data import storage
from pipeline.results import query
from pipeline.runs import lease
from tests.small_images import DEMO, small_image

pytestmark = [
    *(pytest.mark.ray, pytest.mark.s3, pytest.mark.slow, pytest.mark.timeout(600)),
    pytest.mark.usefixtures("ray_session"),
]

ROOT = Path(__file__).parents[3]
OLD, NEW = (
    str(DEMO / f"{name}.safetensors") for name in ("tfzoo-voc-mobilenetv2", "camvid-mobilenetv2")
)


def _put(prefix: str, first: int, stop: int) -> None:
    for number in range(first, stop):
        name, image, _ = small_image(number)
        storage.write(f"{prefix}/images/{name}", image)


def _night(prefix: str, *more: str, checkpoint: str = OLD) -> list[str]:
    return [
        *("--images", f"{prefix}/images", "--results", f"{prefix}/results"),
        *("--checkpoint", checkpoint, "--only-new", "--cpus-per-actor", "1", *more),
    ]


def _rows(prefix: str) -> Counter[tuple[str, str]]:
    """Return how often each image was segmented, by its number and the model."""
    found = storage.list_objects(f"{prefix}/results/images")
    tables = [pq.read_table(io.BytesIO(storage.read(item.uri))) for item in found]
    return Counter(
        (Path(row["uri"]).name[:4], row["model"]) for table in tables for row in table.to_pylist()
    )


def _times_segmented(prefix: str) -> dict[str, int]:
    return {number: times for (number, _), times in sorted(_rows(prefix).items())}


def _printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_each_night_processes_new_images_and_reports_if_there_are_none(
    s3_prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _put(s3_prefix, 0, 3)
    assert main(_night(s3_prefix)) == 0
    _put(s3_prefix, 3, 5)
    assert main(_night(s3_prefix)) == 0
    assert " images=2 ok=2 errors=0 " in _printed(capsys)[-1]
    assert main(_night(s3_prefix)) == 0
    *_, words, last = _printed(capsys)
    assert words == "nothing is new: earlier runs processed every image"
    assert " images=0 ok=0 errors=0 " in last
    assert " done_before=5 " in last
    assert _times_segmented(s3_prefix) == {f"{i:04d}": 1 for i in range(5)}
    with query.connect(f"{s3_prefix}/results") as con:
        counts = con.execute("select images from runs order by started_at, run_id").fetchall()
    assert counts == [(3,), (2,), (0,)]
    assert not list(storage.list_objects(f"{s3_prefix}/results/leases"))


_BEATS_OFTEN = """
import sys
from jobs import segment
from pipeline.runs import lease
lease.HEARTBEAT_S = 0.3
sys.exit(segment.main())
"""


def _start(prefix: str, *more: str, until: str) -> subprocess.Popen[str]:
    """Start a nightly run in another process, and wait until it has written below `until`."""
    arguments = _night(prefix, "--shard-images", "2", *more)
    command = [sys.executable, "-c", _BEATS_OFTEN, *arguments]
    driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not list(storage.list_objects(f"{prefix}/results/{until}")):
        assert driver.poll() is None
        time.sleep(0.1)
    return driver


def test_a_second_nightly_run_is_refused_and_told_which_process_is_running(
    s3_prefix: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.3)
    _put(s3_prefix, 0, 60)
    first = _start(s3_prefix, "--run-id", "nightly-1", until="leases")
    for run_id in ("nightly-1", "nightly-2"):  # the same run, and the next one, started too early
        assert main(_night(s3_prefix, "--shard-images", "2", "--run-id", run_id)) == 1
        last = _printed(capsys)[-1]
        assert last.startswith("segment failed exit=1 ")
        holder = f"run nightly-1 is being worked on by {socket.gethostname()}:{first.pid} since 20"
        assert holder in last
        assert ("run nightly-2 would do the same work" in last) == (run_id == "nightly-2")
    output, _ = first.communicate(timeout=300)
    assert first.returncode == 0, output
    assert _times_segmented(s3_prefix) == {f"{i:04d}": 1 for i in range(60)}
    plans = storage.list_objects(f"{s3_prefix}/results/plans")
    assert {item.uri.split("/")[-2] for item in plans} == {"run=nightly-1"}


def test_a_nightly_run_completes_what_killed_runs_left(
    s3_prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _put(s3_prefix, 0, 60)
    for run_id in ("nightly-1", "nightly-2"):
        driver = _start(s3_prefix, "--run-id", run_id, until=f"images/run={run_id}")
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
        # some of its images are done, and not all
        before = _times_segmented(s3_prefix)
        assert 0 < len(before) < 60
    assert main(_night(s3_prefix, "--shard-images", "2", "--run-id", "nightly-2")) == 0
    assert " images=60 " not in _printed(capsys)[-1]
    assert _times_segmented(s3_prefix) == {f"{i:04d}": 1 for i in range(60)}


def test_a_nightly_run_with_another_model_needs_on_model_change(
    s3_prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _put(s3_prefix, 0, 3)
    assert main(_night(s3_prefix, "--run-id", "1")) == 0
    _put(s3_prefix, 3, 4)
    before = sorted(storage.list_objects(f"{s3_prefix}/results"))
    _printed(capsys)
    assert main(_night(s3_prefix, "--run-id", "2", checkpoint=NEW)) == 2
    [line] = _printed(capsys)
    assert "3 of these images were processed with another model or other settings" in line
    assert "so every image would be new" in line
    assert "--on-model-change reprocess" in line
    assert "--on-model-change new-only" in line
    assert main(_night(s3_prefix, "--dry-run", checkpoint=NEW)) == 0
    assert any("everything is new: another model" in line for line in _printed(capsys))
    assert sorted(storage.list_objects(f"{s3_prefix}/results")) == before

    new_only = _night(s3_prefix, "--run-id", "2", "--on-model-change", "new-only", checkpoint=NEW)
    assert main(new_only) == 0
    assert _times_segmented(s3_prefix) == {f"{i:04d}": 1 for i in range(4)}
    reprocess = _night(s3_prefix, "--run-id", "3", "--on-model-change", "reprocess", checkpoint=NEW)
    assert main(reprocess) == 0
    assert " images=3 ok=3 " in _printed(capsys)[-1]
    rows = _rows(s3_prefix)
    assert set(rows.values()) == {1}
    assert len({model for _, model in rows}) == 2
    assert sorted(number for number, _ in rows) == sorted(["0000", "0001", "0002"] * 2 + ["0003"])
    assert main(_night(s3_prefix, "--run-id", "4", checkpoint=NEW)) == 0
    assert _printed(capsys)[-2].startswith("nothing is new")
