"""Who is condemned where processes die with one photo on them, in every word of Ray for it."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pyarrow.parquet as pq
import pytest
import ray

from pipeline.bulk.driver import isolation
from pipeline.bulk.driver.actor_pool import Pool
from pipeline.bulk.driver.isolation import ImageIsolator
from pipeline.bulk.planning.listing import Listed
from pipeline.bulk.worker.rows import RowBuilder
from pipeline.bulk.worker.segmenter import WorkerContext
from pipeline.data import storage
from pipeline.data.labels import VOC
from pipeline.results import tables

Segmented = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def segmented(
    tmp_path: Any,
    settings_for: Any,
    work_for: Callable[..., WorkerContext],
    monkeypatch: pytest.MonkeyPatch,
) -> Segmented:
    """`segmented(names, deaths)`: a shard's rows; the words of its deaths are taken one by one."""
    work = work_for(settings_for(str(tmp_path)))
    rows = RowBuilder(run_id="test", model=work.model, settings=work.settings, classes=VOC)
    monkeypatch.setattr(ImageIsolator, "_started", lambda *_: "node")
    monkeypatch.setattr(isolation, "_is_alive", lambda node: node == "node")

    def segment(names: list[str], deaths: dict[str, list[Exception]]) -> list[dict[str, Any]]:
        def answer(photo: Listed, **_: Any) -> bytes:
            if words := deaths.get(photo.uri):
                raise words.pop(0)
            row = rows.error(0, photo, "empty", "as good as any row")
            return tables.rows_to_parquet([row], tables.with_footer(tables.IMAGES, VOC))

        monkeypatch.setattr(ray, "get", answer)
        stage = ImageIsolator(work, Pool(min_actors=1, max_actors=1, cpus=1, gpus=0), rows)
        actor = Mock()
        actor.file_of.remote = lambda shard, photo: photo
        stage._stage = Mock(remote=lambda *_: actor)
        stage.segment(0, [Listed(name, "e", 1, None, None) for name in names])
        found: list[dict[str, Any]] = pq.read_table(
            io.BytesIO(storage.read(work.layout.shard(0)))
        ).to_pylist()
        return found

    return segment


def test_a_photo_for_which_ray_kills_its_process_twice_is_out_of_memory_and_no_other_is(
    segmented: Segmented,
) -> None:
    killed = ray.exceptions.OutOfMemoryError("the node runs out of memory")
    rows = segmented(["a", "b", "c"], {"b": [killed, killed], "c": [killed]})
    assert [row["error_kind"] for row in rows] == ["empty", "out_of_memory", "empty"]
    assert "killed 2 times to save the node's memory" in rows[1]["error"]


def test_a_photo_with_which_its_process_dies_twice_is_condemned_for_how_it_died_last(
    segmented: Segmented,
) -> None:
    killed = ray.exceptions.OutOfMemoryError("the node runs out of memory")
    died = ray.exceptions.ActorDiedError()
    rows = segmented(["a", "b"], {"a": [killed, died], "b": [died, killed]})
    assert [row["error_kind"] for row in rows] == ["worker_died", "out_of_memory"]
