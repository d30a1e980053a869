"""The two limits every figure is measured against, taken in the same run.

P receives a body, hashes it, encodes 6+3 and appends the nine fragments to nine files, each with
fdatasync: what one process can do without a cluster and without RocksDB.  H answers 4 MiB from
memory.  Both are one bare ASGI application in one process on the stack the gateway uses (uvicorn,
uvloop, httptools), with the same allocator setting.  P does its blocking work in threads, as the
gateway does, so that it may use both cores.

Run as `python -m bench.limits DIR`: prints the port, serves until its parent ends it.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvicorn
from pyeclib.ec_iface import ECDriver

from protocol.allocator import reuse_large_buffers
from protocol.limits import BLOCK_BYTES_MAX, MIB

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

FRAGMENTS = 9


class Limits:
    """ASGI application: PUT is P, GET is H."""

    def __init__(self, directory: Path) -> None:
        self._driver = ECDriver(k=6, m=3, ec_type="isa_l_rs_cauchy")
        self._files = [
            os.open(directory / f"fragments-{i}", os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
            for i in range(FRAGMENTS)
        ]
        self._answer = os.urandom(BLOCK_BYTES_MAX)

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if scope["method"] == "PUT":
            await self._put(scope["path"], receive)
            body, status = b"{}", 201
        else:
            body, status = self._answer, 200
        length = str(len(body)).encode()
        await send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(b"content-length", length)],
            }
        )
        await send({"type": "http.response.body", "body": body})

    async def _put(self, path: str, receive: Receive) -> None:
        parts: list[bytes] = []
        more = True
        while more:
            message = await receive()
            parts.append(message.get("body", b""))
            more = message.get("more_body", False)
        body = b"".join(parts)
        loop = asyncio.get_running_loop()
        digest, fragments = await asyncio.gather(
            loop.run_in_executor(None, _sha256, body),
            loop.run_in_executor(None, self._driver.encode, body),
        )
        assert path.endswith(digest), "the body is not what its name says"
        await asyncio.gather(
            *(
                loop.run_in_executor(None, _append, file, fragment)
                for file, fragment in zip(self._files, fragments, strict=True)
            )
        )


def _sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def _append(file: int, fragment: bytes) -> None:
    os.write(file, fragment)
    os.fdatasync(file)


def main(directory: Path) -> None:
    """Serve both limits on a free loopback port, printed on standard output."""
    reuse_large_buffers(192 * MIB)
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    print(listener.getsockname()[1], flush=True)
    config = uvicorn.Config(
        Limits(directory), loop="uvloop", http="httptools", lifespan="off", log_level="error"
    )
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
