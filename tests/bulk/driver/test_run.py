"""Runs through Ray: the rows of a plain loop, one per image, whatever crashes."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray.data import DataContext

from cluster.local import with_descendants
from pipeline.bulk.driver.actor_pool import Pool
from pipeline.bulk.driver.isolation import ImageIsolator
from pipeline.bulk.driver.run import BulkResult, run
from pipeline.bulk.driver.watchdog import StallWatchdog
from pipeline.bulk.planning import plan
from pipeline.bulk.planning.listing import ImageRef
from pipeline.bulk.settings import BulkSettings, Inference
from pipeline.bulk.worker.rows import RowBuilder
from pipeline.bulk.worker.segmenter import Segmenter, WorkerContext
from pipeline.bulk.worker.shard_worker import images_of
from pipeline.data import storage
from pipeline.data.labels import VOC
from pipeline.results.layout import RunLayout
from pipeline.runs import lease, ray_compat
from pipeline.runs.ray_connection import RunStoppedError

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600), pytest.mark.usefixtures("ray_session")]

_LEAVES_LEASE = """
import os, sys
from pipeline.runs.lease import Lease
Lease(sys.argv[1], "r").acquire()
os._exit(0)
"""


def quiet(*_: object) -> None:
    """Ignore the progress."""


def rows_of(settings: BulkSettings) -> list[dict[str, Any]]:
    """Return all rows of the run, by shard and position."""
    assert settings.run_id is not None
    layout = RunLayout(results=settings.results, run_id=settings.run_id)
    files = sorted(item.uri for item in storage.list_objects(layout.images))
    tables = [pq.read_table(io.BytesIO(storage.read(uri))) for uri in files]
    rows: list[dict[str, Any]] = pa.concat_tables(tables).to_pylist()
    return rows


def looped(settings: BulkSettings, work: WorkerContext) -> list[dict[str, Any]]:
    """Return the rows of a plain loop over the run's plan, without Ray."""
    assert settings.run_id is not None
    layout = RunLayout(results=settings.results, run_id=settings.run_id)
    known = plan.load(layout)
    assert known is not None
    segmenter = Segmenter(work)
    rows: list[dict[str, Any]] = []
    for part in known.parts:
        for row in plan.read_part(layout, part).to_pylist():
            data, _ = segmenter.rows_of(row["shard"], images_of(row["images"]))
            rows += pq.read_table(io.BytesIO(data)).to_pylist()
    segmenter.close()
    return rows


def test_rows_equal_those_of_a_plain_loop_byte_for_byte(
    prefix: str, fill: Any, fill_broken: Any, settings_for: Any, work_for: Any
) -> None:
    fill(prefix, 22)
    fill_broken(prefix)
    context = DataContext.get_current()
    level = logging.getLogger("ray.data").level
    settings = settings_for(prefix, shard_images=5, actors=(2, 2))
    ended = run(settings, quiet)
    rows = rows_of(settings)
    assert len(rows) == len({row["uri"] for row in rows}) == 27
    assert max(row["shard"] for row in rows) == 5
    assert rows == looped(settings, work_for(settings))
    assert ended.outcome is not None
    assert (ended.outcome.ok, ended.outcome.errors, ended.outcome.label_errors) == (24, 3, 2)
    assert DataContext.get_current() is context
    assert logging.getLogger("ray.data").level == level
    record = RunLayout(results=settings.results, run_id="test").record
    [row] = pq.read_table(io.BytesIO(storage.read(record))).to_pylist()
    assert row["infer_seconds"] > 0
    assert row["wait_seconds"] > 0
    assert row["infer_seconds"] + row["wait_seconds"] < row["actor_seconds"]


def test_repeating_a_finished_run_changes_nothing(
    tmp_path: Path, fill: Any, settings_for: Any
) -> None:
    fill(str(tmp_path), 6)
    settings = settings_for(str(tmp_path), shard_images=3)
    run(settings, quiet)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    ended = run(settings, quiet)
    assert ended.nothing_to_do
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}

    layout = RunLayout(results=settings.results, run_id=ended.plan.run_id)
    storage.write(f"{layout.usage}/0123.json", b"{}")  # left by a killed driver
    subprocess.run(
        [sys.executable, "-c", _LEAVES_LEASE, layout.lease],
        check=True,
        cwd=Path(__file__).parents[3],
    )
    assert storage.exists(layout.lease)
    assert run(settings, quiet).nothing_to_do
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}


