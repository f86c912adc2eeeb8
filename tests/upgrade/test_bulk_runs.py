"""Bulk runs that version 84b697e began or finished, in the hands of this one."""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from jobs import clean, query, report, segment
from pipeline.data import image_formats, masks, storage
from pipeline.model import devices

pytestmark = [pytest.mark.s3, pytest.mark.usefixtures("inputs")]

Flags = dict[str, Any]
Upload = Callable[[str], str]
Stored = Callable[[str], dict[str, str]]

IMAGES = 20
SAME_PIXELS = 0.85 if devices.has_bf16(torch.device("cpu")) else 0.999
"""The least share of a mask's pixels that is the same on another CPU. The stored masks are of fp32,
which gave the same pixels with AVX2 and with SSE4.1; bf16 gave 0.92 of them in the worst mask."""


def run_of(results: str) -> str:
    """The only run that has a plan below `results`."""
    [run] = {each.uri.split("/run=")[1].split("/")[0] for each in listed(f"{results}/plans")}
    return run


def listed(uri: str) -> list[storage.Object]:
    return list(storage.list_objects(uri))


def plan_of(results: str) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads(
        storage.read(f"{results}/plans/run={run_of(results)}/plan.json")
    )
    return plan


def table(uri: str) -> list[dict[str, Any]]:
    """The rows of all Parquet files below `uri`, by file."""
    files = sorted(each.uri for each in listed(uri))
    tables = [pq.read_table(io.BytesIO(storage.read(file))) for file in files]
    return [row for each in tables for row in each.to_pylist()]


def facts(out: str) -> dict[str, str]:
    """Key and value of the last line."""
    words = shlex.split(out.splitlines()[-1])
    return dict(word.split("=", 1) for word in words if "=" in word)


def planned_uris(results: str) -> list[str]:
    plan = plan_of(results)
    parts = [f"{results}/plans/run={plan['run_id']}/{part['name']}" for part in plan["parts"]]
    rows = [pq.read_table(io.BytesIO(storage.read(part))).to_pylist() for part in parts]
    return [image["uri"] for part in rows for shard in part for image in shard["images"]]


