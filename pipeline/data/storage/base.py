"""What both kinds of storage share: an object as listed, and the one error they raise."""

from __future__ import annotations

from typing import Literal, NamedTuple

ErrorKind = Literal["access", "changed", "timeout", "vanished"]

MAX_CREATE_BYTES = 100_000_000
"""One PUT up to here; above it S3 clients go multipart, which is not put-if-absent."""

PAGE_OBJECTS = 1000
"""Objects a page of a listing: what S3 gives at most."""


class Object(NamedTuple):
    """An object as a listing shows it. `etag` is what `read` compares; `size` is in bytes."""

    uri: str
    etag: str
    size: int


class StorageError(OSError):
    """Storage said no. `kind` tells whether the object is gone, replaced, or out of reach.

    `vanished`: it was listed and is not there; `changed`: it is not the listed one any more;
    `timeout`: no answer in time, after retries; `access`: everything else that storage refuses.
    """

    def __init__(self, kind: ErrorKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def check_size(uri: str, data: bytes) -> None:
    """Raises ValueError where `data` does not fit one PUT."""
    if len(data) > MAX_CREATE_BYTES:
        raise ValueError(
            f"{uri}: {len(data)} bytes do not fit one put of at most {MAX_CREATE_BYTES}; "
            "smaller shards write smaller files"
        )
