"""Bodies that carry many items: cut, framed, read back, and repeated item by item.

Used by `client.api` only.  May import `protocol`, `client.entries`, `client.replies`,
`client.retry`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, TypeVar

from client.entries import Entry, parse_entry
from client.replies import error_of_json, json_list
from client.retry import Backoff
from protocol import block_frames
from protocol.block_frames import FrameStatus
from protocol.errors import CorruptReply, HaversackError, RetryLater, UnknownOutcome
from protocol.hashing import Buffer, hash_block
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


def batch_results(answer: dict[str, Any], length: int) -> list[bool | HaversackError]:
    """Per block of a batch: created, existed, or its error.  Raises `CorruptReply`."""
    words = json_list(answer, "results", length, "a batch of blocks")
    errors: dict[int, HaversackError] = {}
    try:
        for item in answer.get("errors") or ():
            errors[int(item["index"])] = error_of_json(item["error"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptReply(f"the errors of a batch of blocks cannot be read: {error}") from error
    results: list[bool | HaversackError] = []
    for index, word in enumerate(words):
        if word in ("created", "exists"):
            results.append(word == "created")
        else:
            results.append(errors.get(index) or HaversackError(f"block refused: {word!r}"))
    return results


def entry_or_error(result: Any) -> Entry | HaversackError:
    """One result of a batch of commits.  Raises `CorruptReply`."""
    if isinstance(result, dict) and result.get("entry") is not None:
        return parse_entry(result["entry"])
    try:
        return error_of_json(result["error"])
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptReply(f"a result of a batch of commits cannot be read: {error}") from error


def verified_frames(
    body: bytes,
) -> list[tuple[BlockHash, FrameStatus, memoryview | None]]:
    """Frames of an answer; None for a block whose bytes do not hash to its name.

    Runs in a thread.  Raises `CorruptReply` for a body that is not framed.
    """
    frames: list[tuple[BlockHash, FrameStatus, memoryview | None]] = []
    try:
        for block, status, data in block_frames.iter_frames(body):
            good = status is FrameStatus.OK and hash_block(data) == block
            frames.append((block, status, data if good else None))
    except HaversackError as error:
        raise CorruptReply(f"the answer to a fetch is not framed: {error}") from error
    return frames


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