def test_a_resumed_run_completes_its_plan_and_only_new_adds_new_images(
    tmp_path: Path, fill: Any, small_image: Any, settings_for: Any
) -> None:
    prefix = str(tmp_path)
    fill(prefix, 60)
    settings = settings_for(prefix, shard_images=3)

    def interrupt(_: object, progress: Any) -> None:
        if progress.images_now >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(settings, interrupt)
    name, data, _ = small_image(100)
    storage.write(f"{prefix}/images/{name}", data)
    layout = RunLayout(results=settings.results, run_id="test")
    first = {item.uri: item.etag for item in storage.list_objects(layout.images)}
    assert 0 < len(first) < 20
    run(settings, quiet)
    after = {item.uri: item.etag for item in storage.list_objects(layout.images)}
    assert first.items() < after.items()
    assert len(rows_of(settings)) == 60
    night = settings_for(prefix, run_id="night", only_new=True)
    run(night, quiet)
    assert [row["uri"] for row in rows_of(night)] == [f"{prefix}/images/{name}"]
    assert not storage.exists(layout.lease)


def test_a_killed_actor_loses_no_image(
    tmp_path: Path, fill: Any, settings_for: Any, work_for: Any
) -> None:
    fill(str(tmp_path), 24)
    settings = settings_for(str(tmp_path), shard_images=3)
    killed: list[int] = []

    def kill_once(_: object, progress: Any) -> None:
        if progress.images_now >= 6 and not killed:
            killed.extend(_actor_processes())
            for process in killed:
                os.kill(process, signal.SIGKILL)

    run(settings, kill_once)
    assert killed
    assert rows_of(settings) == looped(settings, work_for(settings))


