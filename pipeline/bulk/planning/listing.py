"""List the images of a bucket with their labels, in order, except those of earlier runs.

Listings are spooled to local disk page by page; DuckDB joins and sorts them there, so memory is
bounded by its limit, not by the size of the bucket.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.bulk.planning.inventory import Inventory
from pipeline.bulk.settings import BulkSettings
from pipeline.data import image_formats, storage
from pipeline.data.pairs import stem
from pipeline.results import files, tables
from pipeline.results.layout import RunLayout, filter_parts, filter_shards, run_id_of

MEMORY_LIMIT = "1GB"
MAX_RUNS_TRIED = 3
"""Runs in which --only-new retries an image that failed for a transient reason."""

_SPOOLED = pa.schema(
    [
        ("uri", pa.string()),
        ("etag", pa.string()),
        ("bytes", pa.int64()),
        ("stem", pa.string()),
        ("format_version", pa.int16()),
    ]
)
_Spooled = tuple[str, str, int, str, int]
_SPOOL_ROWS = 50_000
_LABEL_ENDINGS = (".png", ".bmp", ".gif", ".tif", ".tiff")

_HAS_RESULT = f"""(status = 'ok' or error_kind in ({
    ", ".join(f"'{kind}'" for kind in sorted(tables.PERMANENT_ERRORS))
}))"""
_IS_DONE = f"""
    select uri, etag, label_etag, coalesce(format_version, 0) as format_version from seen
    where model = $model and settings = $settings
    group by all
    having bool_or{_HAS_RESULT} or count(distinct run_id) >= {MAX_RUNS_TRIED}
"""
_IS_DONE_OTHERWISE = f"""
    select distinct uri, etag, label_etag, coalesce(format_version, 0) as format_version from seen
    where (model != $model or settings != $settings) and {_HAS_RESULT}
"""
_SAME_IMAGE = """
    {0}.uri = {1}.uri and {0}.etag = {1}.etag
    and {0}.label_etag is not distinct from {1}.label_etag
    and {0}.format_version = {1}.format_version
