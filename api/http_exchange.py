"""One HTTP request and its answer, as an ASGI application sees them.

Step 1 of every walk over HTTP: `http_connection.HttpConnection` feeds the request in and carries
the answer out; the application (`api/gate.py`) calls `receive` and `send`.  Knows nothing of
routes, accounts or blocks.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, MutableMapping, Sequence
from http import HTTPStatus
from typing import Any, Final, Protocol

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Chunk = bytes | bytearray | memoryview

EXCHANGE: Final = "haversack.exchange"
"""Key of the ASGI scope under which the application finds the `Exchange` itself."""

JOIN_BYTES_MAX: Final = 16 * 1024
"""A body up to this is copied behind its header, so that both are one buffer for the kernel."""

_STATUS_LINES: Final = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode("ascii")
    for status in HTTPStatus
}
_NO_BODY: Final = frozenset({204, 304})
_log = logging.getLogger("api.http")


class Carrier(Protocol):
    """What an exchange asks of its connection."""

    def body_wanted(self, exchange: Exchange) -> None:
        """The application reads the body now: let it come."""
        ...

    def date_line(self) -> bytes:
        """The `Date` header, complete."""
        ...

    def write(self, pieces: list[Chunk]) -> None:
        """Hand pieces to the socket."""
        ...

    async def drained(self) -> None:
        """Return once the socket has taken nearly all that was written."""
        ...

    def answered(self, exchange: Exchange) -> None:
        """The answer is complete."""
        ...

    def abort(self) -> None:
        """Drop the connection: what was written cannot be completed."""
        ...


class Exchange:
    """State of one request: its body as it comes in, its answer as it goes out."""

    __slots__ = (
        "_carrier",
        "_chunks",
        "_delivered",
        "_expect_continue",
        "_head",
        "_left",
        "_loop",
        "_waiter",
        "answered",
        "body_complete",
        "body_length",
        "gone",
        "head_sent",
        "keep_alive",
        "received_bytes",
        "scope",
        "wanted",
    )

    def __init__(
        self,
        carrier: Carrier,
        loop: asyncio.AbstractEventLoop,
        scope: Scope,
        *,
        body_length: int | None,
        keep_alive: bool,
        expect_continue: bool,
    ) -> None:
        self._carrier = carrier
        self._loop = loop
        self._chunks: list[Chunk] = []
        self._waiter: asyncio.Future[None] | None = None
        self._expect_continue = expect_continue
        self._delivered = False
        self._head: bytes | None = None
        self._left: int | None = None
        self.scope = scope
        scope[EXCHANGE] = self
        self.body_length = body_length
        """From Content-Length; None for a chunked body."""
        self.keep_alive = keep_alive
        self.received_bytes = 0
        self.body_complete = False
        self.wanted = False
        self.gone = False
        self.head_sent = False
        self.answered = False

    # -- from the connection -------------------------------------------------------------------

    def push(self, chunk: Chunk) -> None:
        """More of the body."""
        self.received_bytes += len(chunk)
        self._chunks.append(chunk)
        self._wake()

    def complete_body(self) -> None:
        """The body has ended as it should."""
        self.body_complete = True
        self._wake()

    def lose(self) -> None:
        """The connection is gone, or what it carries cannot be trusted: nobody gets an answer."""
        self.gone = True
        self._wake()

    @property
    def buffered_bytes(self) -> int:
        """Body bytes that the application has not taken yet."""
        return sum(map(len, self._chunks))

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- the ASGI application ------------------------------------------------------------------

    async def run(self, app: Callable[..., Any]) -> None:
        """Task body: one call of the application, which answers or the connection is dropped."""
        try:
            await app(self.scope, self.receive, self.send)
        except Exception:  # noqa: BLE001 - logged; the connection is dropped below
            _log.exception("the application raised past its own error handling")
        finally:
            if not self.answered and not self.gone:
                self._carrier.abort()

    async def receive(self) -> Message:
        """ASGI: the next part of the body, or `http.disconnect`.

        A large body of known length arrives in parts of about a megabyte that are views into
        buffers of their own; small parts are joined.
        """
        if self._expect_continue:
            self._expect_continue = False
            if not (self.gone or self.head_sent or self.body_complete):
                self._carrier.write([b"HTTP/1.1 100 Continue\r\n\r\n"])
        if not self.body_complete:
            self._carrier.body_wanted(self)
        while not self._ready():
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._delivered or (self.gone and not self.body_complete):
            return {"type": "http.disconnect"}
        body = self._take()
        self._delivered = self.body_complete and not self._chunks
        return {"type": "http.request", "body": body, "more_body": not self._delivered}

    def _take(self) -> Chunk:
        """A large chunk as it is; else all that is there, joined."""
        chunks = self._chunks
        if len(chunks) == 1 or (chunks and len(chunks[0]) > JOIN_BYTES_MAX):
            return chunks.pop(0)
        self._chunks = []
        return b"".join(chunks)

    def _ready(self) -> bool:
        if self._delivered:
            return self.gone or self.answered
        return bool(self._chunks) or self.body_complete or self.gone

    async def send(self, message: Message) -> None:
        """ASGI: `http.response.start`, then bodies.  Returns once the socket has room again."""
        if self.gone:
            return
        if message["type"] == "http.response.start":
            self._start(message["status"], message.get("headers", ()))
            return
        body: Chunk = message.get("body", b"")
        more: bool = message.get("more_body", False)
        assert not self.answered, "a body after the end of the answer"
        self._write_body(body, more)
        await self._carrier.drained()

    async def respond(self, status: int, headers: Any, pieces: Sequence[Chunk]) -> None:
        """The whole answer at once, past ASGI: header and pieces in one system call.

        Content-Length is the sum of the pieces, except in an answer to HEAD, which has none.
        """
        if self.gone:
            return
        self._start(status, headers)
        assert self._head is not None, "just made"
        total = sum(map(len, pieces)) if self._left else 0
        assert total == self._left, "the pieces are not what Content-Length says"
        self._left = 0
        self.head_sent = self.answered = True
        if not total:
            self._carrier.write([self._head])
        elif total <= JOIN_BYTES_MAX:
            self._carrier.write([b"".join((self._head, *pieces))])
        else:
            self._carrier.write([self._head, *pieces])
        self._wake()
        self._carrier.answered(self)
        await self._carrier.drained()

    def _start(self, status: int, headers: Any) -> None:
        """Build the header; it is written together with the first piece of body."""
        assert self._head is None, "two answers to one request"
        lines = [_STATUS_LINES[status], self._carrier.date_line()]
        length: int | None = None
        for name, value in headers:
            if name == b"content-length":
                length = int(value)
            elif name == b"connection":
                self.keep_alive = False
                continue
            if b"\n" in value or b"\r" in value:
                raise ValueError(f"header {name!r} of the answer holds a line break")
            lines += (name, b": ", value, b"\r\n")
        if not self.body_complete:
            self.keep_alive = False
        without_body = self.scope["method"] == "HEAD" or status in _NO_BODY
        self._left = 0 if without_body else length
        if length is None and not without_body:
            self.keep_alive = False  # the end of the connection is the end of the body
        lines.append(b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n")
        self._head = b"".join(lines)

    def _write_body(self, body: Chunk, more: bool) -> None:
        assert self._head is not None, "a body before the start of the answer"
        if self._left is not None:
            if self._left == 0 and (self.scope["method"] == "HEAD" or not body):
                body = b""
            self._left -= len(body)
            assert self._left >= 0, "the body is longer than its Content-Length"
            assert more or self._left == 0, "the body is shorter than its Content-Length"
        if self.head_sent:
            if body:
                self._carrier.write([body])
        else:
            self.head_sent = True
            if len(body) <= JOIN_BYTES_MAX:
                self._carrier.write([self._head + bytes(body) if body else self._head])
            else:
                self._carrier.write([self._head, body])
        if not more:
            self.answered = True
            self._wake()
            self._carrier.answered(self)
