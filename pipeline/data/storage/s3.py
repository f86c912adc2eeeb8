"""S3 backend on s3fs's asynchronous client: an object is read by one GET and created by one PUT.

s3fs finds credentials, endpoint and region in the usual AWS environment variables, profiles and
roles. Its own read and write calls are not used: they send a HEAD first, fetch large objects in
ranges without If-Match, and use multipart uploads above 100 MB, so old and new bytes could mix.

Requests are retried only here, including the transfer of the body; the client's retries are off.
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

MAX_ATTEMPTS = 10
"""Requests sent per call at most. Immediate failures are retried for about 15 s, enough for six
failures in a row or a server that restarts."""

INITIAL_BACKOFF_S = 0.1
"""Longest pause before the second request; the pause doubles with each attempt, up to 5 s."""

FIRST_RESPONSE_TIMEOUT_S = 15.0
"""Time within which the server must have responded once, retries included."""

_has_responded = threading.Event()
_TIMEOUTS_S = {"connect_timeout": 10, "read_timeout": 20}  # without any data
_RETRIED_CODES = {"SlowDown", "RequestTimeout", "ConditionalRequestConflict", "InternalError"}
_RETRIED_STATUS = {429, 500, 502, 503, 504}

T = TypeVar("T")


@functools.cache
def filesystem() -> s3fs.S3FileSystem:
    """Return this process's client, a connection pool for all threads; `_retry` does retries."""
    return _client({"max_attempts": 0})


@functools.cache
def retrying_filesystem() -> s3fs.S3FileSystem:
    """Return a client that retries by itself, for libraries that send their own requests."""
    return _client({"max_attempts": MAX_ATTEMPTS, "mode": "standard"})


def _client(retries: dict[str, Any]) -> s3fs.S3FileSystem:
    found = s3fs.S3FileSystem(
        skip_instance_cache=True,
        config_kwargs={**_TIMEOUTS_S, "retries": retries, "max_pool_connections": 64},
    )
    session = AioSession()
    # the default parser of dates, which are not used, takes 75 % of a listing's CPU time
    session.get_component("response_parser_factory").set_parser_defaults(
        timestamp_parser=_parse_date
    )
    found.session = session  # not passed as an argument, because arguments are pickled
    return found


def _parse_date(text: Any) -> datetime:
    """Return the time in `text`, by a fast parser if it is ISO 8601, as in listings."""
    try:
        return datetime.fromisoformat(text)
    except (TypeError, ValueError):
        date: datetime = parse_timestamp(text)
        return date


