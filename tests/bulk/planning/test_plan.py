"""The plan cuts a listing into shards, is written once, and never changes."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.bulk import settings as settings_module
from pipeline.bulk.planning import plan
from pipeline.bulk.planning.listing import ImageRef
from pipeline.bulk.planning.plan import Plan
from pipeline.bulk.settings import BulkSettings, Inference
from pipeline.data import storage
from pipeline.results.layout import RunLayout

SettingsFor = Callable[..., BulkSettings]


def _image(number: int, size: int) -> ImageRef:
    return ImageRef(f"/p/{number:05d}.jpg", f"e{number}", size, None, None)


def _put(prefix: str, count: int) -> None:
    for i in range(count):
        storage.write(f"{prefix}/images/{i:03d}.jpg", b"x" * i)


def _make(settings: BulkSettings, *, model: str = "m", write: bool = True) -> Plan:
    return plan.make(settings, _layout(settings), settings.identity(model=model), write=write)


def _layout(settings: BulkSettings) -> RunLayout:
    return RunLayout(results=settings.results, run_id=settings.run_id or "none")


def _shards(settings: BulkSettings, made: Plan) -> list[list[ImageRef]]:
    """Return the shards in the plan's parts, after checking their numbers."""
    rows = [
        row for part in made.parts for row in plan.read_part(_layout(settings), part).to_pylist()
    ]
    assert [row["shard"] for row in rows] == list(range(len(rows)))
    return [[ImageRef(**image) for image in row["images"]] for row in rows]


def _cut_by_hand(images: list[ImageRef], most: int, limit: int, huge: int) -> list[list[ImageRef]]:
    shards: list[list[ImageRef]] = [[]]
    for image in images:
        together = [*shards[-1], image]
        if shards[-1] and (
            len(together) > most or sum(p.bytes for p in together if p.bytes <= huge) > limit
        ):
            shards.append([])
        shards[-1].append(image)
    return [shard for shard in shards if shard]


@pytest.mark.parametrize("seed", range(8))
def test_shards_respect_images_and_bytes_and_order(settings_for: SettingsFor, seed: int) -> None:
    draw = random.Random(seed)
    images = [_image(i, draw.choice([0, 1, 30, 60, 99, 100, 101, 5000])) for i in range(300)]
    most, limit, huge = draw.choice([(1, 50, 100), (4, 100, 100), (64, 150, 4999), (3, 1, 5000)])
    settings = settings_for(
        "/x",
        shard_images=most,
        shard_bytes=limit,
        inference=Inference(max_object_bytes=huge),
    )
    shards = list(plan.cut(iter(images), settings))
    assert shards == _cut_by_hand(images, most, limit, huge)
    assert [image for shard in shards for image in shard] == images


def test_an_object_over_the_limit_counts_as_zero_bytes(settings_for: SettingsFor) -> None:
    settings = settings_for("/x", shard_bytes=100, inference=Inference(max_object_bytes=1000))
    images = [_image(0, 60), _image(1, 1001), _image(2, 40), _image(3, 1000), _image(4, 1)]
    shards = list(plan.cut(iter(images), settings))
    assert [[image.bytes for image in shard] for shard in shards] == [[60, 1001, 40], [1000], [1]]
    assert list(plan.cut(iter([]), settings)) == []


def test_label_bytes_count_toward_the_size_of_a_shard(settings_for: SettingsFor) -> None:
    settings = settings_for("/x", shard_bytes=100, inference=Inference(max_object_bytes=80))
    sizes = [(10, 40), (10, 40), (10, None), (60, 30), (10, 0), (81, 80), (10, 81)]
    images = [_image(i, size)._replace(label_bytes=label) for i, (size, label) in enumerate(sizes)]
    # objects of 81 bytes are not fetched, nor is the label of an image of 81 bytes
    expected = [sizes[:2], sizes[2:4], sizes[4:]]
    shards = plan.cut(iter(images), settings)
    assert [[(each.bytes, each.label_bytes) for each in shard] for shard in shards] == expected


def test_the_plan_holds_every_image_once_in_parts_of_bounded_size(
    prefix: str, settings_for: SettingsFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "MAX_PART_SHARDS", 3)
    _put(prefix, 20)
    storage.write(f"{prefix}/images/note.txt", b"")
    storage.write(f"{prefix}/labels/004.png", b"label")
    settings = settings_for(prefix, shard_images=2)
    made = _make(settings)
    shards = _shards(settings, made)
    flat = [image for shard in shards for image in shard]
    assert [storage.relative(f"{prefix}/images", image.uri) for image in flat] == [
        f"{i:03d}.jpg" for i in range(20)
    ]
    assert [(part.first_shard, part.shards) for part in made.parts] == [
        *((0, 3), (3, 3), (6, 3), (9, 1)),
    ]
    assert made.counts == plan.PlanCounts(
        images=20, bytes=sum(range(20)), shards=10, labels=1, left_out=1, done_before=0
    )
    assert plan.load(_layout(settings)) == made


