"""S3 through s3fs's asynchronous client: whole objects by one GET, put-if-absent by one PUT.

s3fs brings credentials, endpoint and region from the usual AWS environment variables, profiles
and roles. Its own calls are not used for reading and writing: they send a HEAD first, fetch large
objects as ranges without If-Match, and go multipart above 100 MB, so old and new bytes could mix.

Retries happen here alone, around the request *and* its body; those of the client are off.
"""

from __future__ import annotations

import asyncio
import functools
import random
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import datetime
from typing import Any, TypeVar

import fsspec.asyn
import s3fs
from aiobotocore.session import AioSession
from aiohttp import ClientError as AiohttpError
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
)
from botocore.utils import parse_timestamp

from pipeline.data.storage.base import (
    PAGE_OBJECTS,
    ErrorKind,
    Object,
    StorageError,
    check_size,
)
from pipeline.text import one_line

ATTEMPTS = 10
"""Requests sent at most for one call: what fails at once is tried again for some 15 seconds, so
that six failures in a row are survived, and a server that is started again."""

FIRST_PAUSE_S = 0.1
"""Seconds before the second request at most; each further pause is twice as long, up to 5."""

FIRST_ANSWER_S = 15.0
"""Seconds within which a server must have answered once, retries included."""

_answered = threading.Event()
_TIMEOUTS_S = {"connect_timeout": 10, "read_timeout": 20}  # of silence
_RETRIED_CODES = {"SlowDown", "RequestTimeout", "ConditionalRequestConflict", "InternalError"}
_RETRIED_STATUS = {429, 500, 502, 503, 504}

T = TypeVar("T")


@functools.cache
def filesystem() -> s3fs.S3FileSystem:
    """The process's one client: a connection pool shared by all threads. `_retry` tries again."""
    return _client({"max_attempts": 0})


@functools.cache
def retrying_filesystem() -> s3fs.S3FileSystem:
    """A client that tries again by itself, for libraries that send their own requests."""
    return _client({"max_attempts": ATTEMPTS, "mode": "standard"})


def _client(retries: dict[str, Any]) -> s3fs.S3FileSystem:
    found = s3fs.S3FileSystem(
        skip_instance_cache=True,
        config_kwargs={**_TIMEOUTS_S, "retries": retries, "max_pool_connections": 64},
    )
    session = AioSession()
    # three quarters of a listing's CPU time go into dates that nobody asks for
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_date)
    found.session = session  # not an argument: those travel with the client when it is pickled
    return found


def _date(text: Any) -> datetime:
    """The time that `text` says, by the fast parser where it is ISO 8601, as in listings."""
    try:
        return datetime.fromisoformat(text)
    except (TypeError, ValueError):
        date: datetime = parse_timestamp(text)
        return date


