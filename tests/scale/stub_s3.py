"""A stub S3 server: it lists made-up images, and keeps in memory what a run writes.

    python tests/scale/stub_s3.py

prints its address and serves until its standard input closes. It runs in its own process, so that
its memory and CPU time are not the driver's. Buckets `images` and `labels` are made up
(`made_up_bucket.py`); any other bucket keeps what is put there. Signatures are not checked.
"""

from __future__ import annotations

import asyncio
import bisect
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.sax.saxutils import escape

from aiohttp import web

from tests.scale.made_up_bucket import IMAGES, LABELS, MadeUp, made_up

PAGE_KEYS = 1000
FILL = "x-fill-shards"
"""A PUT with this header, "FIRST STOP", creates empty shard files of that range below its path."""

_ITEM = (
    "<Contents><Key>{}</Key><LastModified>2026-11-01T12:00:00.000Z</LastModified>"
    "<ETag>&quot;{}&quot;</ETag><Size>{}</Size><StorageClass>STANDARD</StorageClass></Contents>"
)
_LISTING = (
    '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult '
    'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><KeyCount>{}</KeyCount>'
    "<IsTruncated>{}</IsTruncated>{}{}</ListBucketResult>"
)


class Stub:
    """The contents of the buckets; keys that were put are sorted when they are listed."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[str, bytes]] = {}
        self._sorted: dict[str, list[str]] = {}
        self.requests = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Handle any request."""
        self.requests += 1
        bucket, _, key = request.path.lstrip("/").partition("/")
        if request.method == "GET" and "list-type" in request.query:
            return self._list(bucket, request.query)
        kept = self._kept.setdefault(bucket, {})
        if request.method == "PUT":
            return await self._put(request, bucket, kept, key)
        if request.method == "DELETE":
            if kept.pop(key, None) is not None:
                self._sorted.pop(bucket, None)
            return web.Response(status=204)
        if key not in kept:
            return _refusal(404, "NoSuchKey")
        return _content(request, kept[key])

    async def _put(
        self, request: web.Request, bucket: str, kept: dict[str, bytes], key: str
    ) -> web.Response:
        if FILL in request.headers:
            shards = range(*map(int, request.headers[FILL].split()))
            kept.update((f"{key}/shard-{i:06d}.parquet", b"") for i in shards)
        elif key in kept and "If-None-Match" in request.headers:
            await request.read()
            return _refusal(412, "PreconditionFailed")
        else:
            kept[key] = await request.read()
        self._sorted.pop(bucket, None)
        return web.Response(headers={"ETag": _etag(kept.get(key, b""))})

    def _list(self, bucket: str, query: dict[str, str]) -> web.Response:
        after = query.get("continuation-token") or query.get("start-after", "")
        if bucket in (IMAGES, LABELS):
            found, last = _page_of_made_up(bucket, query.get("prefix", ""), after)
        else:
            found, last = self._page_of_kept(bucket, query.get("prefix", ""), after)
        token = "" if last else f"<NextContinuationToken>{found[-1].key}</NextContinuationToken>"
        items = "".join(_ITEM.format(escape(key), etag, size) for key, etag, size in found)
        text = _LISTING.format(len(found), "false" if last else "true", token, items)
        return web.Response(text=text, content_type="application/xml")

    def _page_of_kept(self, bucket: str, prefix: str, after: str) -> tuple[list[MadeUp], bool]:
        kept = self._kept.get(bucket, {})
        keys = self._sorted.setdefault(bucket, sorted(kept))
        first = max(bisect.bisect_left(keys, prefix), bisect.bisect_right(keys, after))
        page = [key for key in keys[first : first + PAGE_KEYS + 1] if key.startswith(prefix)]
        found = [MadeUp(key, _etag(kept[key])[1:-1], len(kept[key])) for key in page[:PAGE_KEYS]]
        return found, len(page) <= PAGE_KEYS


def _page_of_made_up(bucket: str, prefix: str, after: str) -> tuple[list[MadeUp], bool]:
    count = int(prefix.partition("/")[0])
    number = re.search(r"_(\d+)\.", after)
    first = int(number[1]) + 1 if number else 0
    last = min(count, first + PAGE_KEYS)
    return [made_up(bucket, count, i) for i in range(first, last)], last == count


def _content(request: web.Request, data: bytes) -> web.Response:
    headers = {"ETag": _etag(data), "Accept-Ranges": "bytes"}
    if request.method == "HEAD":
        return web.Response(headers={**headers, "Content-Length": str(len(data))})
    wanted = request.http_range
    if wanted.start is None:
        return web.Response(body=data, headers=headers)
    start, stop, _ = wanted.indices(len(data))
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
    return web.Response(status=206, body=data[start:stop], headers=headers)


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data[:4096], usedforsecurity=False).hexdigest()}"'


def _refusal(status: int, code: str) -> web.Response:
    text = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>"
    return web.Response(status=status, text=text, content_type="application/xml")


async def _serve() -> None:
    application = web.Application(client_max_size=2**40)
    application.router.add_route("*", "/{path:.*}", Stub().answer)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    [[host, port]] = runner.addresses
    print(f"http://{host}:{port}", flush=True)
    await asyncio.to_thread(sys.stdin.read)


@contextmanager
def stub_s3() -> Iterator[dict[str, str]]:
    """Run the stub in its own process; yield the environment variables of its clients."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.scale.stub_s3"],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield {
            "AWS_ENDPOINT_URL": process.stdout.readline().strip(),
            "AWS_ACCESS_KEY_ID": "made",
            "AWS_SECRET_ACCESS_KEY": "up",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1"])),
        }
    finally:
        process.stdin.close()
        process.wait()


if __name__ == "__main__":
    asyncio.run(_serve())
