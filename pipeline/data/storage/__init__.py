"""List, read and write objects by URI, `s3://bucket/key` or a local path.

Only this package depends on S3. Objects are read and written whole, listings come in pages, and
every failure of storage is a `StorageError` with a kind. All functions are thread-safe, so that
many small objects can be fetched concurrently.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from pipeline.data.storage import local
from pipeline.data.storage.base import (
    MAX_CREATE_BYTES,
    PAGE_OBJECTS,
    ErrorKind,
    Object,
    StorageError,
)

__all__ = [
    "MAX_CREATE_BYTES",
    "PAGE_OBJECTS",
    "ErrorKind",
    "Object",
    "StorageError",
    "create",
    "delete",
    "exists",
    "filesystem",
    "join",
    "leftovers",
    "list_objects",
    "list_pages",
    "normalize",
    "read",
    "relative",
    "stat_object",
    "write",
]

_s3_import = threading.Lock()


def _backend(uri: str) -> ModuleType:
    if not uri.startswith("s3://"):
        return local
    with _s3_import:  # imported on first use: it is slow
        from pipeline.data.storage import s3
    return s3


def normalize(uri: str) -> str:
    """Return the canonical form of `uri`: `s3://bucket/key` or an absolute local path.

    Raises ValueError on an unknown scheme or an empty string.
    """
    if uri.startswith("s3://"):
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        if not bucket:
            raise ValueError(f"{uri!r} names no bucket; expected s3://bucket/prefix")
        return f"s3://{bucket}/{key.rstrip('/')}" if key.rstrip("/") else f"s3://{bucket}"
    path = uri.removeprefix("file://")
    if "://" in path or not path:
        raise ValueError(f"{uri!r} is neither s3://bucket/prefix nor a local path")
    return os.path.abspath(path)


def join(prefix: str, name: str) -> str:
    """Return the URI of `name` under `prefix`."""
    return f"{prefix.rstrip('/')}/{name}"


def relative(prefix: str, uri: str) -> str:
    """Return the part of `uri` below `prefix`; both must be normalized."""
    return uri.removeprefix(prefix.rstrip("/") + "/")


def list_pages(prefix: str, *, between: tuple[str, str] | None = None) -> Iterator[list[Object]]:
    """Yield the objects under `prefix`, one page at a time; the order depends on the server.

    With `between`, yield only URIs from its first to its last, inclusive, in byte order. On S3
    only that range is listed.
    """
    pages: Iterator[list[Object]] = _backend(prefix).list_pages(prefix, between)
    return pages


def list_objects(prefix: str, *, between: tuple[str, str] | None = None) -> Iterator[Object]:
    """Yield the objects under `prefix` one by one, holding at most one page in memory."""
    for page in list_pages(prefix, between=between):
        yield from page


def stat_object(uri: str) -> Object | None:
    """Return the object at `uri` as a listing would show it, None if it does not exist."""
    found: Object | None = _backend(uri).stat_object(uri)
    return found


def exists(uri: str) -> bool:
    """Whether there is an object at `uri`."""
    return stat_object(uri) is not None


def read(uri: str, etag: str | None = None) -> bytes:
    """Return all bytes of the object; with `etag`, only of the version listed with it.

    Raises StorageError of kind `vanished`, `changed`, `timeout` or `access`.
    """
    data: bytes = _backend(uri).read(uri, etag)
    return data


def create(uri: str, data: bytes) -> bool:
    """Write the object atomically unless one exists; return whether it was written.

    Raises ValueError above `MAX_CREATE_BYTES`, StorageError if storage refuses.
    """
    created: bool = _backend(uri).create(uri, data)
    return created


def write(uri: str, data: bytes) -> None:
    """Write the object atomically, replacing an existing one."""
    _backend(uri).write(uri, data)


def delete(uris: list[str], *, within: str | None = None) -> None:
    """Delete the objects; missing ones are not an error.

    Local folders that become empty are removed too, up to and including `within`.
    """
    if uris:
        _backend(uris[0]).delete(uris, within)


def leftovers(prefix: str) -> list[str]:
    """Return temporary files that crashed writers left under `prefix`; listings omit them."""
    found: list[str] = _backend(prefix).leftovers(prefix)
    return found


def filesystem(uri: str) -> Any | None:
    """Return an fsspec filesystem for `uri`, for libraries that take one; None for local paths."""
    if not uri.startswith("s3://"):
        return None
    from pipeline.data.storage import s3

    return s3.retrying_filesystem()
