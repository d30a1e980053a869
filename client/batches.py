"""Bodies that carry many items: cut, framed, and repeated item by item.

Used by `client.api` only.  May import `protocol`, `client.entries`, `client.replies`,
`client.retry`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeVar

from client.retry import Backoff
from protocol import block_frames
from protocol.block_frames import FrameStatus
from protocol.errors import HaversackError, RetryLater, UnknownOutcome
from protocol.hashing import Buffer
from protocol.ids import BlockHash
from protocol.limits import BATCH_BLOCKS_MAX, BATCH_BODY_BYTES_MAX

Item = TypeVar("Item")
Result = TypeVar("Result")


def bodies(
    blocks: Sequence[tuple[BlockHash, Buffer]],
) -> Iterable[Sequence[tuple[BlockHash, Buffer]]]:
    """Cut into runs that fit one framed body."""
    start, length = 0, 0
    for position, (_, data) in enumerate(blocks):
        frame = block_frames.FRAME_HEADER_BYTES + len(data)
        full = length + frame > BATCH_BODY_BYTES_MAX or position - start >= BATCH_BLOCKS_MAX
        if full and position > start:
            yield blocks[start:position]
            start, length = position, 0
        length += frame
    if start < len(blocks):
        yield blocks[start:]


def framed(blocks: Sequence[tuple[BlockHash, Buffer]]) -> bytes:
    """The framed body of some blocks; one copy, so that the socket sees few large writes."""
    pieces: list[Buffer] = []
    for block, data in blocks:
        pieces.append(block_frames.pack_frame_header(block, FrameStatus.OK, len(data)))
        pieces.append(data)
    return b"".join(pieces)


async def until_settled(
    items: Sequence[Item],
    send: Callable[[Sequence[Item]], Awaitable[list[Result | HaversackError]]],
    backoff: Backoff,
) -> list[Result | HaversackError]:
    """Send a batch, then again what was refused for a reason that may pass, until nothing is.

    `send` returns one result per item, a `HaversackError` for one that failed.
    """
    results: dict[int, Result | HaversackError] = {}
    waiting = list(range(len(items)))
    while True:
        answers = await send([items[index] for index in waiting])
        for index, answer in zip(waiting, answers, strict=True):
            results[index] = answer
        refused = [
            (index, answer)
            for index, answer in zip(waiting, answers, strict=True)
            if isinstance(answer, RetryLater | UnknownOutcome)
        ]
        waiting = [index for index, _ in refused]
        if not refused:
            break
        try:
            await backoff.pause(refused[0][1])
        except HaversackError:
            break  # no attempt is left: the errors stand as results
    return [results[index] for index in range(len(items))]


async def or_error(awaitable: Awaitable[Result]) -> Result | HaversackError:
    """The result, or the error of ours that was raised."""
    try:
        return await awaitable
    except HaversackError as error:
        return error