def split_uri(uri: str) -> tuple[str, str]:
    """Return bucket and key of `s3://bucket/key`; the key is not normalized."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise ValueError(f"{uri!r} names no bucket; expected s3://bucket/prefix")
    return bucket, key


def list_pages(prefix: str, between: tuple[str, str] | None) -> Iterator[list[Object]]:
    """Yield the objects whose key starts with the prefix and a slash, in pages.

    With `between`, yield URIs from its first to its last: S3 lists in byte order.
    """
    bucket, key = split_uri(prefix)
    request = {
        "Bucket": bucket,
        "Prefix": f"{key.rstrip('/')}/" if key.rstrip("/") else "",
        "MaxKeys": PAGE_OBJECTS,
    }
    first, last = between or ("", "")
    if between:
        request["StartAfter"] = split_uri(first)[1][:-1]  # one byte shorter: sorts before `first`
    while True:
        answer = _call(prefix, "list_objects_v2", request)
        page = [
            Object(f"s3://{bucket}/{item['Key']}", item["ETag"].strip('"'), item["Size"])
            for item in answer.get("Contents", [])
            if item["Size"] or not item["Key"].endswith("/")  # "folders" created by some tools
        ]
        yield [item for item in page if between is None or first <= item.uri <= last]
        if not answer.get("IsTruncated") or (between and page and page[-1].uri > last):
            return
        request["ContinuationToken"] = answer["NextContinuationToken"]


def stat_object(uri: str) -> Object | None:
    """Return the object at `uri`, None if it does not exist."""
    bucket, key = split_uri(uri)
    try:
        answer = _call(uri, "head_object", {"Bucket": bucket, "Key": key})
    except StorageError as error:
        if error.kind == "vanished":
            return None
        raise
    return Object(uri, answer["ETag"].strip('"'), answer["ContentLength"])


def read(uri: str, etag: str | None) -> bytes:
    """Return all bytes of the object by one GET; with `etag`, only of that version."""
    bucket, key = split_uri(uri)
    request = {"Bucket": bucket, "Key": key}
    if etag is not None:
        request["IfMatch"] = f'"{etag}"'

    async def get(client: Any, _: int) -> bytes:
        answer = await client.get_object(**request)
        _has_responded.set()  # even if the body is slow, the address is right
        async with answer["Body"] as body:
            data: bytes = await body.read()
        if len(data) != answer["ContentLength"]:
            raise ConnectionError(f"received {len(data)} of {answer['ContentLength']} bytes")
        return data

    return _retry(uri, get)


def create(uri: str, data: bytes) -> bool:
    """Write the object unless it exists; return whether it was written. The first writer wins."""
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
    # after a lost response the server refuses the retry of our own write: compare the content
    return created or (refused_on_attempt > 0 and read(uri, None) == data)


def write(uri: str, data: bytes) -> None:
    """Write the object by one PUT, replacing an existing one."""
    bucket, key = split_uri(uri)
    _call(uri, "put_object", {"Bucket": bucket, "Key": key, "Body": data})


def delete(uris: list[str], within: str | None) -> None:
    """Delete the objects; missing ones are not an error. `within` has no effect: no folders."""
    for uri in uris:  # one by one: some servers lack the bulk call
        bucket, key = split_uri(uri)
        _call(uri, "delete_object", {"Bucket": bucket, "Key": key})


def leftovers(prefix: str) -> list[str]:
    """Return nothing: an interrupted PUT leaves no object, and multipart is never used."""
    return []


def _call(uri: str, method: str, request: dict[str, Any]) -> dict[str, Any]:
    async def send(client: Any, _: int) -> dict[str, Any]:
        answer: dict[str, Any] = await getattr(client, method)(**request)
        return answer

    return _retry(uri, send)


def _retry(uri: str, attempt: Callable[[Any, int], Awaitable[T]]) -> T:
    """Return the result of `attempt(client, number)`, retried after transient errors."""

    async def once(number: int) -> T:
        fs = filesystem()
        await fs.set_session()
        client = await fs.get_s3(split_uri(uri)[0])
        return await attempt(client, number)

    async def attempts() -> T:
        until = time.monotonic() + FIRST_RESPONSE_TIMEOUT_S
        for number in range(MAX_ATTEMPTS):
            # until the server has responded once, wait less: the endpoint is probably wrong
            timeout = None if _has_responded.is_set() else max(0.1, until - time.monotonic())
            try:
                result = await _first_response(timeout, once(number))
                _has_responded.set()
                return result
            except (
                BotoCoreError,
                ClientError,
                AiohttpError,
                ConnectionError,
                TimeoutError,
            ) as error:
                if isinstance(error, ClientError):
                    _has_responded.set()
                late = not _has_responded.is_set() and time.monotonic() > until
                if late or number == MAX_ATTEMPTS - 1 or not _is_transient(error):
                    raise _translate(uri, error) from error
            await asyncio.sleep(min(5.0, INITIAL_BACKOFF_S * 2**number) * random.uniform(0.5, 1.0))
        raise AssertionError("unreachable")

    result: T = fsspec.asyn.sync(filesystem().loop, attempts)
    return result


async def _first_response(timeout_s: float | None, work: Awaitable[T]) -> T:
    """Return the result of `work`. Raises TimeoutError if the server has not responded in time."""
    task = asyncio.ensure_future(work)
    done, _ = await asyncio.wait({task}, timeout=timeout_s)
    if not done and not _has_responded.is_set():
        task.cancel()
        raise TimeoutError
    return await task


def _is_transient(error: Exception) -> bool:
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
        return StorageError(kind, f"{uri}: {_message(error)}")
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
    return StorageError("access", f"{uri}: {_message(error)}")


def _message(error: Exception) -> str:
    text = str(error).replace(" (reached max retries: 0)", "")  # the client's own, which are off
    return one_line(text) or f"no response ({type(error).__name__})"