"""


class ImageRef(NamedTuple):
    """An image in the plan, with its label if it has one."""

    uri: str
    etag: str
    bytes: int
    label_uri: str | None
    label_etag: str | None
    label_bytes: int | None = None


class Listing:
    """The images that `settings` select; a context manager, since it spools to disk.

    `left_out` counts the objects that --include does not match, `outside` those of an inventory
    that are not below --images or not the current version. With --only-new, `done_before` counts
    the images that earlier runs processed, which are left out, and `done_otherwise` those processed
    only with another model or other settings, which --on-model-change new-only leaves out.
    Raises ValueError if there are no images, labels are ambiguous, or the inventory is invalid.
    """

    def __init__(self, settings: BulkSettings, *, model: str, settings_print: str) -> None:
        self._settings = settings
        self._key = {"model": model, "settings": settings_print}
        self.left_out = 0
        self._inventory = (
            None if settings.inventory is None else Inventory(settings.inventory, settings.images)
        )
        self.done_before = 0
        self.done_otherwise = 0

    def __enter__(self) -> Listing:
        self._folder = tempfile.TemporaryDirectory(prefix="deeplab-plan-")
        self._con = files.connect(self._settings.results, memory_limit=MEMORY_LIMIT)
        self._spool("image", self._images())
        self._check_inventory()
        self._spool("label", self._labels())
        self._check_labels()
        self._con.execute(
            "create view listed as select image.uri, image.etag, image.bytes, "
            "label.uri as label_uri, label.etag as label_etag, label.bytes as label_bytes, "
            "image.format_version "
            "from image left join label using (stem)"
        )
        self._con.execute("create view wanted as " + self._wanted())
        return self

    def __exit__(self, *_: object) -> None:
        self._con.close()
        self._folder.cleanup()

    def images(self) -> Iterator[ImageRef]:
        """Yield the images in the order of the bytes of their URIs, at most `limit`."""
        limit = "" if self._settings.limit is None else f" limit {self._settings.limit}"
        found = self._con.execute(
            f"select {', '.join(ImageRef._fields)} from wanted order by uri{limit}"
        )
        while rows := found.fetchmany(10_000):
            yield from map(ImageRef._make, rows)

    def _images(self) -> Iterator[_Spooled]:
        prefix, included = self._settings.images, self._settings.included
        found = False
        for item in self._objects():
            name = storage.relative(prefix, item.uri)
            if self._is_excluded(item.uri):
                continue
            if included.match(name):
                found = True
                yield (*_row(item), stem(name), image_formats.version_of(item.uri))
            else:
                self.left_out += 1
        if not found:
            raise ValueError(
                f"no images below {prefix}: --include matches none of its {self.left_out} objects"
                if self.left_out
                else f"no images below {prefix}: {self._why_empty()}"
            )

    def _objects(self) -> Iterator[storage.Object]:
        if self._inventory is not None:
            return self._inventory.objects()
        return storage.list_objects(self._settings.images)

    @property
    def inventory_etag(self) -> str | None:
        """The ETag of the inventory, or None without an inventory."""
        return self._inventory.etag if self._inventory else None

    @property
    def outside(self) -> int:
        return self._inventory.outside if self._inventory else 0

    def _why_empty(self) -> str:
        if self._inventory is None:
            return "it is empty"
        return f"all {self.outside} objects of {self._settings.inventory} are in other places"

    def _is_excluded(self, uri: str) -> bool:
        """Return whether the object is a run's, or a label or result nested below the images."""
        images, results = storage.join(self._settings.images, ""), self._settings.results
        places = (storage.join(place, "") for place in (results, self._settings.labels) if place)
        inside = tuple(place for place in places if place != images and place.startswith(images))
        return uri.startswith(inside) or run_id_of(results, uri) is not None

    def _labels(self) -> Iterator[_Spooled]:
        prefix = self._settings.labels
        for item in storage.list_objects(prefix) if prefix is not None else ():
            if item.uri.lower().endswith(_LABEL_ENDINGS):
                yield (*_row(item), stem(storage.relative(prefix or "", item.uri)), 0)

    def _spool(self, name: str, rows: Iterable[_Spooled]) -> None:
        path = Path(self._folder.name) / f"{name}.parquet"
        with pq.ParquetWriter(path, _SPOOLED, compression="zstd") as writer:
            for batch in _batches(rows):
                columns = [list(column) for column in zip(*batch, strict=True)]
                writer.write_table(pa.table(columns, schema=_SPOOLED))
        self._con.execute(f"create view {name} as from read_parquet({files.quote(str(path))})")

    def _check_inventory(self) -> None:
        """Raise ValueError if the inventory has conflicting rows for one object.

        Exact duplicates are dropped.
        """
        if self._inventory is None:
            return
        self._con.execute("alter view image rename to image_rows")
        self._con.execute("create view image as select distinct * from image_rows")
        twice = self._con.execute(
            "select uri from image group by uri having count(*) > 1 order by uri limit 1"
        ).fetchone()
        if twice is not None:
            raise ValueError(
                f"--inventory {self._settings.inventory} has conflicting rows for {twice[0]}; "
                "the inventory of a bucket with versions needs the column IsLatest"
            )

    def _check_labels(self) -> None:
        for what, rows in (
            ("labels", "label semi join image using (stem)"),
            ("images share one label", "image semi join label using (stem)"),
        ):
            twice = self._con.execute(
                f"select min(uri), max(uri) from {rows} group by stem having count(*) > 1 "
                "order by 1 limit 1"
            ).fetchone()
            if twice is not None:
                raise ValueError(
                    f"two {what}: {twice[0]} and {twice[1]} differ only in their extension; "
                    "rename one, or narrow --include"
                )

    def _wanted(self) -> str:
        """Return the query for the images to plan: all listed ones, or those not done yet."""
        if not self._settings.only_new:
            return "from listed"
        files.load_table(
            self._con, "seen", tables.DONE, self._settings.results, self._done_before()
        )
        for name, query in (("done", _IS_DONE), ("done_otherwise", _IS_DONE_OTHERWISE)):
            self._con.execute(f"create table {name} as {query}", self._key)
        is_done = _SAME_IMAGE.format("listed", "done")
        self.done_before = self._count(f"listed semi join done on {is_done}")
        new = f"from listed anti join done on {is_done}"
        self._con.execute(f"create view new as {new}")
        is_done_otherwise = _SAME_IMAGE.format("new", "done_otherwise")
        self.done_otherwise = self._count(f"new semi join done_otherwise on {is_done_otherwise}")
        if self._settings.on_model_change == "new-only":
            return f"from new anti join done_otherwise on {is_done_otherwise}"
        return new

    def _count(self, rows: str) -> int:
        [(count,)] = self._con.execute(f"select count(*) from {rows}").fetchall()
        return int(count)

    def _done_before(self) -> Iterator[storage.Object]:
        """Yield the `done/` files of finished runs, then the shards of unfinished ones."""
        results = self._settings.results
        keys = list(storage.list_objects(storage.join(results, "done")))
        last = {run: item for item in keys if (run := _finished_run(results, item.uri))}
        yield from last.values()
        yield from (item for item in filter_parts(keys) if run_id_of(results, item.uri) in last)
        for shard in filter_shards(storage.list_objects(storage.join(results, "images"))):
            if run_id_of(results, shard.uri) not in last:
                yield shard


def _finished_run(results: str, uri: str) -> str | None:
    """Return the run whose last `done/` file this is, or None."""
    run = run_id_of(results, uri)
    return run if run and uri == RunLayout(results=results, run_id=run).done else None


def _row(item: storage.Object) -> tuple[str, str, int]:
    return item.uri, item.etag, item.size


def _batches(
    rows: Iterable[_Spooled],
) -> Iterator[list[_Spooled]]:
    batch: list[_Spooled] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _SPOOL_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch
