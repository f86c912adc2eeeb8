"""A bucket of small real photos with their labels, and of objects that are none.

Below a prefix: `photos/` (what `fill` and `fill_broken` put), `labels/`, `results/`.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import pytest
from PIL import Image

from pipeline.bulk.driver.finalize import RunFinalizer
from pipeline.bulk.planning.listing import ImageRef, Listing
from pipeline.bulk.settings import BulkSettings, fingerprint
from pipeline.bulk.worker.segmenter import WorkerContext
from pipeline.data import storage
from pipeline.model.weights import checkpoint_fingerprint
from pipeline.results.layout import RunLayout
from tests.bulk.finishing import Made, Rows, opened_finish
from tests.small_images import DEMO, encoded, photo

BROKEN = {
    "broken/empty.jpg": "empty",
    "broken/text.jpg": "not_an_image",
    "broken/truncated.jpg": "truncated",
}
"""What `fill_broken` puts below `photos/`, and the kind of error that each must become."""

BAD_LABELS = {"bad-label/size.png": "but its image is", "bad-label/class.png": "class 77"}
"""Good photos of `fill_broken` whose label is of another size, or holds a class out of range."""

Fill = Callable[[str, int], None]
SettingsFor = Callable[..., BulkSettings]


@pytest.fixture(scope="session")
def photo_of() -> Callable[[int], tuple[str, bytes, bytes]]:
    """number -> name, photo and label."""
    return photo


@pytest.fixture(scope="session")
def fill() -> Fill:
    """`fill(prefix, count)` puts so many photos with their labels."""

    def put(prefix: str, count: int) -> None:
        for number in range(count):
            name, image, label = photo(number)
            storage.write(f"{prefix}/photos/{name}", image)
            storage.write(f"{prefix}/labels/{name.rpartition('.')[0]}.png", label)

    return put


@pytest.fixture(scope="session")
def fill_broken() -> Callable[[str], None]:
    """`fill_broken(prefix)` puts the objects of BROKEN, and the photos of BAD_LABELS."""

    def put(prefix: str) -> None:
        _, jpeg, label = photo(1)
        contents = (b"", b"this is a letter, not a photo\n", jpeg[: len(jpeg) // 2])
        for name, data in zip(BROKEN, contents, strict=True):
            storage.write(f"{prefix}/photos/{name}", data)
        ids = Image.open(io.BytesIO(label))
        larger = encoded(ids.resize((ids.width + 1, ids.height)), "PNG")
        strange = encoded(Image.new("L", ids.size, 77), "PNG")
        for name, data in zip(BAD_LABELS, (larger, strange), strict=True):
            storage.write(f"{prefix}/photos/{name[:-4]}.jpg", jpeg)
            storage.write(f"{prefix}/labels/{name}", data)

    return put


@pytest.fixture(scope="session")
def broken_kinds() -> dict[str, str]:
    """Name below `photos/` -> kind of error, for what `fill_broken` puts."""
    return dict(BROKEN)


@pytest.fixture(scope="session")
def bad_labels() -> dict[str, str]:
    """Name below `photos/` -> part of its label's error, for what `fill_broken` puts."""
    return {f"{name[:-4]}.jpg": message for name, message in BAD_LABELS.items()}


@pytest.fixture(scope="session")
def checkpoint() -> str:
    """A real DeepLabv3 of 4 MB with VOC's classes."""
    return str(DEMO / "tfzoo-voc-mobilenetv2.safetensors")


@pytest.fixture
def settings_for(checkpoint: str) -> SettingsFor:
    """`settings_for(prefix, **overrides)`: one actor with one CPU over the prefix's folders."""

    def settings(prefix: str, **overrides: Any) -> BulkSettings:
        values = {
            "images": f"{prefix}/photos",
            "labels": f"{prefix}/labels",
            "results": f"{prefix}/results",
            "checkpoint": checkpoint,
            "run_id": "test",
            "cpus_per_actor": 1,
            "max_error_fraction": 1.0,
        }
        return BulkSettings(**{**values, **overrides})

    return settings


@pytest.fixture
def work_for() -> Callable[..., WorkerContext]:
    """`work_for(settings, **changes)`: what a segmenter of that run is given."""

    def work(settings: BulkSettings, **changes: Any) -> WorkerContext:
        values = {
            "layout": RunLayout(results=settings.results, run_id=settings.run_id or "test"),
            "images": settings.images,
            "labels": settings.labels,
            "checkpoint": settings.checkpoint,
            "model": checkpoint_fingerprint(storage.read(settings.checkpoint)),
            "settings": fingerprint(asdict(settings.inference)),
            "inference": settings.inference,
            "batch_images": settings.batch_images or 1,
            "cpus": settings.cpus_per_actor or 1,
            "gpu": False,
        }
        return WorkerContext(**{**values, **changes})

    return work


@pytest.fixture
def listed() -> Callable[..., list[ImageRef]]:
    """`listed(settings)`: the photos that the plan would hold."""

    def images(
        settings: BulkSettings, *, model: str = "m", settings_print: str = "s"
    ) -> list[ImageRef]:
        with Listing(settings, model=model, settings_print=settings_print) as listing:
            return list(listing.images())

    return images


@pytest.fixture
def finish_of() -> Iterator[Made]:
    """Makes the files of a run of these rows below a prefix; the end of that run, opened."""
    with contextlib.ExitStack() as opened:

        def made(prefix: str, rows: Rows) -> tuple[RunFinalizer, RunLayout]:
            finishing, layout = opened_finish(prefix, rows)
            return opened.enter_context(finishing), layout

        yield made