def test_a_part_holds_at_most_as_many_images_as_fit_one_put(
    tmp_path: Path, settings_for: SettingsFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "MAX_PART_IMAGES", 5)
    _put(str(tmp_path), 20)
    settings = settings_for(str(tmp_path), shard_images=2)
    made = _make(settings)
    assert [part.shards for part in made.parts] == [2, 2, 2, 2, 2]
    assert len(_shards(settings, made)) == 10


def test_a_part_equals_the_listing_column_by_column(
    prefix: str, settings_for: SettingsFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "MAX_PART_SHARDS", 3)
    names = [f"{i:02d} é'%2e.jpg" for i in range(11)]
    for i, name in enumerate(names):
        storage.write(f"{prefix}/images/{name}", b"x" * (i % 4))
        if i % 3:  # null in the columns that hold the labels of others
            storage.write(f"{prefix}/labels/{name[:-4]}.png", b"y" * i)
    settings = settings_for(prefix, shard_images=2)
    made = _make(settings)
    etags = {o.uri: o.etag for place in ("images", "labels") for o in _listed(prefix, place)}
    found = []
    for part in made.parts:
        table = plan.read_part(_layout(settings), part)
        assert table.schema.equals(plan.SHARDS)
        assert table["shard"].to_pylist() == list(part.numbers)
        found += [image for images in table["images"].to_pylist() for image in images]
    for i, (name, image) in enumerate(zip(names, found, strict=True)):
        uri, label = f"{prefix}/images/{name}", f"{prefix}/labels/{name[:-4]}.png"
        wanted = {"uri": uri, "etag": etags[uri], "bytes": i % 4}
        labels = (label, etags[label], i) if i % 3 else (None, None, None)
        names_of_labels = ("label_uri", "label_etag", "label_bytes")
        assert image == {**wanted, **dict(zip(names_of_labels, labels, strict=True))}


def _listed(prefix: str, place: str) -> list[storage.Object]:
    return list(storage.list_objects(f"{prefix}/{place}"))


def test_planning_again_returns_the_first_plan(prefix: str, settings_for: SettingsFor) -> None:
    _put(prefix, 5)
    settings = settings_for(prefix, shard_images=2)
    first = _make(settings)
    storage.write(f"{prefix}/images/later.jpg", b"later")
    storage.delete([f"{prefix}/images/000.jpg"])
    second = _make(settings)
    assert second == first
    assert len([image for shard in _shards(settings, second) for image in shard]) == 5


def test_a_dry_plan_writes_nothing(tmp_path: Path, settings_for: SettingsFor) -> None:
    _put(str(tmp_path), 5)
    settings = settings_for(str(tmp_path))
    assert _make(settings, write=False).counts.images == 5
    assert plan.load(_layout(settings)) is None
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({"limit": 2}, "limit"),
        ({"shard_images": 7}, "shard-images"),
        ({"include": ("*.jpg",)}, "include"),
        ({"labels": None}, "labels"),
        ({"only_new": True}, "only-new"),
        ({"only_new": True, "on_model_change": "new-only"}, "on-model-change"),
        ({"inference": Inference(flip=True)}, "flip"),
        ({"inference": Inference(scales=(0.5, 1.0))}, "scales"),
        ({"model": "other"}, "model"),
    ],
)
def test_other_settings_or_another_checkpoint_are_refused_by_name(
    tmp_path: Path, settings_for: SettingsFor, changed: dict[str, Any], names: str
) -> None:
    _put(str(tmp_path), 3)
    settings = settings_for(str(tmp_path))
    made = _make(settings)
    plan.check_same(made, settings.identity(model="m"))
    model = changed.pop("model", "m")
    other = replace(settings, **changed)
    for refuse in (
        lambda: plan.check_same(made, other.identity(model=model)),
        lambda: _make(other, model=model),
    ):
        with pytest.raises(ValueError, match=f"another {names} .*pass another --run-id") as error:
            refuse()
        assert "\n" not in str(error.value)


