"""The estimate of a dry run agrees with a loop that writes all images."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.bulk.driver import estimate
from pipeline.bulk.driver.actor_pool import Pool
from pipeline.bulk.driver.estimate import Estimate, StratifiedSample
from pipeline.bulk.planning import plan
from pipeline.bulk.planning.listing import ImageRef
from pipeline.bulk.worker.segmenter import Segmenter
from pipeline.results.layout import RunLayout

POOL = Pool(min_actors=1, max_actors=4, cpus=2, gpus=0.5)


def _images(count: int) -> list[ImageRef]:
    return [ImageRef(f"{i:06d}", "e", i, None, None) for i in range(count)]


@pytest.mark.parametrize("count", [0, 1, 23, 24, 25, 48, 100, 1000, 12_345])
def test_a_sample_is_evenly_spaced_over_a_stream_of_any_length(count: int) -> None:
    sample, images = StratifiedSample(24), _images(count)
    assert list(sample.observe(iter(images))) == images
    numbers = [image.bytes for image in sample.images()]
    assert len(numbers) == len(set(numbers)) == min(24, count)
    assert numbers == sorted(numbers)
    # every eighth of the images has one
    gaps = [b - a for a, b in zip([0, *numbers], [*numbers, count], strict=True)]
    assert max(gaps) <= max(1, count / 8)


def test_hours_and_seconds_are_those_worked_by_hand() -> None:
    found = Estimate(
        images=7200,
        pool=POOL,
        sampled=24,
        sampled_s=12.0,
        errors=0,
        bytes_written=0,
        device="",
        load=0.0,
    )
    assert found.seconds_per_image == 0.5
    assert found.actor_hours == 1.0  # 7200 times half a second
    assert found.seconds == 900.0  # by four actors
    assert (found.cpu_hours, found.gpu_hours) == (2.0, 0.5)


@pytest.mark.slow
def test_time_and_bytes_are_close_to_those_of_a_loop_over_all_images(
    tmp_path: Path,
    fill: Any,
    settings_for: Any,
    work_for: Any,
    listed: Callable[..., list[ImageRef]],
) -> None:
    fill(str(tmp_path), 48)
    settings = settings_for(str(tmp_path), labels=None)
    work = work_for(settings)
    images = listed(settings)
    found = estimate.measure(work, POOL, images[::4], total=48, shards=3)
    assert (found.sampled, found.errors) == (12, 0)
    assert not (tmp_path / "results").exists()
    segmenter = Segmenter(work)
    segmenter.rows_of(0, images[:1])
    started = time.monotonic()
    sizes = [len(segmenter.rows_of(i, images[16 * i : 16 * i + 16])[0]) for i in range(3)]
    seconds = time.monotonic() - started
    segmenter.close()
    assert found.bytes_written == pytest.approx(sum(sizes), rel=0.3)
    assert 0.2 < found.actor_hours * 3600 / seconds < 5  # the machine does other work too


def test_a_sample_of_a_written_plan_is_spread_over_its_shards(
    tmp_path: Path, fill: Any, settings_for: Any, work_for: Any
) -> None:
    fill(str(tmp_path), 40)
    settings = settings_for(str(tmp_path), shard_images=3)
    layout = RunLayout(results=settings.results, run_id="test")
    made = plan.make(settings, layout, settings.identity(model="m"))
    rows = plan.read_part(layout, made.parts[0]).to_pylist()
    order = [image["uri"] for row in rows for image in row["images"]]
    sample = estimate.sample_plan(work_for(settings), made, 8)
    places = [order.index(image.uri) for image in sample]
    assert len(places) == 8
    assert places == sorted(set(places))
    assert places[0] < 5
    assert places[-1] >= 30
