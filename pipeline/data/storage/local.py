"""Local files with the manners of an object store: whole objects, put-if-absent, etags.

An etag is `<size>-<mtime in ns>`. A file appears under its name only when all its bytes are on
disk: they are written to a hidden temporary file beside it first.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from pipeline.data.storage.base import PAGE_OBJECTS, Object, StorageError, check_size

logger = logging.getLogger(__name__)

_PRUNED_AT_MOST = 10
_TEMPORARY = re.compile(r"\.[^/]*\.[0-9a-f]{16}\.tmp\Z")


def is_temporary(path: str) -> bool:
    """Whether the file is one that a killed writer left behind."""
    return _TEMPORARY.match(os.path.basename(path)) is not None


def list_pages(path: str, between: tuple[str, str] | None) -> Iterator[list[Object]]:
    """The files below the folder `path`, page by page; with `between`, from one path to another.

    A missing folder has no objects. Links to nowhere are passed over; so are names that are not
    UTF-8, with a warning each.
    """
    page: list[Object] = []
    for entry in _walk(path, frozenset()):
        if between and not between[0] <= entry.path <= between[1]:
            continue
        with contextlib.suppress(FileNotFoundError):
            stat = entry.stat()
            page.append(Object(entry.path, _etag(stat), stat.st_size))
        if len(page) == PAGE_OBJECTS:
            yield page
            page = []
    if page:
        yield page


def _walk(path: str, above: frozenset[tuple[int, int]]) -> Iterator[os.DirEntry[str]]:
    """The files below the folder. `above` are the folders around it: links may lead back there."""
    try:
        stat = os.stat(path)
        if (here := (stat.st_dev, stat.st_ino)) in above:
            return
        with os.scandir(path) as entries:
            found = [entry for entry in entries if _is_text(entry)]
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError("access", f"cannot list {path}: {error.strerror}") from error
    for entry in sorted(found, key=lambda entry: entry.name):
        if _is(entry.is_dir):
            yield from _walk(entry.path, above | {here})
        elif _is(entry.is_file) and not is_temporary(entry.name):
            yield entry


def _is(kind: Callable[[], bool]) -> bool:
    try:
        return kind()
    except OSError:  # a link in a circle is neither
        return False


def _is_text(entry: os.DirEntry[str]) -> bool:
    try:
        entry.name.encode()
    except UnicodeEncodeError:
        logger.warning("left out, its name is not UTF-8: %r", os.fsencode(entry.path))
        return False
    return True


def _etag(stat: os.stat_result) -> str:
    return f"{stat.st_size}-{stat.st_mtime_ns}"


def stat_object(path: str) -> Object | None:
    """The object at `path`, None where there is none."""
    try:
        stat = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _translate(path, error) from error
    return Object(path, _etag(stat), stat.st_size) if os.path.isfile(path) else None


def read(path: str, etag: str | None) -> bytes:
    """All bytes of the file; with `etag`, only if the file is still that one when read whole."""
    try:
        with open(path, "rb") as file:
            before = _etag(os.fstat(file.fileno()))
            data = file.read() if etag in (None, before) else b""
            after = _etag(os.fstat(file.fileno()))
    except OSError as error:
        raise _translate(path, error) from error
    if etag is not None and not before == after == etag:
        raise StorageError("changed", f"{path} was replaced after it was listed")
    return data


def create(path: str, data: bytes) -> bool:
    """Writes the file unless it exists; whether it was written. The first one wins."""
    check_size(path, data)
    with _temporary(path, data) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        _sync_folder(path)
    return True


def write(path: str, data: bytes) -> None:
    """Writes the file, in one step as its readers see it, over what was there."""
    with _temporary(path, data) as temporary:
        os.replace(temporary, path)
        _sync_folder(path)


@contextlib.contextmanager
def _temporary(path: str, data: bytes) -> Iterator[str]:
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name[:100]}.{secrets.token_hex(8)}.tmp")
    missing = [each for each in (Path(folder), *Path(folder).parents) if not each.exists()]
    try:
        with _open_new(temporary) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    except OSError as error:
        with contextlib.suppress(OSError):  # folders made for nothing go again
            Path(temporary).unlink(missing_ok=True)
            for each in missing:
                each.rmdir()
        raise _translate(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _open_new(path: str) -> BinaryIO:
    """A new file in a folder that is made for it, even while another process prunes folders."""
    for _ in range(_PRUNED_AT_MOST):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            return open(path, "xb")
    raise FileNotFoundError(2, "its folder vanishes", path)


def _sync_folder(path: str) -> None:
    descriptor = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def delete(paths: list[str], within: str | None) -> None:
    """Deletes the files; those that are gone already are fine.

    Folders that become empty go too, from the files' own up to `within`.
    """
    for path in paths:
        try:
            Path(path).unlink(missing_ok=True)
        except OSError as error:
            raise _translate(path, error) from error
        for folder in Path(path).parents if within else ():
            if not folder.is_relative_to(within or ""):
                break
            try:
                folder.rmdir()
            except OSError:
                break  # it is not empty


def leftovers(path: str) -> list[str]:
    """Temporary files below the folder `path` that killed writers left."""
    found = Path(path).rglob(".*.tmp") if os.path.isdir(path) else []
    return sorted(str(file) for file in found if is_temporary(file.name))


def _translate(path: str, error: OSError) -> StorageError:
    if isinstance(error, FileNotFoundError):
        return StorageError("vanished", f"{path} does not exist")
    return StorageError("access", f"{path}: {error.strerror or error}")
