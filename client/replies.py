"""Read successful answers.  Every function raises `CorruptReply` for one that the API cannot give.

Used by `client.api` (as the `read` of a call) only.  May import `protocol`, `client.entries` and
`client.failures`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from client.entries import Entry, parse_entry
from client.failures import error_of_json
from protocol import block_frames
from protocol.block_frames import FrameStatus
from protocol.errors import CorruptReply, HaversackError, MalformedHash
from protocol.hashing import hash_block
from protocol.ids import BlockHash


@dataclass(frozen=True, slots=True)
class Reply:
    """A successful answer, complete."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Committed:
    """Answer to one commit; `created` is False where identical content stood there already."""

    entry: Entry
    created: bool


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a listing; `cursor` is None on the last."""

    entries: tuple[Entry, ...]
    cursor: str | None


def json_object(reply: Reply, what: str) -> dict[str, Any]:
    """The JSON object in a successful answer.  Raises `CorruptReply` for anything else."""
    try:
        value = orjson.loads(reply.body)
    except orjson.JSONDecodeError as error:
        raise CorruptReply(
            f"the answer to {what} is not JSON: is --server a Haversack cell?"
        ) from error
    if not isinstance(value, dict):
        raise CorruptReply(f"the answer to {what} is not a JSON object")
    return value


def _list(answer: Mapping[str, Any], field: str, length: int | None, what: str) -> list[Any]:
    """A list inside an answer, of a given length unless None.  Raises `CorruptReply`."""
    value = answer.get(field)
    if not isinstance(value, list):
        raise CorruptReply(f"the answer to {what} has no list {field!r}")
    if length is not None and len(value) != length:
        raise CorruptReply(
            f"the answer to {what} has {len(value)} {field}, {length} were asked for"
        )
    return value


def missing_blocks(reply: Reply, asked: Sequence[BlockHash]) -> set[BlockHash]:
    """Which blocks a check found missing."""
    answer = json_object(reply, "a check of blocks")
    texts = _list(answer, "missing", None, "a check of blocks")
    try:
        named = {BlockHash.parse(text) for text in texts}
    except (MalformedHash, TypeError) as error:
        raise CorruptReply("the answer to a check names something that is no block") from error
    if not named <= set(asked):
        raise CorruptReply("the answer to a check names blocks that were not asked about")
    return named


def entry_of(reply: Reply, what: str) -> Entry:
    """An entry, bare or as the field `entry`."""
    answer = json_object(reply, what)
    return parse_entry(answer.get("entry", answer))


def page_of(reply: Reply) -> Page:
    """One page of a listing."""
    answer = json_object(reply, "a listing")
    following = answer.get("cursor")
    return Page(
        tuple(parse_entry(entry) for entry in _list(answer, "entries", None, "a listing")),
        None if following is None else str(following),
    )


def deleted_count(reply: Reply) -> int:
    """How many entries a delete removed."""
    count = json_object(reply, "a delete").get("deleted")
    if not isinstance(count, int):
        raise CorruptReply("the answer to a delete does not say how much it deleted")
    return count


def commit_results(reply: Reply, length: int) -> list[Entry | HaversackError]:
    """Per entry of a batch of commits: the entry or its error."""
    answer = json_object(reply, "a batch of commits")
    results = _list(answer, "results", length, "a batch of commits")
    return [_entry_or_error(result) for result in results]


def _entry_or_error(result: Any) -> Entry | HaversackError:
    """One result of a batch of commits.  Raises `CorruptReply`."""
    if isinstance(result, dict) and result.get("entry") is not None:
        return parse_entry(result["entry"])
    try:
        return error_of_json(result["error"])
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptReply(f"a result of a batch of commits cannot be read: {error}") from error


def batch_results(reply: Reply, length: int) -> list[bool | HaversackError]:
    """Per block of a batch: created, existed, or its error.  Raises `CorruptReply`."""
    answer = json_object(reply, "a batch of blocks")
    words = _list(answer, "results", length, "a batch of blocks")
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