def assert_same_rows(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """One row an image, and the same but for what rounding may change in a mask."""
    by_mask = ("mask", "confidence", "classes")
    assert [row["uri"] for row in found] == [row["uri"] for row in expected]
    for mine, theirs in zip(found, expected, strict=True):
        for name in theirs.keys() - {*by_mask, "error"}:
            assert mine[name] == theirs[name], (mine["uri"], name)
        assert (mine["mask"] is None) == (theirs["mask"] is None)
        if mine["mask"] is not None:
            pixels = masks.decode(mine["mask"]) == masks.decode(theirs["mask"])
            assert pixels.mean() >= SAME_PIXELS, (mine["uri"], pixels.mean())
            assert mine["confidence"] == pytest.approx(theirs["confidence"], abs=0.05)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_an_unfinished_run_is_resumed_and_gets_the_rows_of_an_undisturbed_one(
    upload: Upload, stored: Stored, flags: Flags, capsys: pytest.CaptureFixture[str]
) -> None:
    results, reference = upload("killed"), upload("finished")
    run = run_of(results)
    before = stored(results)
    [usage] = [json.loads(storage.read(each.uri)) for each in listed(f"{results}/usage")]
    assert segment.main([*flags["bulk"], "--results", results]) == 0
    out = capsys.readouterr().out
    assert facts(out)["run"] == run
    after = stored(results)
    kept = {name: tag for name, tag in before.items() if not name.startswith(("usage/", "leases/"))}
    assert kept.items() <= after.items()
    assert not [name for name in after if name.startswith(("usage/", "leases/", "singles/"))]
    found, expected = (table(f"{each}/images/run={run}") for each in (results, reference))
    assert sorted(row["uri"] for row in found) == planned_uris(results)
    assert_same_rows(found, expected)
    done = [table(f"{each}/done") for each in (results, reference)]
    assert [[row[name] for name in done[1][0]] for row in done[0]] == [
        list(row.values()) for row in done[1]
    ]
    [mine], [theirs] = (table(f"{each}/runs") for each in (results, reference))
    same = (
        *("run_id", "arguments", "model", "settings", "checkpoint", "checkpoint_sha256"),
        *("images", "ok", "errors", "label_errors", "errors_by_kind", "shards"),
    )
    assert {name: mine[name] for name in same} == {name: theirs[name] for name in same}
    assert mine["bytes_read"] > usage["bytes_read"] > 0  # of a driver of that version
    assert mine["actor_seconds"] > usage["actor_seconds"] > 0
    classes = table(f"{results}/classes")
    assert len(classes) == sum(len(row["classes"] or ()) for row in found)
    # files of both versions in one view
    assert query.main([results, "select * from images", "--format", "json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert sorted(row["uri"] for row in shown) == planned_uris(results)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_run_with_an_inventory_that_was_only_planned_is_done_as_planned(
    upload: Upload, flags: Flags, capsys: pytest.CaptureFixture[str]
) -> None:
    results, reference = upload("planned"), upload("finished")
    given = [*flags["bulk"], *flags["planned"], "--results", results]
    assert segment.main(given) == 0
    run = run_of(results)
    assert facts(capsys.readouterr().out)["run"] == run
    # its leases were of that version too, and this one knows them by their names
    assert not listed(f"{results}/leases")
    found, expected = table(f"{results}/images"), table(f"{reference}/images")
    assert_same_rows(found, [{**row, "run_id": run} for row in expected[: len(found)]])
    assert len(found) == 4


def test_a_finished_run_is_left_as_it_is(
    upload: Upload, stored: Stored, flags: Flags, capsys: pytest.CaptureFixture[str]
) -> None:
    results = upload("finished")
    before = stored(results)
    assert segment.main([*flags["bulk"], "--results", results, "--run-id", run_of(results)]) == 0
    out = capsys.readouterr().out
    assert "nothing to do" in out
    assert facts(out)["images"] == str(IMAGES)
    assert stored(results) == before


def test_only_new_finds_nothing_new_after_a_finished_run(
    upload: Upload, flags: Flags, capsys: pytest.CaptureFixture[str]
) -> None:
    results = upload("finished")
    given = [*flags["bulk"], "--results", results, "--only-new", "--dry-run"]
    assert segment.main([*given, "--calibration-images", "0"]) == 0
    found = facts(capsys.readouterr().out)
    assert (found["images"], found["done_before"]) == ("0", str(IMAGES))


def test_only_new_knows_what_an_unfinished_run_has_done(
    upload: Upload, flags: Flags, capsys: pytest.CaptureFixture[str]
) -> None:
    results = upload("killed")
    done = len(table(f"{results}/images"))
    assert 0 < done < IMAGES
    given = [*flags["bulk"], "--results", results, "--only-new", "--dry-run"]
    assert segment.main([*given, "--calibration-images", "0"]) == 0
    found = facts(capsys.readouterr().out)
    assert (found["images"], found["done_before"]) == (str(IMAGES - done), str(done))


@pytest.mark.parametrize("changed", [["--scales", "1"], ["--no-flip"], ["--window", "513"]])
def test_only_new_with_another_setting_sees_that_others_have_done_all(
    upload: Upload, flags: Flags, capsys: pytest.CaptureFixture[str], changed: list[str]
) -> None:
    results = upload("finished")
    given = [*flags["bulk"], *changed, "--results", results, "--only-new"]
    assert segment.main(given) == 2
    [line] = capsys.readouterr().out.splitlines()
    assert f"{IMAGES} of these" in line


def test_only_new_after_a_format_changed_sees_only_its_images(
    upload: Upload,
    flags: Flags,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = upload("finished")
    monkeypatch.setattr(image_formats, "VERSIONS", {"webp": 1})
    given = [*flags["bulk"], "--results", results, "--only-new", "--dry-run"]
    assert segment.main([*given, "--calibration-images", "0"]) == 0
    found = facts(capsys.readouterr().out)
    changed = sum(row["uri"].endswith(".webp") for row in table(f"{results}/done"))
    assert 0 < changed < IMAGES
    assert found["images"] == str(changed)
    assert found["done_before"] == str(IMAGES - changed)


CHANGED: dict[str, tuple[list[str], str]] = {
    "a limit": (["--limit", "5"], "limit"),
    "other scales": (["--scales", "1"], "scales"),
    "no mirrored images": (["--no-flip"], "flip"),
    "another output stride": (["--output-stride", "8"], "output.stride"),
    "another window": (["--window", "513"], "window"),
    "another overlap": (["--window-overlap", "129"], "window.overlap"),
    "another threshold": (["--window-above", "1000"], "window.above"),
    "fewer pixels": (["--max-pixels", "1000"], "max.pixels"),
    "smaller objects": (["--max-object-bytes", "1000"], "max.object.bytes"),
    "other patterns": (["--include", "*.jpg"], "include"),
    "larger shards": (["--shard-images", "3"], "shard.images"),
    "smaller shards": (["--shard-bytes", "1000"], "shard.bytes"),
    "other images": (["--images", "{prefix}/photos/0"], "images"),
    "other labels": (["--labels", "{prefix}/labels/0"], "labels"),
    "no labels": (["--labels", "None"], "labels"),
    "an inventory": (["--inventory", "{prefix}/inventory.csv"], "inventory"),
    "only what is new": (["--only-new"], "only.new"),
    "an answer to a changed model": (["--only-new", "--model-changed", "new-only"], "model.chang"),
    "another checkpoint": (["--checkpoint", "{prefix}/init.safetensors"], "model"),
}


@pytest.mark.parametrize("what", CHANGED)
def test_an_unfinished_run_is_refused_with_one_value_changed_or_added(
    upload: Upload,
    stored: Stored,
    flags: Flags,
    capsys: pytest.CaptureFixture[str],
    what: str,
) -> None:
    more, name = CHANGED[what]
    results = upload("killed")
    prefix = results.removesuffix("/killed")
    assert_refused(
        [*flags["bulk"], *(each.format(prefix=prefix) for each in more)],
        results, name, stored, capsys,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("flag", "values", "name"),
    [
        ("--inventory", 1, "inventory"),
        ("--model-changed", 1, "model.chang"),
        ("--limit", 1, "limit"),
    ],
)
def test_a_planned_run_is_refused_without_one_of_its_flags(
    upload: Upload,
    stored: Stored,
    flags: Flags,
    capsys: pytest.CaptureFixture[str],
    flag: str,
    values: int,
    name: str,
) -> None:
    planned = list(flags["planned"])
    at = planned.index(flag)
    del planned[at : at + 1 + values]
    assert_refused([*flags["bulk"], *planned], upload("planned"), name, stored, capsys)


@pytest.mark.parametrize("name", ["flip", "max_pixels", "labels", "limit"])
def test_a_run_whose_plan_lacks_a_value_is_refused(
    upload: Upload,
    stored: Stored,
    flags: Flags,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    results = upload("killed")
    rewrite_identity(results, lambda identity: identity.pop(name))
    shown = name.replace("_", ".")
    assert_refused([*flags["bulk"]], results, shown, stored, capsys)


@pytest.mark.parametrize("value", [3, None])
def test_a_run_whose_plan_has_an_unknown_value_is_refused(
    upload: Upload,
    stored: Stored,
    flags: Flags,
    capsys: pytest.CaptureFixture[str],
    value: int | None,
) -> None:
    results = upload("killed")
    rewrite_identity(results, lambda identity: identity.update(sharpness=value))
    assert_refused([*flags["bulk"]], results, "sharpness", stored, capsys)


def rewrite_identity(results: str, change: Callable[[dict[str, Any]], object]) -> None:
    plan = plan_of(results)
    change(plan["identity"])
    uri = f"{results}/plans/run={plan['run_id']}/plan.json"
    storage.write(uri, json.dumps(plan).encode())


def assert_refused(
    given: list[str],
    results: str,
    name: str,
    stored: Stored,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The flags do not resume the run below `results`, because of the value called `name`."""
    before = stored(results)
    assert segment.main([*given, "--results", results, "--run-id", run_of(results)]) == 2
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("segment failed exit=2 reason=")
    assert re.search(rf"\b{name}\w* \(", line), line
    assert stored(results) == before


RUN_IDS = json.loads((Path(__file__).parent / "84b697e" / "flags.json").read_text())["run_ids"]


@pytest.mark.parametrize("given", RUN_IDS)
def test_run_ids_follow_from_the_arguments_as_they_did(
    flags: Flags, capsys: pytest.CaptureFixture[str], given: str
) -> None:
    results = f"{flags['common'][1].rpartition('/')[0]}/none"
    dry = ["--results", results, "--dry-run", "--calibration-images", "0"]
    assert segment.main([*flags["common"], *given.split(), *dry]) == 0
    date = re.compile(r"\d{4}-\d\d-\d\d-")
    run = facts(capsys.readouterr().out)["run"]
    assert date.match(run)
    assert date.sub("", run) == date.sub("", RUN_IDS[given])


def test_views_show_runs_of_both_kinds_with_all_columns(
    upload: Upload, capsys: pytest.CaptureFixture[str]
) -> None:
    killed, finished = upload("killed"), upload("finished")
    done = len(table(f"{killed}/images"))
    count = (
        "select (select count(*) from images) as images, (select count(*) from latest) as latest, "
        "(select count(*) from runs) as runs, (select count(distinct uri) from classes) as classes"
    )
    assert query.main([finished, count, "--format", "json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert row == {"images": IMAGES, "latest": IMAGES - 2, "runs": 1, "classes": IMAGES - 2}
    assert query.main([killed, count, "--format", "json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert (row["images"], row["runs"]) == (done, 0)
    for view in ("images", "classes", "runs", "iou"):
        assert query.main([finished, f"select * from {view}", "--format", "json"]) == 0
        assert json.loads(capsys.readouterr().out)
    ious = "select class_id, iou from iou where iou is not null order by class_id"
    assert query.main([finished, ious, "--format", "json"]) == 0
    [recorded] = table(f"{finished}/runs")
    expected = {each["class_id"]: each["iou"] for each in recorded["class_iou"]}
    found = {each["class_id"]: each["iou"] for each in json.loads(capsys.readouterr().out)}
    assert found == {k: pytest.approx(iou) for k, iou in expected.items() if iou is not None}


def test_a_report_of_a_finished_run_is_drawn(upload: Upload, tmp_path: Path) -> None:
    results = upload("finished")
    out = tmp_path / "report.html"
    assert report.main([results, "--run-id", run_of(results), "--out", str(out)]) == 0
    assert f"{results}" in out.read_text()


@pytest.mark.parametrize("place", ["killed", "finished", "planned"])
def test_a_run_is_deleted_with_all_that_it_wrote(upload: Upload, place: str) -> None:
    results = upload(place)
    assert clean.main([results, "--run-id", run_of(results)]) == 0
    left = [each.uri for each in listed(results)]
    assert [uri for uri in left if "/leases/only-new-" not in uri] == []
