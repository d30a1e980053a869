"""A real uvicorn on an ephemeral loopback port, in a thread with its own uvloop; raw sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import uvicorn
import uvloop

from api.http_listener import Listener, Patience
from protocol.errors import HaversackError

T = TypeVar("T")
DEADLINE_S = 20.0


@dataclass
class Running:
    """A server that answers at `address`."""

    address: tuple[str, int]
    server: uvicorn.Server
    listener: Listener
    loop: asyncio.AbstractEventLoop
    refused: list[HaversackError] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://{self.address[0]}:{self.address[1]}"

    def call(self, make: Callable[[], Awaitable[T]]) -> T:
        """Run a coroutine in the server's loop and wait for it."""

        async def run() -> T:
            return await make()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(DEADLINE_S)

    def connect(self) -> socket.socket:
        """A new connection, with a deadline on every call."""
        return socket.create_connection(self.address, timeout=DEADLINE_S)

    def exchange(self, request: bytes) -> bytes:
        """Send and read until the server closes."""
        with self.connect() as peer:
            peer.sendall(request)
            return read_all(peer)


def read_all(peer: socket.socket) -> bytes:
    """Everything until the peer ends."""
    pieces = []
    while piece := peer.recv(1 << 16):
        pieces.append(piece)
    return b"".join(pieces)


def read_answer(peer: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Exactly one answer that has a Content-Length: status, headers, body."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = peer.recv(1 << 16)
        assert piece, f"the connection ended in a header: {data!r}"
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:])
    length = int(headers.get("content-length", "0"))
    while len(body) < length:
        piece = peer.recv(1 << 16)
        assert piece, "the connection ended in a body"
        body += piece
    assert len(body) == length, f"bytes after the answer: {body[length:]!r}"
    return int(lines[0].split(" ")[1]), headers, body


@contextlib.contextmanager
def serving(
    make_app: Callable[[], Any], patience: Patience | None = None, check_s: float = 0.05
) -> Iterator[Running]:
    """Serve `make_app()` (called in the server's loop) until the block ends."""
    started = threading.Event()
    box: list[Running] = []
    failure: list[BaseException] = []
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    refused: list[HaversackError] = []
    listener = Listener(patience or Patience(), on_refused=refused.append, check_s=check_s)

    async def run() -> None:
        config = uvicorn.Config(
            make_app(),
            http=cast(Any, listener),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=5,
        )
        server = uvicorn.Server(config)
        loop = asyncio.get_running_loop()
        box.append(Running(sock.getsockname(), server, listener, loop, refused))
        serve = asyncio.ensure_future(server.serve(sockets=[sock]))
        while not server.started and not serve.done():  # noqa: ASYNC110 - uvicorn has no event
            await asyncio.sleep(0.005)
        started.set()
        await serve

    def body() -> None:
        try:
            uvloop.run(run())
        except BaseException as error:  # noqa: BLE001 - raised again by the test
            failure.append(error)
        finally:
            sock.close()
            started.set()

    thread = threading.Thread(target=body, name="api-server", daemon=True)
    thread.start()
    assert started.wait(DEADLINE_S)
    if failure:
        raise failure[0]
    try:
        yield box[0]
    finally:
        box[0].server.should_exit = True
        thread.join(DEADLINE_S)
        assert not thread.is_alive(), "the server did not stop"
        if failure:
            raise failure[0]
