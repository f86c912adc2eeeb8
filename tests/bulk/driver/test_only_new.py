"""--only-new skips exactly what earlier runs have done, compared with plain Python sets."""

from __future__ import annotations

import io
import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.bulk.planning.listing import ImageRef, Listing
from pipeline.bulk.settings import BulkSettings
from pipeline.data import image_formats, storage
from pipeline.results import tables
from pipeline.results.layout import RunLayout

SettingsFor = Callable[..., BulkSettings]
Row = dict[str, Any]


def _put(prefix: str, count: int) -> None:
    for i in range(count):
        storage.write(f"{prefix}/images/{i:02d}.jpg", b"x")
        if i % 2:
            storage.write(f"{prefix}/labels/{i:02d}.png", b"x")


def _row(image: ImageRef, run: str, **values: Any) -> Row:
    status = "error" if values.get("error_kind") else "ok"
    common = {"shard": 0, "model": "m", "settings": "s", "status": status, "run_id": run}
    return {**image._asdict(), **common, **values}


def _finished(results: str, run: str, rows: list[Row]) -> None:
    layout = RunLayout(results=results, run_id=run)
    done = [{name: row.get(name) for name in tables.DONE.names} for row in rows]
    storage.write(layout.done, tables.rows_to_parquet(done, tables.DONE))
    # its shards exist too, and must not count twice
    storage.write(layout.shard(0), tables.rows_to_parquet(rows, tables.IMAGES))


def _finished_in_parts(results: str, run: str, rows: list[Row]) -> None:
    """Write a finished run with a part of `done` for each row, as a large run has."""
    layout = RunLayout(results=results, run_id=run)
    *before, last = [{name: row.get(name) for name in tables.DONE.names} for row in rows]
    for number, row in enumerate(before):
        storage.write(layout.done_part(number), tables.rows_to_parquet([row], tables.DONE))
    storage.write(layout.done, tables.rows_to_parquet([last], tables.DONE))
    storage.write(layout.shard(0), tables.rows_to_parquet(rows, tables.IMAGES))


def _killed_while_writing_done(results: str, run: str, rows: list[Row]) -> None:
    """Write all shards and all parts of `done` but the last one."""
    _finished_in_parts(results, run, rows)
    storage.delete([RunLayout(results=results, run_id=run).done])


def _unfinished(results: str, run: str, rows: list[Row]) -> None:
    layout = RunLayout(results=results, run_id=run)
    for number, row in enumerate(rows):
        storage.write(layout.shard(number), tables.rows_to_parquet([row], tables.IMAGES))


def _new(settings: BulkSettings) -> tuple[list[ImageRef], int]:
    with Listing(settings, model="m", settings_print="s") as listing:
        return list(listing.images()), listing.done_before


def _names(images: list[ImageRef]) -> list[str]:
    return [Path(image.uri).stem for image in images]


def test_images_of_finished_and_unfinished_runs_are_skipped_and_counted(
    prefix: str, settings_for: SettingsFor
) -> None:
    settings = settings_for(prefix, only_new=True)
    _put(prefix, 8)
    images, before = _new(settings)
    assert (len(images), before) == (8, 0)
    _finished(settings.results, "a", [_row(image, "a") for image in images[:3]])
    _unfinished(settings.results, "b", [_row(image, "b") for image in images[2:5]])
    new, before = _new(settings)
    assert (_names(new), before) == (["05", "06", "07"], 5)
    everything = settings_for(prefix, only_new=False)
    assert len(_new(everything)[0]) == 8


@pytest.mark.parametrize("end", [_finished_in_parts, _killed_while_writing_done])
def test_complete_and_incomplete_parts_of_done_count_each_image_once(
    prefix: str, settings_for: SettingsFor, end: Callable[..., None]
) -> None:
    settings = settings_for(prefix, only_new=True)
    _put(prefix, 8)
    images, _ = _new(settings)
    end(settings.results, "a", [_row(image, "a") for image in images[:4]])
    transient = _row(images[4], "b", error_kind="timeout", error="no")
    end(settings.results, "b", [transient, _row(images[5], "b")])
    new, before = _new(settings)
    assert (_names(new), before) == (["04", "06", "07"], 5)


