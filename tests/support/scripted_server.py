"""A small cell in memory behind real HTTP on loopback, that misbehaves on request.

For tests of `client/` and `cli/`: a `Fault` is taken from the script by the first request that
matches it.  It keeps the contract of `api/` as far as clients can see; `test_client_api_contract`
holds both to the same claims.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import orjson
from aiohttp import web

from protocol import block_frames
from protocol.block_frames import FrameStatus
from protocol.errors import (
    BlockNotFound,
    EntryNotFound,
    Forbidden,
    HashMismatch,
    HaversackError,
    InvalidPath,
    MissingBlocks,
    NotEnoughNodes,
    RevConflict,
    Unauthenticated,
)
from protocol.ids import BlockHash
from protocol.limits import BLOCK_BYTES_MAX, LISTING_PAGE_MAX
from protocol.names import name_key

TOKEN = "hvs_" + "t" * 43

_STATUS = {
    "unauthenticated": 401,
    "forbidden": 403,
    "block_not_found": 404,
    "entry_not_found": 404,
    "hash_mismatch": 400,
    "conflict": 409,
    "missing_blocks": 409,
    "invalid_path": 422,
    "overloaded": 429,
    "unknown_outcome": 504,
}


@dataclass
class Fault:
    """What happens to the next `times` requests whose "METHOD path" matches `route`.

    `act` is one of
        error            answer `error` and do nothing
        reset            do nothing, close the connection
        lost             do the work, close the connection without an answer
        cut              answer with half of the body, then close
        corrupt          answer with one bit flipped
        garbage          answer 200 with a body that is not what was asked for
        hang             answer only when the test ends
    """

    route: str
    act: str
    times: int = 1
    error: HaversackError | None = None
    headers: dict[str, str] = field(default_factory=dict)
    after: int = 0
    """Matching requests that pass first."""


class ScriptedCell:
    """Blocks, claims and a tree, and the script of faults."""

    def __init__(self) -> None:
        self.blocks: dict[BlockHash, bytes] = {}
        self.claimed: set[BlockHash] = set()
        self.entries: dict[str, dict[str, Any]] = {}
        self.script: list[Fault] = []
        self.requests: list[str] = []
        self.batch_sizes: list[int] = []
        self.in_flight = 0
        self.in_flight_most: Counter[str] = Counter()
        self.body_bytes = 0
        self.refuse_blocks: dict[BlockHash, HaversackError] = {}
        self.before_commit: Callable[[], None] | None = None
        self.page_limit = LISTING_PAGE_MAX
        self.url = ""
        self._revs = 0
        self._over = asyncio.Event()
        self._runner: web.AppRunner | None = None
        self._site: web.TCPSite | None = None
        self._port = 0

    # ------------------------------------------------------------------ the server

    async def start(self) -> None:
        app = web.Application(client_max_size=64 << 20, middlewares=[self._misbehave])
        app.router.add_post("/v1/blocks/check", self._check)
        app.router.add_post("/v1/blocks/batch", self._batch)
        app.router.add_post("/v1/blocks/fetch", self._fetch)
        app.router.add_put("/v1/blocks/{hash}", self._put)
        app.router.add_get("/v1/blocks/{hash}", self._get, allow_head=True)
        app.router.add_post("/v1/metadata/commit", self._commit)
        app.router.add_post("/v1/metadata/commit_batch", self._commit_batch)
        app.router.add_get("/v1/metadata/list", self._list)
        app.router.add_get("/v1/metadata/entry", self._entry)
        app.router.add_post("/v1/metadata/delete", self._delete)
        app.router.add_post("/v1/metadata/folder", self._folder)
        app.router.add_get("/v1/account", self._account)
        app.router.add_get("/v1/admin/status", self._status)
        app.router.add_get("/readyz", self._ready)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await self.listen()

    async def listen(self) -> None:
        """Open the port (the same as before, if there was one)."""
        assert self._runner is not None
        self._site = web.TCPSite(self._runner, "127.0.0.1", self._port)
        await self._site.start()
        self._port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self._port}"

    async def die(self) -> None:
        """Close the port and every connection, as a killed gateway does; what is stored stays."""
        assert self._site is not None
        assert self._runner is not None
        await self._site.stop()
        for connection in list(self._runner.server.connections):
            if connection.transport is not None:
                connection.transport.abort()

    async def stop(self) -> None:
        self._over.set()
        assert self._runner is not None
        await self._runner.cleanup()

    @web.middleware
    async def _misbehave(
        self,
        request: web.Request,
        handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
    ) -> web.StreamResponse:
        route = f"{request.method} {request.path}"
        self.requests.append(route)
        self.in_flight += 1
        kind = route.split("/")[-2] if "blocks" in route else "metadata"
        self.in_flight_most[kind] = max(self.in_flight_most[kind], self.in_flight)
        try:
            fault = self._next_fault(route)
            if fault is not None and fault.act == "error":
                assert fault.error is not None
                await request.read()
                return self._error(fault.error, fault.headers)
            if fault is not None and fault.act == "reset":
                return await self._drop(request)
            if fault is not None and fault.act == "hang":
                await self._over.wait()
            if request.path != "/readyz" and not self._known(request):
                return self._error(Unauthenticated("no such token"))
            try:
                response = await handler(request)
            except HaversackError as error:
                response = self._error(error)
            return response if fault is None else await self._spoil(request, response, fault)
        finally:
            self.in_flight -= 1

    def _next_fault(self, route: str) -> Fault | None:
        for fault in self.script:
            if re.search(fault.route, route):
                if fault.after > 0:
                    fault.after -= 1
                    continue
                fault.times -= 1
                if fault.times <= 0:
                    self.script.remove(fault)
                return fault
        return None

    async def _spoil(
        self, request: web.Request, response: web.StreamResponse, fault: Fault
    ) -> web.StreamResponse:
        assert isinstance(response, web.Response)
        assert isinstance(response.body, bytes)
        body = response.body
        match fault.act:
            case "lost":
                return await self._drop(request)
            case "cut":
                cut = web.StreamResponse(status=response.status)
                cut.content_length = len(body)
                await cut.prepare(request)
                await cut.write(body[: len(body) // 2])
                return await self._drop(request, cut)
            case "corrupt":
                response.body = body[:-1] + bytes([body[-1] ^ 1])
            case "garbage":
                response.body = b"<html>this is a router, not a cell</html>"
        return response

    async def _drop(
        self, request: web.Request, response: web.StreamResponse | None = None
    ) -> web.StreamResponse:
        transport = request.transport
        if transport is not None:
            if response is not None:
                await asyncio.sleep(0)  # what was written leaves before the connection ends
                transport.close()
            else:
                transport.abort()
        return response or web.Response()

    def _error(self, error: HaversackError, headers: dict[str, str] | None = None) -> web.Response:
        status = _STATUS.get(error.kind, 503)
        return web.Response(
            status=status, body=orjson.dumps({"error": _described(error)}), headers=headers
        )

    def _known(self, request: web.Request) -> bool:
        return request.headers.get("Authorization") == f"Bearer {TOKEN}"

    # ------------------------------------------------------------------ blocks

    async def _check(self, request: web.Request) -> web.Response:
        hashes = [BlockHash.parse(text) for text in (await request.json())["hashes"]]
        self.batch_sizes.append(len(hashes))
        self.claimed.update(block for block in hashes if block in self.blocks)
        return _json({"missing": [str(block) for block in hashes if block not in self.blocks]})

    async def _put(self, request: web.Request) -> web.Response:
        block, data = BlockHash.parse(request.match_info["hash"]), await request.read()
        new = self._store(block, data)
        return _json({"hash": str(block), "new": new, "length": len(data)}, 201 if new else 200)

    def _store(self, block: BlockHash, data: bytes) -> bool:
        if block in self.refuse_blocks:
            raise self.refuse_blocks[block]
        assert len(data) <= BLOCK_BYTES_MAX
        self.body_bytes += len(data)
        if hashlib.sha256(data).digest() != block:
            raise HashMismatch(f"body does not hash to {block}")
        new = block not in self.blocks
        self.blocks[block] = data
        self.claimed.add(block)
        return new

    async def _batch(self, request: web.Request) -> web.Response:
        results, errors = [], []
        for index, frame in enumerate(block_frames.iter_frames(await request.read())):
            try:
                new = self._store(frame.block, bytes(frame.data))
                results.append("created" if new else "exists")
            except HaversackError as error:
                results.append("error")
                errors.append(
                    {"index": index, "hash": str(frame.block), "error": _described(error)}
                )
        return _json({"results": results, "errors": errors})

    async def _get(self, request: web.Request) -> web.Response:
        block = BlockHash.parse(request.match_info["hash"])
        if block in self.refuse_blocks:
            raise self.refuse_blocks[block]
        if block not in self.blocks:
            raise BlockNotFound(block)
        return web.Response(body=self.blocks[block], headers={"ETag": f'"{block}"'})

    async def _fetch(self, request: web.Request) -> web.Response:
        body, room = bytearray(), 16 << 20
        for text in (await request.json())["hashes"]:
            block = BlockHash.parse(text)
            data, status = b"", FrameStatus.OK
            if block in self.refuse_blocks:
                status = FrameStatus.UNAVAILABLE
            elif block not in self.blocks:
                status = FrameStatus.NOT_FOUND
            elif len(body) + len(self.blocks[block]) > room:
                status = FrameStatus.NOT_SENT
            else:
                data = self.blocks[block]
            body += block_frames.pack_frame_header(block, status, len(data)) + data
        return web.Response(body=bytes(body), content_type=block_frames.MEDIA_TYPE)

    # ------------------------------------------------------------------ metadata

    async def _commit(self, request: web.Request) -> web.Response:
        entry, created = self._apply(await request.json())
        return _json({"entry": entry}, 201 if created else 200)

    async def _commit_batch(self, request: web.Request) -> web.Response:
        if self.before_commit is not None:
            self.before_commit()
        results: list[dict[str, Any]] = []
        for new in (await request.json())["entries"]:
            try:
                results.append({"entry": self._apply(new)[0]})
            except HaversackError as error:
                results.append({"error": _described(error)})
        return _json({"results": results})

    def _apply(self, new: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        path = _canonical(new["path"])
        blocks = [BlockHash.parse(text) for text in new["block_list"] or ()]
        missing = [block for block in blocks if block not in self.claimed]
        if missing:
            raise MissingBlocks(missing)
        standing = self.entries.get(name_key(path))
        wanted = {name: new[name] for name in ("block_list", "content", "symlink", "size")}
        if standing is not None and all(standing[name] == wanted[name] for name in wanted):
            standing.update(mtime=new["mtime"], executable=new["executable"])
            return standing, False
        rev = None if standing is None else standing["rev"]
        if rev != new["parent_rev"] or (standing or {}).get("kind") == "folder":
            raise RevConflict(f"{path} changed", {"server": standing})
        self._parents(path)
        kind = "symlink" if new["symlink"] is not None else "file"
        entry = self._new_entry(path, kind, **wanted)
        entry.update(mtime=new["mtime"], executable=new["executable"])
        return entry, True

    def _new_entry(self, path: str, kind: str, **values: Any) -> dict[str, Any]:
        self._revs += 1
        entry = {
            "id": f"e{self._revs}", "path": path, "name": path.rsplit("/", 1)[1], "kind": kind,
            "rev": f"r{self._revs}", "size": 0, "mtime": 0.0, "executable": False,
            "block_list": None, "content": None, "symlink": None, "modified": 0.0, **values,
        }  # fmt: skip
        self.entries[name_key(path)] = entry
        return entry

    def _parents(self, path: str) -> None:
        parts = path.split("/")[1:-1]
        for depth in range(1, len(parts) + 1):
            folder = "/" + "/".join(parts[:depth])
            standing = self.entries.get(name_key(folder))
            if standing is None:
                self._new_entry(folder, "folder")
            elif standing["kind"] != "folder":
                raise RevConflict(f"{folder} is no folder", {"server": standing})

    async def _list(self, request: web.Request) -> web.Response:
        path = _canonical(request.query["path"])
        if path != "/" and self.entries.get(name_key(path), {}).get("kind") != "folder":
            raise EntryNotFound(f"no folder {path}")
        prefix = name_key(path.rstrip("/") + "/")
        recursive = request.query.get("recursive") == "true"
        found = sorted(
            key
            for key in self.entries
            if key.startswith(prefix) and (recursive or "/" not in key[len(prefix) :])
        )
        start = int(request.query.get("cursor", "0"))
        limit = min(int(request.query["limit"]), self.page_limit)
        more = start + limit < len(found)
        return _json(
            {
                "entries": [self.entries[key] for key in found[start : start + limit]],
                "cursor": str(start + limit) if more else None,
            }
        )

    async def _entry(self, request: web.Request) -> web.Response:
        path = _canonical(request.query["path"])
        if name_key(path) not in self.entries:
            raise EntryNotFound(f"nothing at {path}")
        return _json(self.entries[name_key(path)])

    async def _delete(self, request: web.Request) -> web.Response:
        path = name_key(_canonical((await request.json())["path"]))
        doomed = [key for key in self.entries if key == path or key.startswith(path + "/")]
        if not doomed:
            raise EntryNotFound(f"nothing at {path}")
        for key in doomed:
            del self.entries[key]
        return _json({"deleted": len(doomed)})

    async def _folder(self, request: web.Request) -> web.Response:
        path = _canonical((await request.json())["path"])
        self._parents(path)
        standing = self.entries.get(name_key(path))
        if standing is not None and standing["kind"] != "folder":
            raise RevConflict(f"{path} is no folder", {"server": standing})
        return _json(standing or self._new_entry(path, "folder"))

    # ------------------------------------------------------------------ the rest

    async def _account(self, request: web.Request) -> web.Response:
        return _json({"id": 1, "name": "admin", "is_admin": True})

    async def _ready(self, request: web.Request) -> web.Response:
        return _json({})

    async def _status(self, request: web.Request) -> web.Response:
        node = {
            "id": "node-01", "state": "up", "pid": 4711, "directory": "/data/nodes/node-01",
            "host": "h1", "rack": "r1", "bytes": 1 << 30, "fragments": 17, "incarnation": 3,
            "detail": "",
        }  # fmt: skip
        gone = {**node, "id": "node-02", "state": "down", "pid": None, "detail": "no answer"}
        return _json(
            {
                "nodes": [node, gone],
                "volumes": {"open": 2, "sealed": 1, "by_spare": {"3": 1, "2": 2}},
                "blocks": len(self.blocks),
                "logical_bytes": 123456789,
                "stored_bytes": 190000000,
                "debts": 0,
                "redundancy": {
                    "blocks_by_spare": {"-1": 2, "2": 1000, "3": 5},
                    "debts": 0,
                    "oldest_debt": 1_795_305_600.0,
                    "unrepairable": 1,
                    "moves": 4,
                },
                "repair": {
                    "number": 3,
                    "begun": 1_795_305_600.0,
                    "ended": None,
                    "left_volumes": 2,
                    "left_bytes": 31_000_000_000,
                    "blocked_slots": 0,
                    "bytes_per_s": 91e6,
                    "eta_s": 340.0,
                },
                "jobs": [
                    {
                        "id": 7,
                        "kind": "drain",
                        "subject": "node-02",
                        "state": "running",
                        "done_units": 3,
                        "total_units": 12,
                        "eta_s": 200.0,
                    }
                ],
                "alarms": [
                    {"kind": "raised", "subject": "cell", "text": "[bold]\x1b[2J", "since": None}
                ],
                "scheme": "rs-6-3",
                "cluster_id": "c1",
                "version": "0.1.0",
            }
        )


@contextlib.asynccontextmanager
async def scripted_cell() -> AsyncIterator[ScriptedCell]:
    """A running cell."""
    cell = ScriptedCell()
    await cell.start()
    try:
        yield cell
    finally:
        await cell.stop()


def file_bytes(cell: ScriptedCell, path: str) -> bytes:
    """Content of a committed file."""
    entry = cell.entries[name_key(path)]
    if entry["content"] is not None:
        return base64.b64decode(entry["content"])
    return b"".join(cell.blocks[BlockHash.parse(text)] for text in entry["block_list"] or ())


def busy() -> HaversackError:
    """A refusal that may pass."""
    return NotEnoughNodes("5 of 9 nodes are up, 7 are needed")


def forbidden() -> HaversackError:
    """A refusal that will not."""
    return Forbidden("not yours")


def _described(error: HaversackError) -> dict[str, Any]:
    return {"kind": error.kind, "message": error.message, "details": error.details}


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(status=status, body=orjson.dumps(value), content_type="application/json")


def _canonical(path: str) -> str:
    parts = path.strip("/").split("/") if path.strip("/") else []
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise InvalidPath(f"{path!r} has a bad segment")
    return "/" + "/".join(parts)
