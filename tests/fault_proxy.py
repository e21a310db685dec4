"""A proxy on 127.0.0.1 that records requests to an object store, and breaks those that rules name.

`python fault_proxy.py UPSTREAM PORT`; `POST /__rules` sets the rules, a list of objects:

    method, url   regular expressions that the method and the path must match
    after, times  how many requests that match pass first, and how many are broken then
    do            status (with `status`, `body`), slow (`seconds`), hang, reset (after `bytes` of the upload), lost (the
                  request is done, but its answer is cut), truncate (the answer, after `bytes`)

`GET /__log` returns the requests so far: time, method, path, range, status, bytes of the answer, what was done.
"""

import asyncio
import contextlib
import re
import socket
import struct
import sys
import time
from typing import Any

import aiohttp
from aiohttp import web
from yarl import URL

_DROPPED = ("transfer-encoding", "connection", "content-length", "content-encoding")


class Proxy:
    """Passes requests on."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.rules: list[dict[str, Any]] = []
        self.log: list[list[Any]] = []
        self.session: aiohttp.ClientSession | None = None

    def rule_for(self, request: web.Request) -> dict[str, Any] | None:
        """The rule that breaks a request; None if it passes."""
        for rule in self.rules:
            if re.fullmatch(rule.get("method", ".*"), request.method) and re.search(
                rule.get("url", ""), request.raw_path
            ):
                rule["seen"] = rule.get("seen", 0) + 1
                if rule["seen"] > rule.get("after", 0) and rule.get("done", 0) < rule.get("times", 10**9):
                    rule["done"] = rule.get("done", 0) + 1
                    return rule
        return None

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answers a request."""
        if request.path == "/__rules":
            self.rules = await request.json()
            return web.json_response({})
        if request.path == "/__log":
            return web.json_response(self.log)
        rule = self.rule_for(request) or {"do": ""}
        entry = [time.time(), request.method, request.raw_path, request.headers.get("Range", ""), 0, 0, rule["do"]]
        self.log.append(entry)
        match rule["do"]:
            case "status":
                await request.read()
                entry[4] = rule["status"]
                return web.Response(status=rule["status"], text=rule.get("body", "injected"))
            case "hang":
                await asyncio.sleep(3600)
            case "slow":
                await asyncio.sleep(rule["seconds"])
            case "reset":
                await _read(request, rule["bytes"])
                _cut(request)
                return web.Response()
        return await self._passed_on(request, rule, entry)

    async def _passed_on(self, request: web.Request, rule: dict[str, Any], entry: list[Any]) -> web.StreamResponse:
        assert self.session is not None
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _DROPPED}
        url = URL(self.upstream + request.raw_path, encoded=True)
        skipped = ("Content-Type", "User-Agent", "Accept-Encoding", "Accept")
        async with self.session.request(
            request.method,
            url,
            data=await request.read(),
            headers=headers,
            allow_redirects=False,
            skip_auto_headers=skipped,
        ) as got:
            content = await got.read()
            entry[4], entry[5] = got.status, len(content)
            if rule["do"] == "lost":
                _cut(request)
                return web.Response()
            kept = {name: value for name, value in got.headers.items() if name.lower() not in _DROPPED}
            if request.method == "HEAD":
                kept["Content-Length"] = got.headers.get("Content-Length", "0")
                return web.Response(status=got.status, headers=kept)
            if rule["do"] != "truncate":
                return web.Response(status=got.status, headers=kept, body=content)
            response = web.StreamResponse(status=got.status, headers={**kept, "Content-Length": str(len(content))})
            await response.prepare(request)
            await response.write(content[: rule["bytes"]])
            await asyncio.sleep(0.02)
            _cut(request)
            return response


async def _read(request: web.Request, num_bytes: int) -> None:
    found = 0
    while found < num_bytes and (chunk := await request.content.readany()):
        found += len(chunk)


def _cut(request: web.Request) -> None:
    """Ends a connection with a reset."""
    assert request.transport is not None
    connection = request.transport.get_extra_info("socket")
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.transport.abort()


async def main() -> None:
    """Serves until the process is ended."""
    proxy = Proxy(sys.argv[1])
    proxy.session = aiohttp.ClientSession(auto_decompress=False, connector=aiohttp.TCPConnector(limit=256))
    app = web.Application(client_max_size=2**32)
    app.router.add_route("*", "/{tail:.*}", proxy.handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", int(sys.argv[2])).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