def test_parts_of_done_without_the_last_one_are_ignored(
    prefix: str, settings_for: SettingsFor
) -> None:
    settings = settings_for(prefix, only_new=True)
    _put(prefix, 4)
    images, _ = _new(settings)
    rows = [_row(image, "a") for image in images[:3]]
    _killed_while_writing_done(settings.results, "a", rows)
    # only the shards count, and here they hold less than the parts
    shard = RunLayout(results=settings.results, run_id="a").shard(0)
    storage.write(shard, tables.rows_to_parquet(rows[:1], tables.IMAGES))
    assert _names(_new(settings)[0]) == ["01", "02", "03"]


def test_foreign_files_beside_those_of_runs_are_ignored(
    prefix: str, settings_for: SettingsFor
) -> None:
    settings = settings_for(prefix, only_new=True)
    _put(prefix, 8)
    images, _ = _new(settings)
    _finished_in_parts(settings.results, "a", [_row(image, "a") for image in images[:3]])
    _unfinished(settings.results, "b", [_row(images[3], "b")])
    _killed_while_writing_done(settings.results, "c", [_row(image, "c") for image in images[4:6]])
    for stray in (
        "images/_SUCCESS",
        "images/README.txt",
        "images/shard-000009.parquet",
        "images/run=b/_SUCCESS",
        "images/run=b/0001.jpg",
        "images/run=b/old/shard-000000.parquet",
        "images/run=a/_SUCCESS",
        "done/_SUCCESS",
        "done/run=a/_SUCCESS",
        "done/run=a/notes.parquet",
        "done/run=c/_SUCCESS",
    ):
        storage.write(f"{settings.results}/{stray}", b"of the user")
    new, before = _new(settings)
    assert (_names(new), before) == (["06", "07"], 6)


def test_the_limit_counts_only_new_images(tmp_path: Path, settings_for: SettingsFor) -> None:
    settings = settings_for(str(tmp_path), only_new=True, limit=2)
    _put(str(tmp_path), 6)
    images, _ = _new(settings_for(str(tmp_path)))
    _finished(settings.results, "a", [_row(image, "a") for image in images[:3]])
    assert _names(_new(settings)[0]) == ["03", "04"]


def test_a_change_of_image_label_model_or_settings_makes_an_image_new(
    tmp_path: Path, settings_for: SettingsFor
) -> None:
    settings = settings_for(str(tmp_path), only_new=True)
    _put(str(tmp_path), 8)
    images, _ = _new(settings)
    changes: list[Row] = [
        {},
        {},
        {"etag": "other"},
        {"label_etag": "other"},
        {"model": "other"},
        {"settings": "other"},
        {"label_etag": "added since"},
        {"label_etag": None},
    ]
    rows = [_row(image, "a", **change) for image, change in zip(images, changes, strict=True)]
    _finished(settings.results, "a", rows)
    assert _names(_new(settings)[0]) == ["02", "03", "04", "05", "06", "07"]


@pytest.mark.parametrize("kind", sorted(tables.PERMANENT_ERRORS))
def test_a_permanent_error_is_not_retried(
    tmp_path: Path, settings_for: SettingsFor, kind: str
) -> None:
    settings = settings_for(str(tmp_path), only_new=True)
    _put(str(tmp_path), 2)
    images, _ = _new(settings)
    _finished(settings.results, "a", [_row(images[0], "a", error_kind=kind, error="no")])
    assert _names(_new(settings)[0]) == ["01"]


