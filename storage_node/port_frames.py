"""Bytes of a connection to frames and back: what both ends of the data port share.

Step "receive" of every request on a node and of every answer at a gateway.  The body of a large
frame is received straight into a buffer of its own; everything short goes through one scratch
buffer, several frames at a time.  Bytes that are not a frame, or one larger than this connection
is allowed, end the connection.  Transports are asyncio's or uvloop's.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Sequence
from typing import Final, TypeVar, cast

import msgspec

from protocol.buffers import buffer_to_fill
from protocol.errors import FormatUnsupported
from protocol.frames import (
    HEADER_BYTES,
    FrameHeader,
    MalformedFrame,
    Op,
    Status,
    pack_header,
    unpack_header,
    verify_meta,
)
from protocol.hashing import Buffer
from protocol.limits import FRAME_BODY_BYTES_MAX, FRAME_META_BYTES_MAX, KIB, MIB
from protocol.messages import Message

SCRATCH_BYTES: Final = 64 * KIB
"""What one read may bring in: many small frames at once."""

GREETING_META_BYTES_MAX: Final = 1 * KIB
"""HELLO, PROVE and their answers fit; nothing larger is read before the handshake is done."""

WRITE_BUFFER_BYTES: Final = 4 * MIB
"""Unsent bytes above which a connection takes no more work."""

_NO_BODY = memoryview(b"")
_ENCODER = msgspec.msgpack.Encoder(enc_hook=str)  # ids travel as the text they print
_M = TypeVar("_M", bound=Message)


class FrameProtocol(asyncio.BufferedProtocol):
    """One connection, seen as frames.  Subclasses handle them in `frame_received`."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.closed = False
        self.writable = asyncio.Event()
        self.writable.set()
        self._meta_bytes_max = GREETING_META_BYTES_MAX
        self._body_bytes_max = 0
        self._scratch = bytearray(SCRATCH_BYTES)
        self._scratch_view = memoryview(self._scratch)
        self._start = 0  # of the bytes in scratch that were not consumed
        self._end = 0
        self._header: FrameHeader | None = None
        self._header_bytes = b""
        self._meta = bytearray()
        self._meta_end = 0
        self._body = _NO_BODY
        self._body_end = 0
        self._held = False

    # -- for subclasses --------------------------------------------------------------------

    @abstractmethod
    def frame_received(self, header: FrameHeader, meta: bytearray, body: memoryview) -> None:
        """A whole frame whose header and meta match their checksum.

        May raise `MalformedFrame` or `FormatUnsupported`, which end the connection.
        """

    def body_announced(self, size: int) -> bool:
        """May a body of `size` bytes be received now?  False holds the connection until
        `resume_receiving`."""
        return True

    def connection_ended(self, error: Exception | None) -> None:
        """The connection is gone; called once."""

    def trust(self) -> None:
        """The other end proved itself: full-size frames from now on."""
        self._meta_bytes_max = FRAME_META_BYTES_MAX
        self._body_bytes_max = FRAME_BODY_BYTES_MAX

    def send(
        self,
        op: Op,
        status: Status,
        request_id: int,
        message: Message,
        body: Sequence[Buffer] = (),
    ) -> None:
        """Queue one frame; its body is not joined and not copied here."""
        if self.transport is None or self.closed:
            return
        meta = _ENCODER.encode(message)
        size = sum(map(len, body))
        head = pack_header(op, status, request_id, meta, size) + meta
        if body:
            self.transport.writelines([head, *body])
        else:
            self.transport.write(head)

    def fail(self, error: Exception) -> None:
        """End the connection because of what the other end sent."""
        if not self.closed:
            self.closed = True
            self.failure = error
            if self.transport is not None:
                self.transport.abort()

    failure: Exception | None = None
    """Why this end closed the connection."""

    # -- transport callbacks ---------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass of it
        self.transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self.writable.set()
        self._body = _NO_BODY
        self.connection_ended(self.failure or exc)

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._body_end < len(self._body):
            return self._body[self._body_end :]
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end == SCRATCH_BYTES:
            rest = self._end - self._start
            self._scratch[:rest] = self._scratch[self._start : self._end]
            self._start, self._end = 0, rest
        return self._scratch_view[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        if self.closed:
            return
        try:
            if self._body_end < len(self._body):
                self._body_end += nbytes
                if self._body_end < len(self._body):
                    return
                self._deliver()
            else:
                self._end += nbytes
            self._consume()
        except (MalformedFrame, FormatUnsupported) as error:
            self.fail(error)

    # -- receiving -------------------------------------------------------------------------

    def resume_receiving(self) -> None:
        """Go on after `body_announced` answered False."""
        if self.closed or not self._held:
            return
        self._held = False
        try:
            self._consume()
        except (MalformedFrame, FormatUnsupported) as error:
            self.fail(error)

    @property
    def held(self) -> bool:
        """Waiting for room before the body of a frame is received."""
        return self._held

    def _consume(self) -> None:
        """Take what scratch holds: headers, metas, short bodies and heads of long ones."""
        while not self.closed and not self._held:
            if self._header is None and not self._take_header():
                return
            if self._meta_end < len(self._meta) and not self._take_meta():
                return
            if not self._take_body():
                return

    def _take_header(self) -> bool:
        if self._end - self._start < HEADER_BYTES:
            return False
        self._header_bytes = bytes(self._scratch_view[self._start : self._start + HEADER_BYTES])
        header = unpack_header(self._header_bytes)
        if header.meta_length > self._meta_bytes_max or header.body_length > self._body_bytes_max:
            raise MalformedFrame(
                f"a frame of {header.meta_length} + {header.body_length} bytes is not allowed yet"
            )
        self._start += HEADER_BYTES
        self._header = header
        self._meta = bytearray(header.meta_length)
        self._meta_end = 0
        return True

    def _take_meta(self) -> bool:
        wanted = len(self._meta) - self._meta_end
        got = min(wanted, self._end - self._start)
        self._meta[self._meta_end : self._meta_end + got] = self._scratch_view[
            self._start : self._start + got
        ]
        self._start += got
        self._meta_end += got
        return got == wanted

    def _take_body(self) -> bool:
        """Check the frame so far; deliver it if scratch holds all of its body, else start one."""
        assert self._header is not None
        size = self._header.body_length
        verify_meta(self._header_bytes, self._header, self._meta)
        if size:
            if not self.body_announced(size):
                self._held = True
                return False
            self._body = memoryview(buffer_to_fill(size))
            got = min(size, self._end - self._start)
            self._body[:got] = self._scratch_view[self._start : self._start + got]
            self._start += got
            self._body_end = got
            if got < size:
                return False  # the rest is received in place, then `buffer_updated` delivers
        self._deliver()
        return True

    def _deliver(self) -> None:
        header, meta, body = self._header, self._meta, self._body
        assert header is not None
        self._header, self._meta, self._body = None, bytearray(), _NO_BODY
        self._meta_end = self._body_end = 0
        self.frame_received(header, meta, body)


def decode(kind: type[_M], meta: Buffer) -> _M:
    """Read a frame's meta.  Raises `MalformedFrame` for anything that is not a `kind`."""
    try:
        return msgspec.msgpack.decode(meta, type=kind)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise MalformedFrame(f"meta is not a {kind.__name__}: {error}") from error
