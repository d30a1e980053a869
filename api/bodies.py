"""Reading request bodies: bounded, counted, hashed off the event loop.

Step 3 of a put ("the gateway streams the body, hashes it, refuses a mismatch"), and the first step
of every route with a JSON body.  A body that is too large is refused from its Content-Length,
before any of it is read; one without a length is counted as it comes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeAlias, TypeVar

from pydantic import BaseModel, ValidationError

from api.call import Call, PeerGone
from protocol.errors import BodyTooLarge, HaversackError, InvalidRequest, LengthRequired
from protocol.hashing import Buffer, hash_parts
from protocol.ids import BlockHash
from protocol.limits import JSON_BODY_BYTES_MAX, KIB

Model = TypeVar("Model", bound=BaseModel)
Run: TypeAlias = Callable[..., Awaitable[Any]]
"""`await run(function, *args)`: calls a function that computes for long, off the event loop."""

HASH_IN_LOOP_BYTES: Final = 64 * KIB
"""Below this, hashing takes less time than handing the work to a thread (some 40 us)."""

SMALL_BODY_BYTES: Final = 64 * KIB
"""A body up to this that came with its header is in memory whatever we decide."""

SHOWN_PROBLEMS_MAX: Final = 8


def declared_length(call: Call) -> int | None:
    """Content-Length, or None for a body without one.  The HTTP parser has checked its digits."""
    value = call.field(b"content-length")
    if value is not None:
        return int(value)
    return None if call.field(b"transfer-encoding") is not None else 0


def required_length(call: Call) -> int:
    """Content-Length.  Raises `LengthRequired`."""
    length = declared_length(call)
    if length is None or (length == 0 and call.field(b"content-length") is None):
        raise LengthRequired("send a Content-Length: this body is not taken in chunks")
    return length


async def read_body(
    call: Call, limit: int, too_large: Callable[[str], HaversackError] = BodyTooLarge
) -> list[Buffer]:
    """The whole body in the pieces it came in, at most `limit` bytes.

    Takes a share of the memory for uploads first, unless the body is small and here already.
    Raises `too_large` (before reading, if the length is declared), `PeerGone`, and `Overloaded` if
    the body took its time and everybody is busy when it is complete.
    """
    declared = declared_length(call)
    if declared is not None and declared > limit:
        raise too_large(f"the body has {declared} bytes; at most {limit} are taken here")
    if call.body_is_here and declared is not None and declared <= SMALL_BODY_BYTES:
        return await _receive_all(call, limit, too_large)
    await call.hold(call.uploads, limit if declared is None else declared)
    async with call.off_turn():
        return await _receive_all(call, limit, too_large)


async def _receive_all(
    call: Call, limit: int, too_large: Callable[[str], HaversackError]
) -> list[Buffer]:
    pieces: list[Buffer] = []
    total = 0
    more = True
    while more:
        message = await call.receive()
        if message["type"] == "http.disconnect":
            raise PeerGone
        piece: Buffer = message.get("body", b"")
        if piece:
            total += len(piece)
            if total > limit:
                raise too_large(f"the body has over {limit} bytes, which is most taken here")
            pieces.append(piece)
        more = message.get("more_body", False)
    return pieces


async def hash_body(parts: Sequence[Buffer], length: int, run: Run) -> BlockHash:
    """SHA-256 over all parts, in a thread unless they are short."""
    if length <= HASH_IN_LOOP_BYTES:
        return hash_parts(parts)
    digest: BlockHash = await run(hash_parts, parts)
    return digest


async def read_json_body(call: Call, model: type[Model]) -> Model:
    """A JSON body as `model`.  Raises `InvalidRequest`, `BodyTooLarge`, `PeerGone`.

    Parsed here and now: the parser keeps the interpreter's lock, so a thread would only add its
    own cost (measured: 8 MB, the limit, hold up the loop for 40 ms either way).
    """
    pieces = await read_body(call, JSON_BODY_BYTES_MAX)
    text = bytes(pieces[0]) if len(pieces) == 1 else b"".join(pieces)
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        raise invalid(error) from error


def invalid(error: ValidationError) -> InvalidRequest:
    """What is wrong with a body or a query, without repeating it."""
    problems = [
        {"where": ".".join(map(str, problem["loc"])), "what": problem["msg"]}
        for problem in error.errors(include_url=False, include_context=False, include_input=False)
    ]
    first = problems[0]
    where = f"{first['where']}: " if first["where"] else ""
    return InvalidRequest(
        f"the request does not fit: {where}{first['what']}",
        {"problems": problems[:SHOWN_PROBLEMS_MAX], "count": len(problems)},
    )