@pytest.mark.parametrize(
    "kind", ["access", "timeout", "worker_died", "out_of_memory", "vanished", "changed"]
)
def test_a_transient_error_is_retried_in_three_runs(
    tmp_path: Path, settings_for: SettingsFor, kind: str
) -> None:
    settings = settings_for(str(tmp_path), only_new=True)
    _put(str(tmp_path), 2)
    images, _ = _new(settings)
    found = []
    for run, write in (("a", _finished), ("b", _unfinished), ("c", _finished)):
        write(settings.results, run, [_row(images[0], run, error_kind=kind, error="no")])
        found.append(_names(_new(settings)[0]))
    assert found == [["00", "01"], ["00", "01"], ["01"]]


def test_an_image_that_succeeds_after_a_transient_error_is_done(
    tmp_path: Path, settings_for: SettingsFor
) -> None:
    settings = settings_for(str(tmp_path), only_new=True)
    _put(str(tmp_path), 2)
    images, _ = _new(settings)
    _finished(settings.results, "a", [_row(images[0], "a", error_kind="timeout", error="no")])
    _finished(settings.results, "b", [_row(images[0], "b")])
    assert _names(_new(settings)[0]) == ["01"]


def test_a_results_prefix_with_quote_and_brackets_is_read_like_any_other(
    prefix: str, settings_for: SettingsFor
) -> None:
    results = f"{prefix}/o'results [v1]*? %41 é"
    settings = settings_for(prefix, only_new=True, results=results)
    _put(prefix, 4)
    images, _ = _new(settings)
    _finished(results, "a", [_row(images[0], "a")])
    _unfinished(results, "b", [_row(images[1], "b")])
    # a name that the prefix would match as a glob pattern
    _finished(f"{prefix}/o'results v*? %41 é", "a", [_row(images[2], "a")])
    assert _names(_new(settings)[0]) == ["02", "03"]


def test_new_only_skips_images_that_only_another_model_has_done(
    prefix: str, settings_for: SettingsFor
) -> None:
    _put(prefix, 8)
    images, _ = _new(settings_for(prefix, only_new=True))
    changes: list[Row] = [
        {},
        {"model": "old"},
        {"settings": "old"},
        {"model": "old", "etag": "old"},  # another object under the same name
        {"model": "old", "label_etag": "old"},
        {"model": "old", "error_kind": "timeout"},  # no result
        {"model": "old", "error_kind": "truncated"},
    ]
    rows = [_row(image, "a", **change) for image, change in zip(images, changes, strict=False)]
    _finished(f"{prefix}/results", "a", rows)
    for answer, names in (
        (None, ["01", "02", "03", "04", "05", "06", "07"]),
        ("reprocess", ["01", "02", "03", "04", "05", "06", "07"]),
        ("new-only", ["03", "04", "05", "07"]),
    ):
        settings = settings_for(prefix, only_new=True, on_model_change=answer)
        with Listing(settings, model="m", settings_print="s") as listing:
            assert _names(list(listing.images())) == names
            assert (listing.done_before, listing.done_otherwise) == (1, 3)


def _in_old_files(results: str) -> None:
    """Rewrite all files of results as versions without format versions wrote them."""
    for item in list(storage.list_objects(results)):
        table = pq.read_table(io.BytesIO(storage.read(item.uri)))
        buffer = io.BytesIO()
        pq.write_table(table.drop_columns("format_version"), buffer)
        storage.write(item.uri, buffer.getvalue())


