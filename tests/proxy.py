"""A reverse proxy between a run and its S3 server that injects faults by rules.

It listens on loopback in its own thread. Requests are forwarded unchanged, `Host` included, so that
their signatures stay valid. A rule has a fault, the requests it applies to, and how often.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector, web
from yarl import URL

Fault = Literal[
    "slow_down", "internal", "reset", "hang", "truncated", "flipped", "lost_reply", "slow_bytes",
    "garbled", "denied", "expired", "late",
]  # fmt: skip

HANG_S = 600.0
LARGEST_BYTES = 2**30

_CODES = {
    "slow_down": (503, "SlowDown"),
    "internal": (500, "InternalError"),
    "denied": (403, "AccessDenied"),
    "expired": (403, "ExpiredToken"),
}
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "content-length", "expect"}


@dataclass(kw_only=True)
class Rule:
    """Injects a fault into the first `in_a_row` requests of each matching path, `times` in all."""

    fault: Fault
    methods: str = "GET"
    path: str = ""  # a regular expression that matches anywhere in the decoded path
    in_a_row: int = 1
    times: int = 10**9
    struck: int = 0
    release: asyncio.Event = field(default_factory=asyncio.Event)  # of `late`
    _by_path: Counter[str] = field(default_factory=Counter)

    def strikes(self, method: str, path: str) -> bool:
        """Return whether to inject the fault into this request, and count it."""
        if method not in self.methods.split() or not re.search(self.path, path):
            return False
        if self.struck >= self.times or self._by_path[path] >= self.in_a_row:
            return False
        self._by_path[path] += 1
        self.struck += 1
        return True

    @property
    def paths(self) -> int:
        """The number of paths that had the fault."""
        return len(self._by_path)


class Proxy:
    """Forwards to `upstream`; `rules` may be changed at any time."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.rules: list[Rule] = []
        self.url = ""
        self.arrived = 0  # requests forwarded after a `late` rule held them
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="proxy", daemon=True)

    def start(self) -> None:
        """Listen on a free port, and set `url`."""
        self._thread.start()
        assert self._ready.wait(10)

    def stop(self) -> None:
        """Stop the thread and close its connections."""
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(10)

    def let_go(self, rule: Rule) -> None:
        """Forward the requests that a `late` rule holds."""
        self._loop.call_soon_threadsafe(rule.release.set)

    @contextmanager
    def ruled(self, *rules: Rule) -> Iterator[None]:
        """Apply only these rules while the block runs."""
        self.rules = list(rules)
        try:
            yield
        finally:
            self.rules = []

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._main())

    async def _main(self) -> None:
        self._stopped = asyncio.Event()
        app = web.Application(client_max_size=LARGEST_BYTES)
        app.router.add_route("*", "/{path:.*}", self._handle)
        connector = TCPConnector(limit=0, force_close=True)
        async with ClientSession(
            connector=connector, timeout=ClientTimeout(total=None), auto_decompress=False
        ) as self._session:
            runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            host, port = runner.addresses[0][:2]
            self.url = f"http://{host}:{port}"
            self._ready.set()
            await self._stopped.wait()
            await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        rule = next((r for r in self.rules if r.strikes(request.method, request.path)), None)
        fault = rule.fault if rule else None
        if fault in _CODES:
            return _refusal(*_CODES[fault])
        if fault == "reset":
            return _cut(request)
        if fault == "hang":
            await asyncio.sleep(HANG_S)
            return _cut(request)
        if fault == "late":
            assert rule is not None
            asyncio.get_running_loop().create_task(self._later(request, body, rule))
            return _cut(request)
        try:
            status, headers, data = await self._forward(request, body)
        except (ClientError, OSError):  # the server is down
            return _cut(request)
        if fault == "lost_reply":
            return _cut(request)
        return await self._answer(request, status, headers, data, fault)

    async def _forward(
        self, request: web.Request, body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        url = URL(self.upstream + request.raw_path, encoded=True)
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _HOP_BY_HOP}
        async with self._session.request(
            request.method, url, headers=headers, data=body or None, allow_redirects=False
        ) as answer:
            return answer.status, dict(answer.headers), await answer.read()

    async def _later(self, request: web.Request, body: bytes, rule: Rule) -> None:
        """Forward the request after its client has given up."""
        await rule.release.wait()
        await self._forward(request, body)
        self.arrived += 1

    async def _answer(
        self,
        request: web.Request,
        status: int,
        headers: dict[str, str],
        data: bytes,
        fault: str | None,
    ) -> web.StreamResponse:
        kept = {k: v for k, v in headers.items() if k.lower() not in _HOP_BY_HOP}
        length = headers.get("Content-Length", str(len(data)))
        answer = web.StreamResponse(status=status, headers={**kept, "Content-Length": length})
        await answer.prepare(request)
        if request.method == "HEAD" or not data:
            return answer
        if fault == "flipped":
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        if fault == "garbled":  # like the error page of a proxy
            data = b"<html>be back soon".ljust(len(data))[: len(data)]
        if fault == "truncated":
            await answer.write(data[: len(data) // 2])
            return _cut(request)
        if fault == "slow_bytes":
            step = max(1, len(data) // 20)
            for start in range(0, len(data), step):
                await answer.write(data[start : start + step])
                await asyncio.sleep(0.1)
        else:
            await answer.write(data)
        await answer.write_eof()
        return answer


def _refusal(status: int, code: str) -> web.Response:
    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>"
    return web.Response(status=status, text=text, content_type="application/xml")


def _cut(request: web.Request) -> web.StreamResponse:
    """Abort the connection."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response(status=500)