def test_a_value_that_only_one_side_has_counts_as_different(
    tmp_path: Path, settings_for: SettingsFor
) -> None:
    _put(str(tmp_path), 1)
    settings = settings_for(str(tmp_path))
    made = _make(settings)
    identity = settings.identity(model="m")
    other = replace(settings, inventory="/inventory.csv").identity(model="m")
    with pytest.raises(ValueError, match=r"another inventory \(not given, now /inventory.csv\)"):
        plan.check_same(made, other)
    with pytest.raises(ValueError, match=r"another inventory \(/inventory.csv, now not given\)"):
        plan.check_same(replace(made, identity=other), identity)
    for name, value in (("limit", None), ("flip", False)):
        less = {key: each for key, each in identity.items() if key != name}
        with pytest.raises(ValueError, match=rf"another {name} \({value}, now not given\)"):
            plan.check_same(made, less)
        with pytest.raises(ValueError, match=rf"another {name} \(not given, now {value}\)"):
            plan.check_same(replace(made, identity=less), identity)


def test_an_unfinished_run_keeps_the_default_patterns_of_its_plan(
    prefix: str, settings_for: SettingsFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    _put(prefix, 3)
    storage.write(f"{prefix}/images/new.heic", b"x")
    before = settings_for(prefix, run_id=None)
    identity = before.identity(model="m")
    run_id = plan.run_id_of(before, identity)
    layout = RunLayout(results=before.results, run_id=run_id)
    made = plan.make(before, layout, identity)
    assert (made.counts.images, made.counts.left_out) == (3, 1)

    former = settings_module.IMAGE_PATTERNS
    patterns = (*former, "*.heic")
    monkeypatch.setattr(settings_module, "IMAGE_PATTERNS", patterns)
    after = replace(before, include=patterns)
    identity = after.identity(model="m")
    assert plan.run_id_of(after, identity) != run_id
    with pytest.raises(ValueError, match="another include"):
        plan.check_same(made, identity)

    monkeypatch.setattr(settings_module, "FORMER_IMAGE_PATTERNS", (("*.jpg",), former))
    assert plan.run_id_of(after, identity) == run_id
    plan.check_same(made, identity)
    assert plan.make(after, layout, identity) == made
    with pytest.raises(ValueError, match="another limit"):
        plan.check_same(made, replace(after, limit=3).identity(model="m"))
    given = replace(after, include=("*.png",)).identity(model="m")
    with pytest.raises(ValueError, match="another include"):
        plan.check_same(made, given)

    storage.write(layout.record, b"finished")
    fresh = RunLayout(results=after.results, run_id=plan.run_id_of(after, identity))
    assert fresh.run_id != run_id
    assert plan.make(after, fresh, identity).counts.images == 4


def test_drivers_that_plan_at_once_agree_on_one_complete_plan(
    prefix: str, settings_for: SettingsFor
) -> None:
    settings = settings_for(prefix, shard_images=2)
    _put(prefix, 9)
    start = threading.Barrier(4)

    def driver(number: int) -> Plan:
        start.wait()
        storage.write(f"{prefix}/images/new-{number}.jpg", b"new")  # each lists different images
        return _make(settings)

    with ThreadPoolExecutor(4) as pool:
        plans = list(pool.map(driver, range(4)))
    assert all(each == plans[0] for each in plans)
    assert plan.load(_layout(settings)) == plans[0]
    shards = _shards(settings, plans[0])
    assert sum(map(len, shards)) == plans[0].counts.images >= 10


def test_the_same_arguments_resume_an_unfinished_run_only(
    prefix: str, settings_for: SettingsFor
) -> None:
    _put(prefix, 2)
    settings = settings_for(prefix, run_id=None)
    identity = settings.identity(model="m")
    today = plan.run_id_of(settings, identity)
    assert today == plan.run_id_of(settings, identity)
    assert today != plan.run_id_of(settings, settings.identity(model="n"))
    before = RunLayout(results=settings.results, run_id=f"2001-02-03-{today[11:]}")
    plan.make(settings, before, identity)
    assert plan.run_id_of(settings, identity) == before.run_id
    storage.write(before.record, b"finished")
    assert plan.run_id_of(settings, identity) == today
    assert plan.run_id_of(replace(settings, run_id="mine"), identity) == "mine"


def test_only_new_gives_each_run_of_a_day_its_own_id(
    tmp_path: Path, fill: Any, settings_for: SettingsFor
) -> None:
    fill(str(tmp_path), 1)
    settings = replace(settings_for(str(tmp_path), only_new=True), run_id=None)
    identity = settings.identity(model="m")
    names = []
    for _ in range(3):
        layout = RunLayout(results=settings.results, run_id=plan.run_id_of(settings, identity))
        plan.make(settings, layout, identity)
        assert plan.run_id_of(settings, identity) == layout.run_id  # resumed until it is finished
        storage.write(layout.record, b"done")
        names.append(layout.run_id)
    assert names[1:] == [f"{names[0]}-2", f"{names[0]}-3"]
