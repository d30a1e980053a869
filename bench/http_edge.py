"""What HTTP itself costs the gateway: CPU per request with nothing behind it.

`python -m bench.http_edge` prints the figures of `docs/design/011-http-api.md`.  A process serves,
this one drives it over eight keep-alive connections.  Three servers:

    uvicorn   a bare ASGI application under uvicorn's own httptools protocol
    ours      the same application under `api.http_connection`
    gateway   the whole API (gate, tokens, authority, answers) over services that answer at once

The bare application joins nothing and hashes nothing unless told to: the difference between the
first two is the connection, between the last two the gate and the routes.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import multiprocessing
import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, cast

import psutil
import uvicorn
import uvloop

from api.app import create_app
from api.gateway import bind
from api.http_listener import Listener, Patience
from api.services import Services
from api.watcher import WatchSample
from bench.connection import LoadConnection
from cluster.block_client_settings import PutResult
from metadata.accounts import Account
from protocol.allocator import reuse_large_buffers
from protocol.clock import SystemClock
from protocol.config import load
from protocol.ids import BlockHash
from protocol.limits import KIB, MIB
from protocol.logs import open_log

SMALL = bytes(1 * KIB)
LARGE = bytes(4 * MIB)
CONNECTIONS = 8
_TOKEN = b"authorization: bearer hvs_bench\r\n"


class _Bare:
    """GET answers 1 KiB or 4 MiB from memory; PUT takes a body and, asked to, hashes it."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, status = b"", 201
        if scope["method"] == "GET":
            body, status = LARGE if scope["path"] == "/large" else SMALL, 200
        else:
            digest, more = hashlib.sha256(), True
            while more:
                message = await receive()
                if scope["path"] == "/hash":
                    digest.update(message["body"])
                more = message["more_body"]
        headers = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class _Instant:
    """Stands for every service: knows every token, holds every block."""

    async def authenticate(self, _token: str) -> Account:
        return Account(1, "bench", False, 1)

    async def references(self, _account: Account, hashes: Sequence[BlockHash]) -> set[BlockHash]:
        return set(hashes)

    async def claimed(self, _owner: int, _hashes: Sequence[BlockHash]) -> set[BlockHash]:
        return set()

    async def lengths(self, blocks: Sequence[BlockHash]) -> dict[BlockHash, int]:
        return {block: len(self._data(block)) for block in blocks}

    async def get_pieces(self, block: BlockHash) -> tuple[bytes, ...]:
        return (self._data(block),)

    async def put(self, _owner: int, _block: BlockHash, _parts: Any, length: int) -> PutResult:
        return PutResult(True, length, False)

    def _data(self, block: BlockHash) -> bytes:
        return LARGE if block[0] else SMALL


def _application(name: str) -> Any:
    if name != "gateway":
        return _Bare()
    instant = cast(Any, _Instant())
    loop, threads = asyncio.get_running_loop(), ThreadPoolExecutor(2)

    async def run(function: Any, *arguments: Any) -> Any:
        return await loop.run_in_executor(threads, function, *arguments)

    return create_app(
        Services(
            settings=load(),
            clock=SystemClock(),
            accounts=instant,
            tree=instant,
            index=instant,
            volume_map=instant,
            blocks=instant,
            status=instant,
            verification=instant,
            snapshot=instant,
            explainer=instant,
            losses=instant,
            readiness=instant,
            changes=instant,
            scrubs=instant,
            run=run,
            cell_db=instant,
            canaries=instant,
            lookout=instant,
            sample=WatchSample(random.Random(1), 0.0),
            watcher_token="of the bench",
        )
    )


async def _serve(name: str, ready: Connection) -> None:
    http: Any = "httptools" if name == "uvicorn" else Listener(Patience())
    config = uvicorn.Config(
        _application(name),
        http=http,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
    )
    listening = bind("127.0.0.1", 0)
    listening.listen()
    ready.send(listening.getsockname())
    await uvicorn.Server(config).serve(sockets=[listening])


def _server_process(name: str, ready: Connection) -> None:
    reuse_large_buffers(96 * MIB)
    open_log(None)
    uvloop.run(_serve(name, ready))


async def _drive(address: tuple[str, int], head: bytes, body: bytes, seconds: float) -> int:
    done = 0
    end = time.monotonic() + seconds

    async def client() -> None:
        nonlocal done
        connection = await LoadConnection.open(*address)
        while time.monotonic() < end:
            answer = await connection.request(head, body)
            assert answer.status in (200, 201), bytes(answer.body)
            done += 1
        connection.close()

    await asyncio.gather(*(client() for _ in range(CONNECTIONS)))
    return done


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _put(path: str, body: bytes) -> tuple[bytes, bytes]:
    length = f"content-length: {len(body)}\r\n".encode()
    return f"PUT {path} HTTP/1.1\r\nhost: a\r\n".encode() + _TOKEN + length + b"\r\n", body


def _get(path: str) -> tuple[bytes, bytes]:
    return f"GET {path} HTTP/1.1\r\nhost: a\r\n".encode() + _TOKEN + b"\r\n", b""


def _phases(name: str) -> list[tuple[str, tuple[bytes, bytes]]]:
    large = os.urandom(4 * MIB)
    if name == "gateway":
        put = f"/v1/blocks/{hashlib.sha256(large).hexdigest()}"
        small = f"/v1/blocks/{hashlib.sha256(SMALL).hexdigest()}"
        return [
            ("GET 1 KiB", _get("/v1/blocks/" + "00" * 32)),
            ("GET 4 MiB", _get("/v1/blocks/" + "ff" * 32)),
            ("PUT 1 KiB, hashed", _put(small, SMALL)),
            ("PUT 4 MiB, hashed", _put(put, large)),
        ]
    return [
        ("GET 1 KiB", _get("/small")),
        ("GET 4 MiB", _get("/large")),
        ("PUT 4 MiB", _put("/drop", large)),
        ("PUT 4 MiB, hashed", _put("/hash", large)),
    ]


def _measure(name: str, seconds: float) -> None:
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.Process(target=_server_process, args=(name, theirs), daemon=True)
    server.start()
    address = ours.recv()
    assert server.pid is not None
    process = psutil.Process(server.pid)
    for label, (head, body) in _phases(name):
        uvloop.run(_drive(address, head, body, seconds / 4))  # warm up
        before, start = _cpu_s(process), time.monotonic()
        done = uvloop.run(_drive(address, head, body, seconds))
        elapsed, cpu = time.monotonic() - start, _cpu_s(process) - before
        print(
            f"{name:8}  {label:18}  {done / elapsed:8,.0f}/s  "
            f"{cpu / done * 1e3:7.3f} ms CPU  {done / cpu:8,.0f}/s of one core"
        )
    server.terminate()
    server.join()


def main() -> None:
    """Measure all three."""
    parser = argparse.ArgumentParser(prog="python -m bench.http_edge")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("servers", nargs="*", default=["uvicorn", "ours", "gateway"])
    arguments = parser.parse_args()
    multiprocessing.set_start_method("spawn")
    for name in arguments.servers:
        _measure(name, arguments.seconds)


if __name__ == "__main__":
    main()
