"""Small real images with labels, and broken ones, under a prefix; settings to segment them.

Under the prefix: `images/` and `labels/` (written by `fill` and `fill_broken`), `results/`.
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
from tests.bulk.made_runs import FinalizerFor, Rows, make_finalizer
from tests.small_images import DEMO, encode, small_image

BROKEN = {
    "broken/empty.jpg": "empty",
    "broken/text.jpg": "not_an_image",
    "broken/truncated.jpg": "truncated",
}
"""Objects that `fill_broken` writes to `images/`, and the error kind that each must become."""

BAD_LABELS = {"bad-label/size.png": "but its image is", "bad-label/class.png": "class 77"}
"""Good images of `fill_broken` whose label has another size, or a class out of range."""

Fill = Callable[[str, int], None]
SettingsFor = Callable[..., BulkSettings]


@pytest.fixture(scope="session", name="small_image")
def _small_image() -> Callable[[int], tuple[str, bytes, bytes]]:
    """`small_image(number)`: name, image and label."""
    return small_image


@pytest.fixture(scope="session")
def fill() -> Fill:
    """`fill(prefix, count)` writes `count` images with their labels."""

    def put(prefix: str, count: int) -> None:
        for number in range(count):
            name, image, label = small_image(number)
            storage.write(f"{prefix}/images/{name}", image)
            storage.write(f"{prefix}/labels/{name.rpartition('.')[0]}.png", label)

    return put


@pytest.fixture(scope="session")
def fill_broken() -> Callable[[str], None]:
    """`fill_broken(prefix)` writes the objects of BROKEN, and the images of BAD_LABELS."""

    def put(prefix: str) -> None:
        _, jpeg, label = small_image(1)
        contents = (b"", b"this is a letter, not an image\n", jpeg[: len(jpeg) // 2])
        for name, data in zip(BROKEN, contents, strict=True):
            storage.write(f"{prefix}/images/{name}", data)
        ids = Image.open(io.BytesIO(label))
        larger = encode(ids.resize((ids.width + 1, ids.height)), "PNG")
        strange = encode(Image.new("L", ids.size, 77), "PNG")
        for name, data in zip(BAD_LABELS, (larger, strange), strict=True):
            storage.write(f"{prefix}/images/{name[:-4]}.jpg", jpeg)
            storage.write(f"{prefix}/labels/{name}", data)

    return put


@pytest.fixture(scope="session")
def broken_kinds() -> dict[str, str]:
    """Name under `images/` -> error kind, for the objects of `fill_broken`."""
    return dict(BROKEN)


@pytest.fixture(scope="session")
def bad_labels() -> dict[str, str]:
    """Name under `images/` -> part of the label error, for the images of `fill_broken`."""
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
            "images": f"{prefix}/images",
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
    """`work_for(settings, **changes)`: the context of the run's workers."""

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
    """`listed(settings)`: the images of the run's future plan."""

    def images(
        settings: BulkSettings, *, model: str = "m", settings_print: str = "s"
    ) -> list[ImageRef]:
        with Listing(settings, model=model, settings_print=settings_print) as listing:
            return list(listing.images())

    return images


@pytest.fixture
def finalizer_for() -> Iterator[FinalizerFor]:
    """`finalizer_for(prefix, rows)`: an open finalizer of a run with these rows, and its layout."""
    with contextlib.ExitStack() as stack:

        def make(prefix: str, rows: Rows) -> tuple[RunFinalizer, RunLayout]:
            finalizer, layout = make_finalizer(prefix, rows)
            return stack.enter_context(finalizer), layout

        yield make
