"""Answers that cost little to make: headers ready, bodies of any buffer type, many pieces.

Used by all routes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.errors import encode, render
from api.http_exchange import EXCHANGE
from protocol.errors import HaversackError
from protocol.hashing import Buffer

RawHeaders = list[tuple[bytes, bytes]]

JSON: Final = (b"content-type", b"application/json")
NO_STORE: Final = (b"cache-control", b"no-store")
NOSNIFF: Final = (b"x-content-type-options", b"nosniff")


class Answer(Response):
    """A complete answer from its parts.  `pieces` are sent one after the other, not joined."""

    def __init__(
        self,
        status: int,
        headers: Sequence[tuple[bytes, bytes]],
        pieces: Sequence[Buffer] = (),
        length: int | None = None,
    ) -> None:
        """`length` is that of an answer to HEAD, whose pieces are left out."""
        self.status_code = status
        self.background = None
        self.pieces = pieces
        self.length = sum(map(len, pieces)) if length is None else length
        self.raw_headers: RawHeaders = [*headers, (b"content-length", b"%d" % self.length)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = scope.get(EXCHANGE)
        if exchange is not None:
            await exchange.respond(self.status_code, self.raw_headers, self.pieces)
            return
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        last = len(self.pieces) - 1
        for index in range(last):
            await send(
                {"type": "http.response.body", "body": self.pieces[index], "more_body": True}
            )
        await send({"type": "http.response.body", "body": self.pieces[last] if last >= 0 else b""})


def json_answer(value: object, status: int = 200) -> Answer:
    """A JSON body.  Never cached: it speaks for one caller at one moment."""
    return json_bytes(encode(value), status)


def json_bytes(body: bytes, status: int = 200) -> Answer:
    """A JSON body that is encoded already."""
    return Answer(status, (JSON, NO_STORE, NOSNIFF), (body,))


def error_answer(error: HaversackError) -> Answer:
    """What the table of `api.errors` says."""
    status, headers, body = render(error)
    return Answer(status, (JSON, NO_STORE, NOSNIFF, *headers), (body,))
