"""Read the objects from an inventory instead of a listing, in bounded memory.

An inventory is Parquet or CSV (.csv, .csv.gz, with a header) of uri, etag and size, or of S3
Inventory's bucket, key, e_tag and size; or the manifest.json that S3 Inventory writes, whose data
files are Parquet, or CSV without a header and with URL-encoded keys. It is not checked against
the bucket: an object that was deleted or replaced since becomes an error row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_plus

import duckdb

from pipeline.data import storage
from pipeline.results import files
from pipeline.text import first_line

MEMORY_LIMIT = "1GB"

_NAMES = {"e_tag": "etag", "is_latest": "latest", "is_delete_marker": "deleted"}
"""S3 Inventory's names in Parquet -> ours; in a manifest's CSV they are IsLatest, ETag, ..."""

_BUCKET_OF_ARN = re.compile(r"arn:[\w-]+:s3:::(.+)")
_CSV = "delim = ',', quote = '\"', escape = '\"', parallel = false"


@dataclass(frozen=True, kw_only=True)
class _Data:
    """The files of an inventory, and how to read them."""

    objects: list[storage.Object]
    reader: str  # a DuckDB function, with a placeholder for the file names
    decode: Callable[[str], str] = str  # of keys


class Inventory:
    """The inventory at `uri`, of objects below `prefix`.

    `outside` counts its objects that are elsewhere or not the current version. `etag` is that of
    the inventory itself. Raises ValueError if it is not an inventory, and StorageError.
    """

    def __init__(self, uri: str, prefix: str) -> None:
        self._uri = uri
        self._below = storage.join(prefix, "")
        self.outside = 0
        found = storage.stat_object(uri)
        if found is None:
            raise ValueError(f"--inventory {uri} does not exist")
        self.etag = found.etag
        self._data = _data_of(found)

    def objects(self) -> Iterator[storage.Object]:
        """Yield the objects below the prefix, in the order of the inventory."""
        data = self._data
        with files.connect(self._uri, data.objects, memory_limit=MEMORY_LIMIT) as con:
            for name, etag, size, current in self._rows(con):
                uri = self._normalized(name, data.decode)
                if uri is None or not current:
                    self.outside += 1
                elif size or not uri.endswith("/"):  # skips the "folders" that some tools create
                    yield self._checked(uri, etag, size)

    def _rows(self, con: duckdb.DuckDBPyConnection) -> Iterator[tuple[Any, ...]]:
        """Yield (uri, etag, size, whether it is the current version)."""
        data = self._data
        names = ", ".join(files.quote(files.escape_glob(each.uri)) for each in data.objects)
        source = data.reader.format(f"[{names}]")
        try:
            described = con.execute(f"describe select * from {source}").fetchall()
            query = self._query([row[0] for row in described], source)
            found = con.execute(query)
            while rows := found.fetchmany(10_000):
                yield from rows
        except duckdb.Error as error:
            reason = first_line(error)
            raise ValueError(f"--inventory {self._uri} cannot be read: {reason}") from error

    def _query(self, columns: list[str], source: str) -> str:
        ours = {_column_name(name): f'"{name}"' for name in columns}
        if "uri" in ours:
            uri = ours["uri"]
        elif {"bucket", "key"} <= ours.keys():
            uri = f"'s3://' || {ours['bucket']} || '/' || {ours['key']}"
        else:
            raise ValueError(
                f"--inventory {self._uri} has the columns {', '.join(columns)[:200]}, but needs "
                "uri (or bucket and key), etag and size; for S3's CSV without a header pass the "
                "manifest.json"
            )
        for name in ("etag", "size"):
            if name not in ours:
                raise ValueError(f"--inventory {self._uri} has no column {name}")
        current = " and ".join(
            f"coalesce(lower({ours[name]}::varchar), '{value}') = '{value}'"
            for name, value in (("latest", "true"), ("deleted", "false"))
            if name in ours
        )
        return (
            f"select {uri}, {ours['etag']}::varchar, try_cast({ours['size']} as bigint), "
            f"{current or 'true'} from {source}"
        )

    def _normalized(self, name: str | None, decode: Callable[[str], str]) -> str | None:
        """Return the URI of the object, or None if it is not below the prefix."""
        try:
            # every character of an S3 key is significant, so it is not normalized
            uri = decode(name or "")
            uri = uri if uri.startswith("s3://") else storage.normalize(uri)
        except ValueError:
            return None
        return uri if uri.startswith(self._below) else None

    def _checked(self, uri: str, etag: str | None, size: int | None) -> storage.Object:
        if not etag or size is None or size < 0:
            raise ValueError(
                f"--inventory {self._uri}: the row of {uri} has etag {etag!r} and size {size}; "
                "both must equal what a listing shows"
            )
        return storage.Object(uri, etag.strip('"'), size)


def _column_name(name: str) -> str:
    """Return our name for a column named as in Parquet, `is_latest`, or a manifest, `IsLatest`."""
    lower = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.strip()).lower()
    return _NAMES.get(lower, lower)


def _data_of(found: storage.Object) -> _Data:
    uri = found.uri.lower()
    if uri.endswith(".parquet"):
        return _Data(objects=[found], reader="read_parquet({}, hive_partitioning = false)")
    if uri.endswith((".csv", ".csv.gz")):
        return _Data(objects=[found], reader=_csv(f"{_CSV}, header = true, all_varchar = true"))
    if uri.endswith(".json"):
        try:
            return _data_of_manifest(json.loads(storage.read(found.uri)))
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"--inventory {found.uri} is not a manifest of S3 Inventory: {error!r:.200}"
            ) from None
    raise ValueError(
        f"--inventory {found.uri}: must be a .parquet, .csv or .csv.gz file, or a manifest.json"
    )


def _data_of_manifest(manifest: dict[str, Any]) -> _Data:
    bucket = manifest["destinationBucket"]
    if arn := _BUCKET_OF_ARN.fullmatch(bucket):
        bucket = arn[1]
    objects = [
        storage.Object(f"s3://{bucket}/{each['key']}", "", int(each["size"]))
        for each in manifest["files"]
    ]
    if not objects:
        raise ValueError("the manifest of the inventory lists no files")
    kind = manifest["fileFormat"].lower()
    if kind == "parquet":
        return _Data(objects=objects, reader="read_parquet({}, hive_partitioning = false)")
    if kind != "csv":
        raise ValueError(f"the inventory is {manifest['fileFormat']}; it must be Parquet or CSV")
    names = [name.strip() for name in manifest["fileSchema"].split(",")]
    columns = ", ".join(f"{files.quote(name)}: 'VARCHAR'" for name in names)
    options = f"{_CSV}, header = false, auto_detect = false, columns = {{{{{columns}}}}}"
    return _Data(objects=objects, reader=_csv(options), decode=unquote_plus)


def _csv(options: str) -> str:
    return f"read_csv({{}}, {options})"
