"""One HTTP/1.1 connection: bytes in, requests out, answers in order, and patience that ends.

Step 1 of every walk over HTTP.  uvicorn makes one `HttpConnection` per socket through
`http_listener.Listener`; httptools parses; `http_exchange.Exchange` is each request.  uvicorn's
own protocol is not used because it has no limit on the size of a header, none on the time a
header or a body may take, resets the connection under an answer that is sent before the body was
read, and copies a body four times (`docs/design/011-http-api.md`).

    phase        what is awaited                        ends with
    idle         the first byte of a request            keep-alive time: close
    header       the end of its header                  408, 431 or 400, then linger
    body         the rest of its body                   408 if it is too slow
    answering    the application
    linger       the peer's end, after an answer that   close
                 came before the whole body

A body whose length is known goes past the parser, straight from the socket into its own buffer.
"""

from __future__ import annotations

import asyncio
import urllib.parse
from collections import deque
from typing import TYPE_CHECKING, Any, Final, cast

import httptools

from api.errors import render
from api.http_exchange import Chunk, Exchange
from protocol.buffers import buffer_to_fill
from protocol.errors import HaversackError, HeaderTooLarge, MalformedHttp, RequestTimeout
from protocol.limits import HEADER_BYTES_MAX, KIB, MIB

if TYPE_CHECKING:
    from api.http_listener import Listener

SEGMENT_BYTES: Final = 1 * MIB
"""Piece of a large body: what a peer that stalls makes us hold, and what is hashed at once."""

DIRECT_BYTES_MIN: Final = 32 * KIB
"""A rest of a body below this goes through the parser: setting up the short cut costs more."""

BUFFERED_BYTES_MAX: Final = 64 * KIB
"""Bytes of a chunked body that wait for the application before the peer has to."""

LINGER_BYTES_MAX: Final = 64 * MIB
"""Bytes of a refused body that are read and thrown away, so that the answer is not lost."""


