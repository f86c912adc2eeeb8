"""Objects of a bucket kept on a node's disk, so that an epoch does not download the set again.

Every process of a node may read and fill the same folder at once: a file appears whole, under a
name made of the object's URI and etag, and carries a digest of its bytes. So what is served is
what was listed: never an older version, never half a file. What fits is decided from the listing,
the same in every process; the rest is read through each time, and nothing is ever thrown out.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path

from pipeline.data import storage
from pipeline.data.storage import Object, StorageError

logger = logging.getLogger(__name__)

MIN_FREE_SHARE = 0.1
"""Of the disk, which stays free whatever the limit: nodes fail when theirs is full."""

_DIGEST_BYTES = 16


class NodeCache:
    """`cache(uri)` gives the object's bytes, from `folder` where they are there already.

    `objects` are the splits' objects as listed; `max_bytes` is a limit on the whole folder, older
    versions and other sets in it included. A local path is read as it is, and so is a URI that was
    not listed. To be pickled: each process then looks at its own node's disk, when it first reads.
    """

    def __init__(self, folder: str | Path, objects: Iterable[Object], *, max_bytes: int) -> None:
        """Raises ValueError where `max_bytes` is negative; 0 keeps nothing."""
        if max_bytes < 0:
            raise ValueError(f"max_bytes is {max_bytes}; it must be at least 0: 0 keeps nothing")
        self._folder = Path(folder)
        self._objects = {item.uri: item for item in objects if item.uri.startswith("s3://")}
        self._max_bytes = max_bytes
        self._kept: frozenset[str] | None = None  # URIs; None until this process has looked
        self._warned = False

    def __reduce__(self) -> tuple[object, ...]:
        return _again, (self._folder, tuple(self._objects.values()), self._max_bytes)

    def __call__(self, uri: str) -> bytes:
        """All bytes of the object. Raises StorageError as `storage.read` does."""
        item = self._objects.get(uri)
        if item is None:
            return storage.read(uri)
        if self._kept is None:
            self._kept = self._that_fit()
        if uri not in self._kept:
            return storage.read(uri, item.etag)
        path = self._path(item)
        data = _verified(path)
        if data is None:
            data = storage.read(uri, item.etag)
            self._keep(path, data)
        return data

    @property
    def fits(self) -> bool:
        """Whether all objects have room on this node, so that a second epoch downloads nothing."""
        if not self._objects:
            return True
        if self._kept is None:
            self._kept = self._that_fit()
        return len(self._kept) == len(self._objects)

    def _path(self, item: Object) -> Path:
        name = hashlib.sha256(f"{item.uri}\n{item.etag}".encode()).hexdigest()
        return self._folder / name[:2] / name

    def _that_fit(self) -> frozenset[str]:
        """The URIs that have room, in the listing's order, beside what else is in the folder."""
        ours = {str(self._path(item)) for item in self._objects.values()}
        try:
            there = list(storage.list_objects(str(self._folder)))
        except StorageError as error:
            logger.warning("nothing is kept, every epoch downloads the set: %s", error)
            return frozenset()
        room = self._max_bytes - sum(item.size for item in there if item.uri not in ours)
        kept = []
        for item in self._objects.values():
            room -= item.size + _DIGEST_BYTES
            if room < 0:
                break
            kept.append(item.uri)
        return frozenset(kept)

    def _keep(self, path: Path, data: bytes) -> None:
        """Writes the file in one step. A disk that refuses costs a download, not the run."""
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            for folder in (self._folder, path.parent):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            disk = shutil.disk_usage(path.parent)
            if disk.free - len(data) < MIN_FREE_SHARE * disk.total:
                raise OSError(f"over {1 - MIN_FREE_SHARE:.0%} of the disk are in use")
            try:
                # no fsync: what a crash tears has another digest
                temporary.write_bytes(_digest(data) + data)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            if not self._warned:
                logger.warning("not kept in %s, it is downloaded again: %s", self._folder, error)
            self._warned = True


def _again(folder: Path, objects: tuple[Object, ...], max_bytes: int) -> NodeCache:
    return NodeCache(folder, objects, max_bytes=max_bytes)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()


def _verified(path: Path) -> bytes | None:
    """The bytes that were kept at `path`; None where there are none, or others than were kept."""
    try:
        held = path.read_bytes()
    except OSError:
        return None
    data = held[_DIGEST_BYTES:]
    return data if held[:_DIGEST_BYTES] == _digest(data) else None
