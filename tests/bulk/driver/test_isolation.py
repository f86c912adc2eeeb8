"""Images that crash their worker, in real actors; only the segmenter in them is a stub."""

from __future__ import annotations

import importlib
import io
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray

from pipeline.bulk.driver import isolation
from pipeline.bulk.driver.actor_pool import Pool
from pipeline.bulk.driver.isolation import ImageIsolator
from pipeline.bulk.planning.listing import ImageRef
from pipeline.bulk.worker.rows import RowBuilder
from pipeline.bulk.worker.segmenter import WorkerContext
from pipeline.bulk.worker.shard_worker import IsolatedWorker
from pipeline.data import storage
from pipeline.data.labels import VOC
from pipeline.results import tables
from pipeline.runs.ray_connection import RunStoppedError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


class _StubSegmenter:
    """Makes a row for an image, after the failures that its URI asks for, one per attempt.

    An attempt leaves a file in `attempts`, because a crash takes the process with it.
    """

    def __init__(self, work: WorkerContext, attempts: Path) -> None:
        self._attempts = attempts
        self._rows = RowBuilder(
            run_id="test", model=work.model, settings=work.settings, classes=VOC
        )

    def rows_of(self, shard: int, images: list[ImageRef]) -> tuple[bytes, None]:
        [image] = images
        name, _, failures = image.uri.partition(":")
        attempt = len(list(self._attempts.glob(f"{name}-*")))
        (self._attempts / f"{name}-{attempt}-{os.getpid()}").touch()
        self._fail([*filter(None, failures.split(","))][attempt : attempt + 1])
        row = self._rows.error(shard, image, "empty", "any row")
        return tables.rows_to_parquet([row], tables.with_footer(tables.IMAGES, VOC)), None

    def _fail(self, failures: list[str]) -> None:
        if failures == ["crash"]:
            os.kill(os.getpid(), signal.SIGSEGV)
        if failures == ["memory"]:  # as Ray reports that it killed the process
            raise ray.exceptions.OutOfMemoryError("the node runs out of memory")
        if failures == ["bug"]:
            raise ZeroDivisionError("a bug")


Segment = Callable[[list[str]], list[dict[str, Any]]]


@pytest.fixture
def segment(
    tmp_path: Path,
    settings_for: Any,
    work_for: Callable[..., WorkerContext],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Segment]:
    """`segment(uris)` isolates the images of a shard, and returns the rows of its file."""
    work = work_for(settings_for(str(tmp_path)))
    attempts = tmp_path / "attempts"
    attempts.mkdir()

    class StubWorker(IsolatedWorker):
        def start(self) -> str:
            self._segmenter = _StubSegmenter(self._context, attempts)  # type: ignore[assignment]
            node: str = ray.get_runtime_context().get_node_id()
            return node

    ray.cloudpickle.register_pickle_by_value(importlib.import_module(__name__))
    monkeypatch.setattr(isolation, "IsolatedWorker", StubWorker)
    rows = RowBuilder(run_id="test", model=work.model, settings=work.settings, classes=VOC)
    pool = Pool(min_actors=1, max_actors=1, cpus=1, gpus=0)
    with closing(ImageIsolator(work, pool, rows)) as isolator:

        def segment(uris: list[str]) -> list[dict[str, Any]]:
            isolator.segment(0, [ImageRef(uri, "e", 1, None, None) for uri in uris])
            assert not list(storage.list_objects(work.layout.singles))
            data = storage.read(work.layout.shard(0))
            rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(data)).to_pylist()
            return rows

        yield segment


def test_only_an_image_that_crashes_its_worker_twice_becomes_an_error(
    segment: Segment, tmp_path: Path
) -> None:
    rows = segment(["a", "b:crash,crash,crash", "c:crash", "d"])
    assert [row["error_kind"] for row in rows] == ["empty", "worker_died", "empty", "empty"]
    assert rows[1]["error"] == "its worker crashed 2 times with no other image in work"
    names = [path.name.split("-")[0] for path in (tmp_path / "attempts").iterdir()]
    assert sorted(names) == ["a", "b", "b", "c", "c", "d"]


def test_the_last_crash_decides_which_error_an_image_becomes(segment: Segment) -> None:
    rows = segment(["a:memory,crash", "b:crash,memory", "c:memory"])
    assert [row["error_kind"] for row in rows] == ["worker_died", "out_of_memory", "empty"]
    assert "killed 2 times to free the node's memory" in rows[1]["error"]


def test_a_bug_in_the_worker_stops_the_run_and_is_named(segment: Segment) -> None:
    with pytest.raises(RunStoppedError, match="ZeroDivisionError: a bug"):
        segment(["a", "b:bug"])


def test_an_interrupted_shard_continues_with_the_images_that_have_no_row(
    segment: Segment, tmp_path: Path
) -> None:
    with pytest.raises(RunStoppedError):
        segment(["a", "b:bug", "c"])
    assert [row["uri"] for row in segment(["a", "b:bug", "c"])] == ["a", "b:bug", "c"]
    names = [path.name.split("-")[0] for path in (tmp_path / "attempts").iterdir()]
    assert sorted(names) == ["a", "b", "b", "c"]


def test_an_image_without_a_mask_in_time_is_a_timeout(
    segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolation, "IMAGE_TIMEOUT_S", 0.0)
    [row] = segment(["a"])
    assert (row["error_kind"], row["error"]) == ("timeout", "no mask within 0 s")
