"""Layout `table`: a Parquet or CSV file with columns image, label and optionally split.

Paths are URIs, or relative to the table's folder. To check that the files exist, each folder is
listed once.
"""

from __future__ import annotations

import io
import posixpath
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from pipeline.data import storage
from pipeline.data.dataset_errors import TABLE_ENDINGS, unknown_split_error, wrong_layout_error
from pipeline.data.pairs import Pair
from pipeline.data.storage import Object, StorageError
from pipeline.text import first_line

ONLY_SPLIT = "all"
"""Name of the split of a table without a column `split`."""

_LISTERS = 16

Row = tuple[str | None, str | None, str | None]


def open_table(uri: str, splits: list[str]) -> tuple[dict[str, list[Pair]], dict[str, Object]]:
    """Return the pairs of each split in row order, and their listing entries by URI.

    Raises ValueError if a column, a value or a file is missing, or an image is listed twice.
    """
    if not uri.lower().endswith(TABLE_ENDINGS):
        raise wrong_layout_error(uri, "table")
    rows = _rows(uri)
    known = list(dict.fromkeys(split for _, _, split in rows if split))
    pairs: dict[str, list[Pair]] = {}
    for split in splits:
        if split not in known:
            raise unknown_split_error(uri, split, known, "table")
        pairs[split] = _pairs(uri, rows, split)
    wanted = {file for each in pairs.values() for pair in each for file in (pair.image, pair.label)}
    objects = _objects(wanted)
    missing = sorted(wanted - objects.keys())
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(wanted)} files listed in {uri} do not exist, the first is "
            f"{missing[0]}; add them, or remove their rows"
        )
    return pairs, objects


def _rows(uri: str) -> list[Row]:
    """Return (image, label, split) of each row, unchanged."""
    try:
        data = storage.read(uri)
    except StorageError as error:
        if error.kind != "vanished":
            raise
        raise ValueError(f"{uri} does not exist; give a .parquet or .csv table of pairs") from None
    try:
        table = _parquet(data) if uri.lower().endswith(".parquet") else _csv(data)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{uri} cannot be read: {first_line(error)}; save it as Parquet or CSV"
        ) from None
    names = list(table.column_names)
    for column in ("image", "label"):
        if names.count(column) != 1:
            raise ValueError(
                f"{uri} must have one column {column!r}, but has {names}; give image, label "
                "and, if you like, split"
            )
    if not table.num_rows:
        raise ValueError(f"{uri} has no rows; add a row for each image and its label")
    splits = _strings(table, "split") if "split" in names else [ONLY_SPLIT] * table.num_rows
    return list(zip(_strings(table, "image"), _strings(table, "label"), splits, strict=True))


def _parquet(data: bytes) -> pa.Table:
    return pq.read_table(io.BytesIO(data))


def _csv(data: bytes) -> pa.Table:
    # read as text: names like 0001 must not become numbers
    kinds = dict.fromkeys(("image", "label", "split"), pa.string())
    convert = pyarrow.csv.ConvertOptions(column_types=kinds)
    return pyarrow.csv.read_csv(io.BytesIO(data), convert_options=convert)


def _strings(table: pa.Table, column: str) -> list[str | None]:
    found: list[str | None] = table.column(column).cast(pa.string()).to_pylist()
    return found


def _pairs(uri: str, rows: list[Row], split: str) -> list[Pair]:
    folder = posixpath.dirname(uri)
    seen: dict[str, int] = {}
    found = []
    for number, (image, label, of) in enumerate(rows, start=1):
        if of != split:
            continue
        if not image or not label:
            what = "label" if image else "image"
            raise ValueError(f"row {number} of {uri} has no {what}; fill it in, or remove the row")
        pair = Pair(_absolute(folder, image), _absolute(folder, label))
        if pair.image in seen:
            raise ValueError(
                f"rows {seen[pair.image]} and {number} of {uri} both list {pair.image}; keep one "
                "(--repeat-classes repeats images)"
            )
        seen[pair.image] = number
        found.append(pair)
    return found


def _absolute(folder: str, path: str) -> str:
    """Return the URI of `path` in a table that is in `folder`."""
    if "://" in path or path.startswith("/"):
        return storage.normalize(path)
    scheme, _, place = storage.join(folder, path).rpartition("://")
    # object stores do not resolve ".."
    place = posixpath.normpath(place)
    return f"{scheme}://{place}" if scheme else place


def _objects(uris: Iterable[str]) -> dict[str, Object]:
    """Return the objects of `uris` that exist, by URI; no folder is listed twice."""
    wanted = set(uris)
    tops: list[str] = []
    for folder in sorted({posixpath.dirname(uri) + "/" for uri in wanted}):
        if not tops or not folder.startswith(tops[-1]):
            tops.append(folder)

    def listed(folder: str) -> dict[str, Object]:
        items = storage.list_objects(folder.rstrip("/"))
        return {item.uri: item for item in items if item.uri in wanted}

    found: dict[str, Object] = {}
    with ThreadPoolExecutor(_LISTERS) as pool:
        for objects in pool.map(listed, tops):
            found |= objects
    return found
