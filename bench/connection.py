"""A keep-alive HTTP/1.1 connection that costs the load generator almost nothing.

The project's client retries, verifies and parses JSON; a load generator on the same two cores must
not, or it measures itself.  Bodies go out without a copy and come in to one buffer per connection.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple, cast

from protocol.limits import MIB

_HEAD_MAX = 64 * 1024


def request_head(
    method: str, url: str, token: str, media_type: str = "application/octet-stream", length: int = 0
) -> bytes:
    """What goes before a body of `length` bytes; `url` is HOST:PORT/PATH."""
    host, path = url.split("/", 1)
    return (
        f"{method} /{path} HTTP/1.1\r\nhost: {host}\r\n"
        f"authorization: Bearer {token}\r\ncontent-type: {media_type}\r\n"
        f"content-length: {length}\r\n\r\n"
    ).encode()


class Answer(NamedTuple):
    """`body` is a view that is valid until the next request on this connection."""

    status: int
    body: memoryview
    received: bytearray
    """Where the body lies, at `body_at`: a view compares item by item, an array as memory."""
    body_at: int

    def holds(self, data: bytes) -> bool:
        """Whether the body is `data`, told without a copy of either."""
        return len(self.body) == len(data) and self.received.startswith(data, self.body_at)


class LoadConnection(asyncio.BufferedProtocol):
    """One request at a time."""

    def __init__(self, buffer_bytes: int = 6 * MIB) -> None:
        self._buffer = bytearray(buffer_bytes)
        self._view = memoryview(self._buffer)
        self._filled = 0
        self._body_at = 0
        self._body_end = 0
        self._status = 0
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[Answer] | None = None

    @classmethod
    async def open(cls, host: str, port: int) -> LoadConnection:
        """Connect."""
        loop = asyncio.get_running_loop()
        _, protocol = await loop.create_connection(cls, host, port)
        return protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    async def request(self, head: bytes, body: bytes = b"") -> Answer:
        """Send `head` (complete with its blank line) and `body`; wait for the whole answer."""
        assert self._transport is not None
        assert self._waiter is None, "one request at a time"
        self._filled = self._body_end = 0
        self._waiter = asyncio.get_running_loop().create_future()
        self._transport.writelines((head, body) if body else (head,))
        return await self._waiter

    def close(self) -> None:
        """Drop the connection."""
        if self._transport is not None:
            self._transport.close()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._view[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self._filled += nbytes
        if self._body_end == 0 and not self._read_head():
            return
        if self._filled >= self._body_end and self._waiter is not None:
            body = self._view[self._body_at : self._body_end]
            answer = Answer(self._status, body, self._buffer, self._body_at)
            waiter, self._waiter = self._waiter, None
            if not waiter.done():
                waiter.set_result(answer)

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n", 0, min(self._filled, _HEAD_MAX))
        if end < 0:
            return False
        lines = bytes(self._view[:end]).lower().split(b"\r\n")
        self._status = int(lines[0].split(b" ", 2)[1])
        lengths = [line for line in lines[1:] if line.startswith(b"content-length:")]
        length = int(lengths[0].split(b":")[1]) if lengths else 0
        self._body_at = end + 4
        self._body_end = self._body_at + length
        assert self._body_end <= len(self._buffer)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(
                exc or ConnectionResetError("the server closed the connection")
            )
