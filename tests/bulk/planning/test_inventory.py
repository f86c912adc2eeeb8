"""An inventory gives the same images as a listing; invalid rows are refused by name."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.bulk.planning import plan
from pipeline.bulk.planning.listing import ImageRef, Listing
from pipeline.bulk.settings import BulkSettings
from pipeline.data import storage
from pipeline.results.layout import RunLayout

SettingsFor = Callable[..., BulkSettings]
Rows = list[dict[str, Any]]

NAMES = [
    *("a b.jpg", 'it\'s "so".jpg', "[x]*?.jpg", "%2e%2F.jpg", "é.jpg", "猫.jpg", "a+b&c=d.jpg"),
    *("a,b.jpg", "#1.jpg", "{}.jpg", "a/b/c.jpg", "a\nb.jpg", "Z.jpg", "notes.txt"),
]


def _put(prefix: str) -> list[storage.Object]:
    for i, name in enumerate(NAMES):
        storage.write(f"{prefix}/images/{name}", b"x" * i)
    return list(storage.list_objects(f"{prefix}/images"))


def _listed(settings: BulkSettings) -> tuple[list[ImageRef], int, int]:
    with Listing(settings, model="m", settings_print="s") as listing:
        return list(listing.images()), listing.left_out, listing.outside


def _plain(objects: list[storage.Object]) -> Rows:
    return [item._asdict() for item in reversed(objects)]


def _s3s(objects: list[storage.Object]) -> Rows:
    rows = []
    for item in objects:
        bucket, _, key = item.uri.removeprefix("s3://").partition("/")
        rows.append({"bucket": bucket, "key": key, "size": item.size, "e_tag": item.etag})
    return rows


def _parquet(rows: Rows, uri: str) -> str:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    storage.write(uri, buffer.getvalue())
    return uri


def _csv_bytes(rows: Sequence[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows(rows)
    return text.getvalue().encode()


def _csv(rows: Rows, uri: str) -> str:
    data = _csv_bytes([list(rows[0]), *(list(row.values()) for row in rows)])
    storage.write(uri, gzip.compress(data) if uri.endswith(".gz") else data)
    return uri


def _manifest(prefix: str, rows: Rows, kind: str) -> str:
    """Write two data files and their manifest as S3 Inventory does; return the manifest's URI."""
    bucket, _, key = f"{prefix}/inventory".removeprefix("s3://").partition("/")
    data = []
    for number, part in enumerate((rows[:3], rows[3:])):
        name = f"data/{number}.{'csv.gz' if kind == 'CSV' else 'parquet'}"
        uri = f"{prefix}/inventory/{name}"
        if kind == "CSV":
            cells = [[r["bucket"], quote_plus(r["key"]), r["size"], r["e_tag"]] for r in part]
            storage.write(uri, gzip.compress(_csv_bytes(cells)))
        else:
            _parquet(part, uri)
        found = storage.stat_object(uri)
        assert found is not None
        data.append({"key": f"{key}/{name}", "size": found.size, "MD5checksum": "0"})
    schema = "Bucket, Key, Size, ETag" if kind == "CSV" else "message s3.inventory { ... }"
    manifest = {
        "sourceBucket": bucket,
        "destinationBucket": f"arn:aws:s3:::{bucket}",
        "version": "2016-11-30",
        "fileFormat": kind,
        "fileSchema": schema,
        "files": data,
    }
    storage.write(f"{prefix}/inventory/manifest.json", json.dumps(manifest).encode())
    return f"{prefix}/inventory/manifest.json"


@pytest.mark.parametrize("ending", ["parquet", "csv", "csv.gz"])
def test_an_inventory_gives_the_same_images_as_a_listing(
    prefix: str, settings_for: SettingsFor, ending: str
) -> None:
    rows = _plain(_put(prefix))
    rows += rows[:2]  # duplicates
    rows.append({"uri": f"{prefix}/elsewhere/x.jpg", "etag": "e", "size": 1})
    write = _parquet if ending == "parquet" else _csv
    uri = write(rows, f"{prefix}/o'inventory [1] é.{ending}")
    images, left_out, outside = _listed(settings_for(prefix, labels=None, inventory=uri))
    listed, *_ = _listed(settings_for(prefix, labels=None))
    assert images == listed
    assert (len(images), left_out, outside) == (len(NAMES) - 1, 1, 1)


@pytest.mark.s3
@pytest.mark.parametrize("kind", ["CSV", "Parquet", "its Parquet alone"])
def test_an_s3_inventory_gives_the_same_images_as_a_listing(
    s3_prefix: str, settings_for: SettingsFor, kind: str
) -> None:
    rows = _s3s(_put(s3_prefix))
    rows.append({"bucket": "other", "key": "x.jpg", "size": 1, "e_tag": "e"})
    if kind == "its Parquet alone":
        uri = _parquet(rows, f"{s3_prefix}/i.parquet")
    else:
        uri = _manifest(s3_prefix, rows, kind)
    images, left_out, outside = _listed(settings_for(s3_prefix, labels=None, inventory=uri))
    listed, *_ = _listed(settings_for(s3_prefix, labels=None))
    assert images == listed
    assert (len(images), left_out, outside) == (len(NAMES) - 1, 1, 1)