class HttpConnection(asyncio.BufferedProtocol):
    """The protocol of one accepted socket; also the `Carrier` of its exchanges."""

    def __init__(self, listener: Listener, loop: asyncio.AbstractEventLoop) -> None:
        self._listener = listener
        self._loop = loop
        self._parser: httptools.HttpRequestParser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._peer: tuple[str, int] | None = None
        self._parsing: Exchange | None = None
        """The request whose body has not ended yet."""
        self._answering: Exchange | None = None
        self._waiting: deque[Exchange] = deque()
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._header_bytes = 0
        """Of the header so far, as the parser gives it out: whole fields."""
        self._unparsed_bytes = 0
        """Of the header so far, as it came: a field without an end is in here only."""
        self._in_header = False
        self._refusal: HaversackError | None = None
        self._segment: memoryview | None = None
        self._filled = 0
        self._room: asyncio.Future[None] | None = None
        self._stopping = False
        """Close after the present answer."""
        self._deaf = False
        """What comes from here on is no request."""
        self._lingering = False
        self._lingered_bytes = 0
        self._written_bytes = 0
        self._since = loop.time()
        """Start of the present phase of reading."""
        self._body_mark = 0
        self._write_since: float | None = None
        self._write_mark = 0

    # -- asyncio -------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it
        name = transport.get_extra_info("peername")
        self._peer = (str(name[0]), int(name[1])) if isinstance(name, tuple | list) else None
        if not self._listener.opened(self):
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._listener.closed(self)
        self._transport = None
        self._segment = None
        for exchange in (self._parsing, self._answering, *self._waiting):
            if exchange is not None:
                exchange.lose()
        self._waiting.clear()
        self.resume_writing()

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._segment is not None:
            return self._segment[self._filled :]
        return self._listener.read_buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._segment is not None:
            self._fill_segment(nbytes)
        elif self._lingering:
            self._lingered_bytes += nbytes
            if self._lingered_bytes > LINGER_BYTES_MAX:
                self.abort()
        elif not self._deaf:
            self._feed(self._listener.read_buffer[:nbytes])

    def eof_received(self) -> bool:
        """Answer a peer that only closed its own direction after a complete request."""
        self._stopping = self._deaf = True
        return self._answering is not None and self._parsing is None

    def pause_writing(self) -> None:
        if self._room is None:
            self._room = self._loop.create_future()

    def resume_writing(self) -> None:
        room, self._room = self._room, None
        if room is not None and not room.done():
            room.set_result(None)

    # -- parsing -------------------------------------------------------------------------------

    def _feed(self, data: memoryview) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._stopping = self._deaf = True  # answered as if not asked to upgrade, then closed
        except httptools.HttpParserError:
            self._refuse(self._refusal or MalformedHttp("this is not an HTTP/1.1 request"))
            return
        if self._in_header:
            self._unparsed_bytes += len(data)
            if self._unparsed_bytes > HEADER_BYTES_MAX:
                self._refuse(_header_too_large())
        elif self._parsing is not None:
            self._await_body(self._parsing)

    def on_message_begin(self) -> None:
        self._url = b""
        self._headers = []
        self._header_bytes = self._unparsed_bytes = 0
        self._in_header = True
        self._since = self._loop.time()

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._count_header(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_header(len(name) + len(value))
        if self._in_header:  # else a trailer of a chunked body, which means nothing to us
            self._headers.append((name.lower(), value))

    def _count_header(self, count: int) -> None:
        self._header_bytes += count
        if self._header_bytes > HEADER_BYTES_MAX:
            self._refusal = _header_too_large()
            raise self._refusal

    def on_headers_complete(self) -> None:
        self._in_header = False
        version = self._parser.get_http_version()
        if version not in ("1.1", "1.0"):
            self._refusal = MalformedHttp(f"HTTP version {version}: this server speaks 1.1")
            raise self._refusal
        length: int | None = 0
        expect_continue = False
        for name, value in self._headers:
            if name == b"content-length":
                length = int(value)
            elif name == b"transfer-encoding":
                length = None
            elif name == b"expect":
                expect_continue = value.lower() == b"100-continue"
        if self._parser.should_upgrade() and length != 0:
            self._refusal = MalformedHttp("a request to upgrade cannot have a body")
            raise self._refusal
        exchange = Exchange(
            self,
            self._loop,
            self._scope(version),
            body_length=length,
            keep_alive=version == "1.1" and self._parser.should_keep_alive(),
            expect_continue=expect_continue and version == "1.1",
        )
        self._parsing = exchange
        self._body_mark = 0
        if self._answering is None:
            self._start(exchange)
        else:
            self._waiting.append(exchange)
            self._pause_reading()

    def on_body(self, body: bytes) -> None:
        exchange = self._parsing
        if exchange is not None and not exchange.answered:
            exchange.push(body)

    def on_message_complete(self) -> None:
        exchange, self._parsing = self._parsing, None
        if exchange is not None:
            exchange.complete_body()

    def _scope(self, version: str) -> dict[str, Any]:
        url = self._url
        if not url.startswith(b"/"):
            parsed = httptools.parse_url(url)  # absolute form, or an error
            url = parsed.path or b"/"
            query = parsed.query or b""
        else:
            url, _, query = url.partition(b"?")
        path = url.decode("ascii")
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": version,
            "method": self._parser.get_method().decode("ascii"),
            "scheme": "http",
            "path": urllib.parse.unquote(path) if "%" in path else path,
            "raw_path": url,
            "query_string": query,
            "root_path": "",
            "headers": self._headers,
            "client": self._peer,
            "server": None,
        }

    # -- bodies --------------------------------------------------------------------------------

    def _await_body(self, exchange: Exchange) -> None:
        """Called with a body that has not ended: take the short cut, go on, or hold the peer."""
        if exchange.wanted and exchange.body_length is not None:
            self._take_directly(exchange)
        elif exchange.body_length is not None or exchange.buffered_bytes > BUFFERED_BYTES_MAX:
            self._pause_reading()  # until the application reads

    def body_wanted(self, exchange: Exchange) -> None:
        """Carrier: the application reads, or reads on."""
        if exchange is not self._parsing or self._transport is None:
            return
        if not exchange.wanted:
            exchange.wanted = True
            self._since = self._loop.time()
            self._body_mark = exchange.received_bytes
        if exchange.body_length is not None:
            self._take_directly(exchange)
        self._resume_reading()

    def _take_directly(self, exchange: Exchange) -> None:
        assert exchange.body_length is not None, "only a body of known length"
        if self._segment is not None:
            return
        left = exchange.body_length - exchange.received_bytes
        if left >= DIRECT_BYTES_MIN:
            self._segment = memoryview(buffer_to_fill(min(left, SEGMENT_BYTES)))
            self._filled = 0

    def _fill_segment(self, count: int) -> None:
        exchange, segment = self._parsing, self._segment
        assert exchange is not None, "a segment without a request"
        assert exchange.body_length is not None, "a segment for a body of unknown length"
        assert segment is not None, "nothing to fill"
        self._filled += count
        if self._filled < len(segment):
            return
        left = exchange.body_length - exchange.received_bytes - len(segment)
        self._segment = memoryview(buffer_to_fill(min(left, SEGMENT_BYTES))) if left else None
        self._filled = 0
        exchange.push(segment)
        if not left:
            self._parser = httptools.HttpRequestParser(self)  # the old one still awaits the body
            self.on_message_complete()

    # -- answering -----------------------------------------------------------------------------

    def _start(self, exchange: Exchange) -> None:
        self._answering = exchange
        self._listener.start(exchange)

    def date_line(self) -> bytes:
        """Carrier: from the listener, which makes it once a second."""
        return self._listener.date_line()

    def write(self, pieces: list[Chunk]) -> None:
        """Carrier: one system call for all pieces."""
        if self._transport is None or self._lingering or self._transport.is_closing():
            return
        self._written_bytes += sum(map(len, pieces))
        if len(pieces) == 1:
            self._transport.write(pieces[0])
        else:
            self._transport.writelines(pieces)

    async def drained(self) -> None:
        """Carrier: wait while the socket's queue is over its mark."""
        while self._room is not None:
            await asyncio.shield(self._room)

    def answered(self, exchange: Exchange) -> None:
        """Carrier: go on with the next request, or end the connection."""
        assert exchange is self._answering, "answers out of order"
        self._listener.count_request()
        self._answering = None
        self._since = self._loop.time()
        if self._transport is None or self._transport.is_closing():
            return
        if not exchange.body_complete:
            self._linger()
        elif self._stopping or not exchange.keep_alive:
            self._transport.close()
        elif self._waiting:
            self._start(self._waiting.popleft())
        if not self._waiting:
            self._resume_reading()

    def abort(self) -> None:
        """Carrier: drop everything now."""
        if self._transport is not None:
            self._transport.abort()

    def shutdown(self) -> None:
        """uvicorn: the server stops; close when idle, else after the present answer."""
        self._stopping = True
        if self._answering is not None:
            self._answering.keep_alive = False
        elif self._transport is not None:
            self._transport.close()

    def _refuse(self, error: HaversackError) -> None:
        """Answer for a request that cannot become one, unless another answer is under way."""
        self._stopping = self._deaf = True
        self._segment = None
        broken, self._parsing = self._parsing, None
        self._in_header = False
        if broken is not None:
            broken.lose()
        answering = self._answering
        if self._transport is None or self._transport.is_closing():
            return
        if answering is not None and answering is not broken:
            answering.keep_alive = False  # earlier requests are answered, then the end
            self._waiting.clear()
            self._pause_reading()
            return
        if answering is not None and answering.head_sent:
            self._transport.abort()
            return
        status, headers, body = render(error)
        head = b"".join(b"%s: %s\r\n" % header for header in headers)
        self.write(
            [
                b"HTTP/1.1 %d \r\n%scontent-type: application/json\r\n"
                b"content-length: %d\r\nconnection: close\r\n%s\r\n%s"
                % (status, self.date_line(), len(body), head, body)
            ]
        )
        self._listener.refused(error)
        self._linger()

    def _linger(self) -> None:
        """Half-close and throw away what still comes: a close with unread bytes is a reset, and
        a reset takes the answer with it."""
        assert self._transport is not None, "nothing to linger on"
        self._lingering = True
        self._segment = None
        self._parsing = None
        self._since = self._loop.time()
        self._transport.write_eof()
        self._resume_reading()

    def _pause_reading(self) -> None:
        if self._transport is not None:
            self._transport.pause_reading()

    def _resume_reading(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    # -- patience ------------------------------------------------------------------------------

    def check(self, now: float) -> None:
        """Called about once a second by the listener: end what takes too long."""
        transport, patience = self._transport, self._listener.patience
        if transport is None:
            return
        if self._is_stalled(transport, now):
            transport.abort()
        elif transport.is_closing():
            return  # what was written still goes out, unless it stalls
        elif self._lingering:
            if now - self._since > patience.linger_s:
                transport.abort()
        elif self._in_header:
            if now - self._since > patience.header_s:
                self._refuse(RequestTimeout(f"no complete header within {patience.header_s:g} s"))
        elif self._parsing is not None:
            if self._parsing.wanted and self._is_slow_body(self._parsing, now):
                self._refuse(RequestTimeout("the body comes too slowly"))
        elif self._answering is None and now - self._since > patience.keep_alive_s:
            transport.close()

    def _is_slow_body(self, exchange: Exchange, now: float) -> bool:
        patience = self._listener.patience
        elapsed = now - self._since
        if elapsed <= patience.transfer_grace_s:
            return False
        received = exchange.received_bytes + (self._filled if self._segment is not None else 0)
        if received - self._body_mark < elapsed * patience.transfer_rate_min:
            return True
        self._since, self._body_mark = now, received
        return False

    def _is_stalled(self, transport: asyncio.Transport, now: float) -> bool:
        """Whether the peer takes an answer more slowly than it must."""
        patience = self._listener.patience
        taken = self._written_bytes - transport.get_write_buffer_size()
        if taken == self._written_bytes:
            self._write_since = None
            return False
        if self._write_since is None:
            self._write_since, self._write_mark = now, taken
            return False
        elapsed = now - self._write_since
        if elapsed <= patience.transfer_grace_s:
            return False
        if taken - self._write_mark < elapsed * patience.transfer_rate_min:
            return True
        self._write_since, self._write_mark = now, taken
        return False


def _header_too_large() -> HeaderTooLarge:
    return HeaderTooLarge(f"request line and header are over {HEADER_BYTES_MAX} bytes")
