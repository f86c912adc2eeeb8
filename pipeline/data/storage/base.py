"""Types and limits shared by all storage backends."""

from __future__ import annotations

from typing import Literal, NamedTuple

ErrorKind = Literal["access", "changed", "timeout", "vanished"]

MAX_CREATE_BYTES = 100_000_000
"""Largest object that `create` writes: larger ones need multipart uploads, which overwrite."""

PAGE_OBJECTS = 1000
"""Objects per page of a listing, S3's maximum."""


class Object(NamedTuple):
    """A listing entry. `etag` identifies the version, `size` is in bytes."""

    uri: str
    etag: str
    size: int


class StorageError(OSError):
    """A storage request failed. `kind` is one of:

    `vanished`: the object does not exist (any more); `changed`: it was replaced after it was
    listed; `timeout`: no response in time, after retries; `access`: any other refusal.
    """

    def __init__(self, kind: ErrorKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def check_size(uri: str, data: bytes) -> None:
    """Check that `data` fits in one PUT. Raises ValueError."""
    if len(data) > MAX_CREATE_BYTES:
        raise ValueError(
            f"{uri}: {len(data)} bytes are too large for one PUT, at most {MAX_CREATE_BYTES}; "
            "use smaller shards"
        )
