"""Disk cache of a bucket's objects on one node, so that later epochs do not download them again.

All processes of a node may share the folder: a file is written atomically, under a name derived
from the object's URI and etag, with a digest of its bytes. So a read returns the version that was
listed, never an older one or half a file. Which objects are cached follows from the listing alone
and is the same in every process; the others are downloaded each time. Nothing is evicted.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path

from pipeline.checks import check_at_least
from pipeline.data import storage
from pipeline.data.storage import Object, StorageError

logger = logging.getLogger(__name__)

MIN_FREE_FRACTION = 0.1
"""Fraction of the disk left free whatever the limit: a node with a full disk fails."""

_DIGEST_BYTES = 16


class NodeCache:
    """A callable that returns an object's bytes by URI, from `folder` if they are cached there.

    `objects` are the splits' objects as listed; `max_bytes` limits the whole folder, including
    files of other data sets and older versions. Local paths and URIs that were not listed bypass
    the cache. Can be pickled: each process inspects its own node's disk on the first read.
    """

    def __init__(self, folder: str | Path, objects: Iterable[Object], *, max_bytes: int) -> None:
        """Raise ValueError if `max_bytes` is negative; 0 caches nothing."""
        check_at_least("max_bytes", max_bytes, 0, "0 caches nothing")
        self._folder = Path(folder)
        self._objects = {item.uri: item for item in objects if item.uri.startswith("s3://")}
        self._max_bytes = max_bytes
        self._cached: frozenset[str] | None = None  # URIs; None until the first read
        self._warned = False

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self._folder, tuple(self._objects.values()), self._max_bytes)

    def __call__(self, uri: str) -> bytes:
        """Return all bytes of the object. Raises StorageError as `storage.read` does."""
        item = self._objects.get(uri)
        if item is None:
            return storage.read(uri)
        if uri not in self._cacheable():
            return storage.read(uri, item.etag)
        path = self._path(item)
        data = _verified(path)
        if data is None:
            data = storage.read(uri, item.etag)
            self._store(path, data)
        return data

    @property
    def fits(self) -> bool:
        """Whether this node has room for all objects, so that a second epoch downloads nothing."""
        return not self._objects or len(self._cacheable()) == len(self._objects)

    def _path(self, item: Object) -> Path:
        name = hashlib.sha256(f"{item.uri}\n{item.etag}".encode()).hexdigest()
        return self._folder / name[:2] / name

    def _cacheable(self) -> frozenset[str]:
        if self._cached is None:
            self._cached = self._choose()
        return self._cached

    def _choose(self) -> frozenset[str]:
        """Return the URIs, taken in listing order, that fit beside the folder's other files."""
        ours = {str(self._path(item)) for item in self._objects.values()}
        try:
            present = list(storage.list_objects(str(self._folder)))
        except StorageError as error:
            logger.warning("cache disabled, every epoch downloads the data set again: %s", error)
            return frozenset()
        room = self._max_bytes - sum(item.size for item in present if item.uri not in ours)
        chosen = []
        for item in self._objects.values():
            room -= item.size + _DIGEST_BYTES
            if room < 0:
                break
            chosen.append(item.uri)
        return frozenset(chosen)

    def _store(self, path: Path, data: bytes) -> None:
        """Write the file atomically; if the disk refuses, warn once and go without the cache."""
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            for folder in (self._folder, path.parent):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            disk = shutil.disk_usage(path.parent)
            if disk.free - len(data) < MIN_FREE_FRACTION * disk.total:
                raise OSError(f"more than {1 - MIN_FREE_FRACTION:.0%} of the disk is in use")
            try:
                # no fsync: a file torn by a crash fails its digest check
                temporary.write_bytes(_digest(data) + data)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            if not self._warned:
                logger.warning("cannot cache objects in %s: %s", self._folder, error)
            self._warned = True


def _rebuild(folder: Path, objects: tuple[Object, ...], max_bytes: int) -> NodeCache:
    return NodeCache(folder, objects, max_bytes=max_bytes)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()


def _verified(path: Path) -> bytes | None:
    """Return the bytes cached at `path`, or None if they are missing or corrupt."""
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    data = stored[_DIGEST_BYTES:]
    return data if stored[:_DIGEST_BYTES] == _digest(data) else None