def test_old_versions_and_deleted_objects_are_left_out_and_counted(
    tmp_path: Path, settings_for: SettingsFor
) -> None:
    image = {"uri": f"{tmp_path}/images/a.jpg", "etag": "now", "size": 1}
    rows = [
        {**image, "is_latest": True, "is_delete_marker": False},
        {**image, "etag": "before", "is_latest": False, "is_delete_marker": False},
        {**image, "uri": f"{tmp_path}/images/b.jpg", "is_latest": True, "is_delete_marker": True},
    ]
    for uri in (_parquet(rows, f"{tmp_path}/i.parquet"), _csv(rows, f"{tmp_path}/i.csv")):
        images, _, outside = _listed(settings_for(str(tmp_path), labels=None, inventory=uri))
        assert [(each.uri, each.etag) for each in images] == [(image["uri"], "now")]
        assert outside == 2


@pytest.mark.parametrize(
    "name", ["{0}/images/../secret.jpg", "{0}/imagesx/a.jpg", "gs://b/images/a.jpg", "", None]
)
def test_objects_outside_the_images_prefix_are_never_read(
    tmp_path: Path, settings_for: SettingsFor, name: str | None
) -> None:
    uri = None if name is None else name.format(tmp_path)
    inventory = _parquet([{"uri": uri, "etag": "e", "size": 1}], f"{tmp_path}/i.parquet")
    settings = settings_for(str(tmp_path), labels=None, inventory=inventory)
    with pytest.raises(ValueError, match=r"all 1 objects of .*i\.parquet are in other places"):
        _listed(settings)


GOOD = {"uri": "{0}/images/a.jpg", "etag": "e", "size": 1}
REFUSED: dict[str, tuple[Rows, str]] = {
    "no etag": ([{**GOOD, "etag": None}], r"a\.jpg has etag None and size 1"),
    "no size": ([{**GOOD, "size": None}], r"a\.jpg has etag 'e' and size None"),
    "a size that is not a number": ([{**GOOD, "size": "big"}], r"size None"),
    "a negative size": ([{**GOOD, "size": -1}], r"size -1"),
    "no column of sizes": ([{"uri": "x", "etag": "e"}], "has no column size"),
    "other columns": ([{"name": "x", "size": 1}], "has the columns name, size, but needs uri"),
    "two etags": ([GOOD, {**GOOD, "etag": "f"}], r"has conflicting rows for .*a\.jpg"),
}


@pytest.mark.parametrize("write", [_parquet, _csv])
@pytest.mark.parametrize("what", REFUSED)
def test_an_invalid_inventory_is_refused_in_one_line(
    tmp_path: Path, settings_for: SettingsFor, what: str, write: Callable[[Rows, str], str]
) -> None:
    rows, message = REFUSED[what]
    rows = [{n: v.format(tmp_path) if n == "uri" else v for n, v in r.items()} for r in rows]
    inventory = write(rows, f"{tmp_path}/i.{write.__name__[1:]}")
    if what == "no etag" and write is _csv:
        message = message.replace("None", "(None|'')", 1)
    settings = settings_for(str(tmp_path), labels=None, inventory=inventory)
    with pytest.raises(ValueError, match=message) as refused:
        _listed(settings)
    assert "\n" not in str(refused.value)
    assert inventory in str(refused.value)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("i.parquet", b"no Parquet", "cannot be read"),
        ("i.csv.gz", b"no gzip", "cannot be read"),
        ("i.orc", b"ORC", r"must be a \.parquet, \.csv or \.csv\.gz file, or a manifest\.json"),
        ("manifest.json", b"{}", "not a manifest of S3 Inventory"),
        ("manifest.json", b"[", "not a manifest of S3 Inventory"),
        ("none.csv", None, "does not exist"),
    ],
)
def test_a_file_that_is_not_an_inventory_is_refused_in_one_line(
    tmp_path: Path, settings_for: SettingsFor, name: str, data: bytes | None, message: str
) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    settings = settings_for(str(tmp_path), labels=None, inventory=f"{tmp_path}/{name}")
    with pytest.raises(ValueError, match=message) as refused:
        _listed(settings)
    assert "\n" not in str(refused.value)


def test_another_inventory_under_the_same_run_id_is_refused(
    tmp_path: Path, settings_for: SettingsFor
) -> None:
    uri = _parquet(_plain(_put(str(tmp_path))), f"{tmp_path}/i.parquet")
    settings = settings_for(str(tmp_path), labels=None, inventory=uri)
    layout = RunLayout(results=settings.results, run_id="test")
    identity = settings.identity(model="m")
    made = plan.make(settings, layout, identity)
    found = storage.stat_object(uri)
    assert found is not None
    assert made == plan.load(layout)
    assert (made.identity["inventory"], made.inventory_etag) == (uri, found.etag)
    other = settings_for(str(tmp_path), labels=None, inventory=f"{uri}.csv")
    with pytest.raises(ValueError, match="another inventory"):
        plan.check_same(made, other.identity(model="m"))
