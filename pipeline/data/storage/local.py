"""Local files with the semantics of an object store: whole objects, put-if-absent, etags.

An etag is `<size>-<mtime in ns>`. A file appears under its name only when all its bytes are on
disk: it is first written to a hidden temporary file in the same folder.
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

_OPEN_ATTEMPTS = 10
_TEMPORARY = re.compile(r"\.[^/]*\.[0-9a-f]{16}\.tmp\Z")


def is_temporary(path: str) -> bool:
    """Return whether the file is a temporary one that a crashed writer left behind."""
    return _TEMPORARY.match(os.path.basename(path)) is not None


def list_pages(path: str, between: tuple[str, str] | None) -> Iterator[list[Object]]:
    """Yield the files under the folder `path` in pages; `between` limits them to a range of paths.

    A missing folder has no objects. Dangling links are skipped, as are names that are not UTF-8,
    each with a warning.
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
    """Yield the files under the folder. `above` are its parents, to detect cycles of links."""
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
    except OSError:  # a cycle of links is neither file nor folder
        return False


def _is_text(entry: os.DirEntry[str]) -> bool:
    try:
        entry.name.encode()
    except UnicodeEncodeError:
        logger.warning("skipped a file whose name is not UTF-8: %r", os.fsencode(entry.path))
        return False
    return True


def _etag(stat: os.stat_result) -> str:
    return f"{stat.st_size}-{stat.st_mtime_ns}"


def stat_object(path: str) -> Object | None:
    """Return the object at `path`, None if it does not exist."""
    try:
        stat = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _translate(path, error) from error
    return Object(path, _etag(stat), stat.st_size) if os.path.isfile(path) else None


def read(path: str, etag: str | None) -> bytes:
    """Return all bytes of the file; with `etag`, only if it is that version before and after."""
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
    """Write the file unless it exists; return whether it was written. The first writer wins."""
    check_size(path, data)
    with _temporary(path, data) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        _sync_folder(path)
    return True


def write(path: str, data: bytes) -> None:
    """Write the file atomically, replacing an existing one."""
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
        with contextlib.suppress(OSError):  # remove the folders created for this file
            Path(temporary).unlink(missing_ok=True)
            for each in missing:
                each.rmdir()
        raise _translate(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _open_new(path: str) -> BinaryIO:
    """Open a new file, creating its folder even while another process removes empty folders."""
    for _ in range(_OPEN_ATTEMPTS):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            return open(path, "xb")
    raise FileNotFoundError(2, "its folder keeps being removed", path)


def _sync_folder(path: str) -> None:
    descriptor = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def delete(paths: list[str], within: str | None) -> None:
    """Delete the files; missing ones are not an error.

    Folders that become empty are removed too, from the files' own up to `within`.
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
                break  # not empty


def leftovers(path: str) -> list[str]:
    """Return temporary files that crashed writers left under the folder `path`."""
    found = Path(path).rglob(".*.tmp") if os.path.isdir(path) else []
    return sorted(str(file) for file in found if is_temporary(file.name))


def _translate(path: str, error: OSError) -> StorageError:
    if isinstance(error, FileNotFoundError):
        return StorageError("vanished", f"{path} does not exist")
    return StorageError("access", f"{path}: {error.strerror or error}")