def split_uri(uri: str) -> tuple[str, str]:
    """Bucket and key of `s3://bucket/key`; the key is taken as it stands."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise ValueError(f"{uri!r} names no bucket; expected s3://bucket/prefix")
    return bucket, key


def list_pages(prefix: str, between: tuple[str, str] | None) -> Iterator[list[Object]]:
    """The objects whose key starts with the prefix and a slash, page by page.

    With `between`, those from its first URI to its last: S3 lists in the order of bytes.
    """
    bucket, key = split_uri(prefix)
    request = {
        "Bucket": bucket,
        "Prefix": f"{key.rstrip('/')}/" if key.rstrip("/") else "",
        "MaxKeys": PAGE_OBJECTS,
    }
    first, last = between or ("", "")
    if between:
        request["StartAfter"] = split_uri(first)[1][:-1]  # shorter by one, so `first` is after it
    while True:
        answer = _call(prefix, "list_objects_v2", request)
        page = [
            Object(f"s3://{bucket}/{item['Key']}", item["ETag"].strip('"'), item["Size"])
            for item in answer.get("Contents", [])
            if item["Size"] or not item["Key"].endswith("/")  # the "folders" that some tools make
        ]
        yield [item for item in page if between is None or first <= item.uri <= last]
        if not answer.get("IsTruncated") or (between and page and page[-1].uri > last):
            return
        request["ContinuationToken"] = answer["NextContinuationToken"]


def stat_object(uri: str) -> Object | None:
    """The object at `uri`, None where there is none."""
    bucket, key = split_uri(uri)
    try:
        answer = _call(uri, "head_object", {"Bucket": bucket, "Key": key})
    except StorageError as error:
        if error.kind == "vanished":
            return None
        raise
    return Object(uri, answer["ETag"].strip('"'), answer["ContentLength"])


def read(uri: str, etag: str | None) -> bytes:
    """All bytes of the object by one GET; with `etag`, only if it is still that one."""
    bucket, key = split_uri(uri)
    request = {"Bucket": bucket, "Key": key}
    if etag is not None:
        request["IfMatch"] = f'"{etag}"'

    async def get(client: Any, _: int) -> bytes:
        answer = await client.get_object(**request)
        _answered.set()  # how long the body takes says nothing of the address
        async with answer["Body"] as body:
            data: bytes = await body.read()
        if len(data) != answer["ContentLength"]:
            raise ConnectionError(f"{len(data)} of {answer['ContentLength']} bytes")
        return data

    return _retry(uri, get)


def create(uri: str, data: bytes) -> bool:
    """Puts the object unless it exists; whether it was put. The first one wins."""
    check_size(uri, data)
    bucket, key = split_uri(uri)
    refused_on_attempt = -1

    async def put(client: Any, attempt: int) -> bool:
        nonlocal refused_on_attempt
        try:
            await client.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
        except ClientError as error:
            if _status(error) != 412:
                raise
            refused_on_attempt = attempt
            return False
        return True

    created = _retry(uri, put)
    # after a lost reply the server refuses our own write: what is there tells
    return created or (refused_on_attempt > 0 and read(uri, None) == data)


def write(uri: str, data: bytes) -> None:
    """Puts the object over what was there, in one PUT."""
    bucket, key = split_uri(uri)
    _call(uri, "put_object", {"Bucket": bucket, "Key": key, "Body": data})


def delete(uris: list[str], within: str | None) -> None:
    """Deletes the objects; those that are gone already are fine. There are no folders."""
    for uri in uris:  # one by one: not every server has the bulk call
        bucket, key = split_uri(uri)
        _call(uri, "delete_object", {"Bucket": bucket, "Key": key})


def leftovers(prefix: str) -> list[str]:
    """Nothing: a PUT that was cut off leaves no object, and multipart is never used."""
    return []


def _call(uri: str, method: str, request: dict[str, Any]) -> dict[str, Any]:
    async def send(client: Any, _: int) -> dict[str, Any]:
        answer: dict[str, Any] = await getattr(client, method)(**request)
        return answer

    return _retry(uri, send)


def _retry(uri: str, attempt: Callable[[Any, int], Awaitable[T]]) -> T:
    """What `attempt(client, number)` returns, tried again after faults that pass."""

    async def once(number: int) -> T:
        fs = filesystem()
        await fs.set_session()
        client = await fs.get_s3(split_uri(uri)[0])
        return await attempt(client, number)

    async def attempts() -> T:
        until = time.monotonic() + FIRST_ANSWER_S
        for number in range(ATTEMPTS):
            # who never answered yet is asked for less long: its address is probably wrong
            patience = None if _answered.is_set() else max(0.1, until - time.monotonic())
            try:
                result = await _answered_within(patience, once(number))
                _answered.set()
                return result
            except (
                BotoCoreError,
                ClientError,
                AiohttpError,
                ConnectionError,
                TimeoutError,
            ) as error:
                if isinstance(error, ClientError):
                    _answered.set()
                late = not _answered.is_set() and time.monotonic() > until
                if late or number == ATTEMPTS - 1 or not _passes(error):
                    raise _translate(uri, error) from error
            await asyncio.sleep(min(5.0, FIRST_PAUSE_S * 2**number) * random.uniform(0.5, 1.0))
        raise AssertionError("unreachable")

    result: T = fsspec.asyn.sync(filesystem().loop, attempts)
    return result


async def _answered_within(patience_s: float | None, work: Awaitable[T]) -> T:
    """What `work` returns. Raises TimeoutError where no server answers before that is over."""
    task = asyncio.ensure_future(work)
    done, _ = await asyncio.wait({task}, timeout=patience_s)
    if not done and not _answered.is_set():
        task.cancel()
        raise TimeoutError
    return await task


def _passes(error: Exception) -> bool:
    if isinstance(error, ClientError):
        code = error.response.get("Error", {}).get("Code", "")
        return code in _RETRIED_CODES or _status(error) in _RETRIED_STATUS
    if isinstance(error, BotoCoreError):  # others are wrong settings: profiles, names, no keys
        return isinstance(error, HTTPClientError | IncompleteReadError | FlexibleChecksumError)
    return True


def _status(error: ClientError) -> int:
    status: int = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status


def _translate(uri: str, error: Exception) -> StorageError:
    if not isinstance(error, ClientError):
        kind: ErrorKind = "timeout" if "Timeout" in type(error).__name__ else "access"
        return StorageError(kind, f"{uri}: {_line(error)}")
    code = error.response.get("Error", {}).get("Code", "")
    bucket, _ = split_uri(uri)
    if code == "NoSuchBucket":
        return StorageError("access", f"{uri}: bucket {bucket} does not exist")
    if _status(error) == 404:
        return StorageError("vanished", f"{uri} does not exist")
    if _status(error) == 412:
        return StorageError("changed", f"{uri} was replaced after it was listed")
    if _status(error) in (401, 403):
        return StorageError("access", f"{uri}: access denied ({code}); check the AWS credentials")
    return StorageError("access", f"{uri}: {_line(error)}")


def _line(error: Exception) -> str:
    text = str(error).replace(" (reached max retries: 0)", "")  # of the client, which has none
    return one_line(text) or f"no answer ({type(error).__name__})"