@pytest.mark.timeout(300)
def test_a_lost_batch_releases_its_actors_before_the_next_one_starts(
    tmp_path: Path, fill: Any, settings_for: Any, work_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(str(tmp_path), 40)
    # all CPUs of the session
    slow = Inference(scales=(3.0, 4.0))  # both actors start before the work is done
    settings = settings_for(
        str(tmp_path), shard_images=1, cpus_per_actor=2, actors=(2, 2), inference=slow
    )
    check, lost = StallWatchdog.check, []

    def loses_one(watchdog: StallWatchdog, executor: Any) -> None:
        check(watchdog, executor)
        if watchdog._rows and ray_compat.running_actors(executor) == 2 and not lost:
            lost.append(True)
            raise ray.exceptions.ActorDiedError

    monkeypatch.setattr(StallWatchdog, "check", loses_one)
    run(settings, quiet)
    assert lost
    assert rows_of(settings) == looped(settings, work_for(settings))


def test_a_pool_grows_from_its_minimum_to_its_maximum(
    tmp_path: Path, fill: Any, settings_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(str(tmp_path), 160)
    slow = Inference(scales=(3.0, 4.0))
    settings = settings_for(str(tmp_path), shard_images=1, actors=(1, 3), inference=slow)
    seen: list[int] = []
    check = StallWatchdog.check

    def noted(watchdog: StallWatchdog, executor: Any) -> None:
        check(watchdog, executor)
        seen.append(ray_compat.running_actors(executor))

    monkeypatch.setattr(StallWatchdog, "check", noted)
    run(settings, quiet)
    grown = [n for n in seen[seen.index(0, seen.index(1)) :] if n]  # after the first shard's one
    # two may start between two checks, and actors stop when their work is done
    assert (grown[0], max(grown)) == (1, 3)


def _actor_processes() -> list[int]:
    """Return the processes of Ray Data's actors under this one."""
    found = []
    for process in with_descendants(os.getpid()):
        with contextlib.suppress(OSError):
            title = Path(f"/proc/{process}/cmdline").read_bytes()
            if title.startswith(b"ray::") and b"MapBatches(ShardWorker)" in title:
                found.append(process)
    return found


def test_too_many_errors_stop_the_run_and_a_larger_fraction_completes_it(
    tmp_path: Path, fill: Any, fill_broken: Any, settings_for: Any
) -> None:
    fill(str(tmp_path), 4)
    fill_broken(str(tmp_path))
    _put_letters(str(tmp_path), 8)
    stops = r"11 of 17 images are errors \(mostly not_an_image\), over --max-error-fraction"
    with pytest.raises(RunStoppedError, match=stops):
        run(settings_for(str(tmp_path), max_error_fraction=0.2), quiet)
    settings = settings_for(str(tmp_path), max_error_fraction=0.7)
    layout = RunLayout(results=settings.results, run_id="test")
    assert not storage.exists(layout.record)
    assert not storage.exists(layout.lease)
    run(settings, quiet)
    assert storage.exists(layout.record)


def _put_letters(prefix: str, count: int) -> None:
    """Write objects that are not images to the image prefix."""
    for number in range(count):
        storage.write(f"{prefix}/images/letter-{number}.jpg", b"a letter, not an image")


def test_ten_errors_never_stop_a_run_however_few_images_it_has(
    tmp_path: Path, fill: Any, settings_for: Any
) -> None:
    fill(str(tmp_path), 1)
    _put_letters(str(tmp_path), 10)
    ended = run(settings_for(str(tmp_path), max_error_fraction=0.05), quiet)
    assert ended.outcome is not None
    assert (ended.outcome.ok, ended.outcome.errors) == (1, 10)


@pytest.mark.parametrize("folder", ["images", "labels"])
def test_a_lost_prefix_stops_the_run_which_resumes_once_it_is_back(
    tmp_path: Path, fill: Any, settings_for: Any, folder: str
) -> None:
    fill(str(tmp_path), 60)
    settings = settings_for(str(tmp_path))
    layout = RunLayout(results=settings.results, run_id="test")
    place, elsewhere = tmp_path / folder, tmp_path / "elsewhere"

    def unmount(*_: object) -> None:
        if place.exists():
            place.rename(elsewhere)

    lost = r"50 .*s in a row vanished: .*holds any other objects"
    with pytest.raises(RunStoppedError, match=lost):
        run(settings, unmount)
    assert not list(storage.list_objects(layout.images))
    elsewhere.rename(place)
    ended = run(settings, quiet)
    assert ended.outcome is not None
    assert (ended.outcome.ok, ended.outcome.label_errors) == (60, 0)


def test_a_second_driver_is_refused_while_the_first_works(
    tmp_path: Path, fill: Any, settings_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.5)
    fill(str(tmp_path), 6)
    settings = settings_for(str(tmp_path), shard_images=2)
    ended: list[BulkResult] = []
    first = threading.Thread(target=lambda: ended.append(run(settings, quiet)))
    first.start()
    layout = RunLayout(results=settings.results, run_id="test")
    while not storage.exists(layout.lease):
        time.sleep(0.05)
    with pytest.raises(lease.HeldError, match="being worked on"):
        run(settings, quiet)
    first.join()
    assert len(ended) == 1


def test_a_driver_that_waited_for_the_lease_leaves_the_finished_run_alone(
    tmp_path: Path, fill: Any, settings_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(str(tmp_path), 2)
    settings = settings_for(str(tmp_path))
    layout = RunLayout(results=settings.results, run_id="test")
    held = lease.hold

    def late(*given: Any, **more: Any) -> Any:  # another driver completes the run first
        monkeypatch.setattr(lease, "hold", held)
        run(settings, quiet)
        records.append(storage.read(layout.record))
        return held(*given, **more)

    records: list[bytes] = []
    monkeypatch.setattr(lease, "hold", late)
    ended = run(settings, quiet)
    assert ended.nothing_to_do
    assert ended.outcome is not None
    assert ended.outcome.ok == 2
    assert storage.read(layout.record) == records[0]


def test_a_corrupt_plan_is_one_clear_error(tmp_path: Path, fill: Any, settings_for: Any) -> None:
    fill(str(tmp_path), 1)
    settings = settings_for(str(tmp_path))
    layout = RunLayout(results=settings.results, run_id="test")
    storage.write(f"{layout.plan}/plan.json", b"{}")
    with pytest.raises(
        RunStoppedError, match=r"plan\.json is corrupt .* not a plan of this version"
    ):
        run(settings, quiet)


def test_a_corrupt_row_of_an_isolated_image_is_one_clear_error(
    tmp_path: Path, fill: Any, settings_for: Any, work_for: Any
) -> None:
    fill(str(tmp_path), 1)
    work = work_for(settings_for(str(tmp_path)))
    storage.write(work.layout.single(3, 0), b"PAR1 half a r")
    rows = RowBuilder(run_id="test", model=work.model, settings=work.settings, classes=VOC)
    isolator = ImageIsolator(work, Pool(min_actors=1, max_actors=1, cpus=1, gpus=0), rows)
    image = ImageRef(f"{tmp_path}/images/1.jpg", "e", 1, None, None)
    with pytest.raises(RunStoppedError, match=r"000003/00000\.parquet is corrupt .*: delete it"):
        isolator.segment(3, [image])