@pytest.mark.parametrize("write", [_finished, _unfinished, _finished_in_parts])
@pytest.mark.parametrize("old", [False, True], ids=["column", "no column"])
def test_a_raised_format_version_makes_only_images_of_its_family_new(
    prefix: str,
    settings_for: SettingsFor,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[..., None],
    old: bool,
) -> None:
    settings = settings_for(prefix, only_new=True, labels=None)
    for name in ("00.jpg", "01.png", "02.PNG", "03.webp", "04.png", "05.jpeg"):
        storage.write(f"{prefix}/images/{name}", b"x")
    images, _ = _new(settings)
    errors = {"04": "unsupported", "05": "corrupt"}
    rows = [_row(image, "a", error_kind=errors.get(Path(image.uri).stem)) for image in images]
    write(settings.results, "a", rows)
    # the same images by another model: that does not count as done otherwise
    write(settings.results, "b", [{**row, "run_id": "b", "model": "old"} for row in rows])
    if old:
        _in_old_files(settings.results)
    assert _names(_new(settings)[0]) == []
    monkeypatch.setattr(image_formats, "VERSIONS", {"png": 1})
    with Listing(settings, model="m", settings_print="s") as listing:
        new = list(listing.images())
        assert _names(new) == ["01", "02", "04"]
        assert (listing.done_before, listing.done_otherwise) == (3, 0)
    fresh = replace(settings, on_model_change="new-only")
    assert _names(_new(fresh)[0]) == ["01", "02", "04"]
    # files with and without the column are read together
    write(settings.results, "c", [_row(image, "c", format_version=1) for image in new[:2]])
    assert _names(_new(settings)[0]) == ["04"]
    monkeypatch.setattr(image_formats, "VERSIONS", {"png": 1, "jpeg": 1})
    assert _names(_new(settings)[0]) == ["00", "04", "05"]


def test_a_raised_format_version_allows_three_more_tries_of_a_transient_error(
    tmp_path: Path, settings_for: SettingsFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(str(tmp_path), only_new=True)
    _put(str(tmp_path), 1)
    [image], _ = _new(settings)
    found = []
    for run, version in (("a", 0), ("b", 0), ("c", None), ("d", 1), ("e", 1), ("f", 1)):
        row = _row(image, run, error_kind="timeout", error="no", format_version=version)
        _finished(settings.results, run, [row])
        found.append(len(_new(settings)[0]))
        if run == "c":
            monkeypatch.setattr(image_formats, "VERSIONS", {"jpeg": 1})
    assert found == [1, 1, 0, 1, 1, 0]


@pytest.mark.parametrize("seed", range(4))
def test_only_new_agrees_with_plain_sets(
    tmp_path: Path, settings_for: SettingsFor, seed: int
) -> None:
    draw = random.Random(seed)
    settings = settings_for(str(tmp_path), only_new=True)
    _put(str(tmp_path), 12)
    images, _ = _new(settings)
    kinds = [None, None, "truncated", "timeout", "timeout", "access", "vanished"]
    runs: dict[str, list[Row]] = {}
    for run, image in itertools.product("abcde", images):
        if draw.random() < 0.5:
            changes: Row = {"error_kind": draw.choice(kinds)}
            for name in ("etag", "label_etag", "model", "settings"):
                if draw.random() < 0.15:
                    changes[name] = "other"
            changes["format_version"] = draw.choice([None, 0, 0, 0, 0, 1])
            runs.setdefault(run, []).append(_row(image, run, **changes))
    for run, rows in runs.items():
        ends = [_finished, _unfinished, _finished_in_parts, _killed_while_writing_done]
        draw.choice(ends)(settings.results, run, rows)

    def is_done(image: ImageRef) -> bool:
        key = (image.uri, image.etag, image.label_etag, "m", "s")
        names = ("uri", "etag", "label_etag", "model", "settings")
        same = [
            r
            for rows in runs.values()
            for r in rows
            if tuple(r[n] for n in names) == key and not r["format_version"]
        ]
        final = any(r["error_kind"] in {None, *tables.PERMANENT_ERRORS} for r in same)
        return final or len({row["run_id"] for row in same}) >= 3

    def is_done_by_another(image: ImageRef) -> bool:
        key = (image.uri, image.etag, image.label_etag)
        same = [r for rows in runs.values() for r in rows]
        return any(
            (r["uri"], r["etag"], r["label_etag"]) == key
            and (r["model"], r["settings"]) != ("m", "s")
            and not r["format_version"]
            and r["error_kind"] in {None, *tables.PERMANENT_ERRORS}
            for r in same
        )

    new, before = _new(settings)
    assert new == [image for image in images if not is_done(image)]
    assert before == len(images) - len(new)
    fresh, _ = _new(replace(settings, on_model_change="new-only"))
    assert fresh == [image for image in new if not is_done_by_another(image)]
