"""List, read and write by URI: `s3://bucket/key` and local paths alike.

This room alone knows what S3 is. Objects are read and written whole; a listing comes page by
page; every refusal of storage is a `StorageError` with a kind. All functions may be called from
many threads at once: that is how many small objects are fetched quickly.
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
    with _s3_import:  # only who uses S3 pays for importing it
        from pipeline.data.storage import s3
    return s3


def normalize(uri: str) -> str:
    """The one spelling of `uri`: `s3://bucket/key`, or an absolute local path.

    Raises ValueError for a scheme that is not known, or an empty string.
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
    """The URI of `name` below `prefix`."""
    return f"{prefix.rstrip('/')}/{name}"


def relative(prefix: str, uri: str) -> str:
    """The part of `uri` below `prefix`, both normalised."""
    return uri.removeprefix(prefix.rstrip("/") + "/")


def list_pages(prefix: str, *, between: tuple[str, str] | None = None) -> Iterator[list[Object]]:
    """The objects below `prefix`, a page at a time, in an order that differs between servers.

    With `between`, those whose URIs are from its first to its last in the order of their bytes,
    which costs S3 no more than these.
    """
    pages: Iterator[list[Object]] = _backend(prefix).list_pages(prefix, between)
    return pages


def list_objects(prefix: str, *, between: tuple[str, str] | None = None) -> Iterator[Object]:
    """The objects below `prefix`, one by one; no more than a page is held."""
    for page in list_pages(prefix, between=between):
        yield from page


def stat_object(uri: str) -> Object | None:
    """The object at `uri` as a listing would show it, None where there is none."""
    found: Object | None = _backend(uri).stat_object(uri)
    return found


def exists(uri: str) -> bool:
    """Whether there is an object at `uri`."""
    return stat_object(uri) is not None


def read(uri: str, etag: str | None = None) -> bytes:
    """All bytes of the object. With `etag`, exactly the object that was listed with it.

    Raises StorageError: `vanished`, `changed`, `timeout` or `access`.
    """
    data: bytes = _backend(uri).read(uri, etag)
    return data


def create(uri: str, data: bytes) -> bool:
    """Puts the object unless one exists; whether it was put. Readers never see half of it.

    Raises ValueError above `MAX_CREATE_BYTES`, StorageError where storage refuses.
    """
    created: bool = _backend(uri).create(uri, data)
    return created


def write(uri: str, data: bytes) -> None:
    """Puts the object over what was there. Readers see the old one or the new one."""
    _backend(uri).write(uri, data)


def delete(uris: list[str], *, within: str | None = None) -> None:
    """Deletes the objects; those that are gone already are fine.

    Local folders that become empty go too, up to and including `within`.
    """
    if uris:
        _backend(uris[0]).delete(uris, within)


def leftovers(prefix: str) -> list[str]:
    """What killed writers left below `prefix`, invisible to listings."""
    found: list[str] = _backend(prefix).leftovers(prefix)
    return found


def filesystem(uri: str) -> Any | None:
    """The fsspec filesystem behind `uri`, for libraries that take one; None for local paths."""
    if not uri.startswith("s3://"):
        return None
    from pipeline.data.storage import s3

    return s3.retrying_filesystem()
