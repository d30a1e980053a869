"""`/v1/blocks/batch` and `/v1/blocks/fetch`: many small blocks in one framed body.

Life of a batch: read the body whole (bounded), walk its frames and hash each in one go off the
event loop, hand those that are what they claim to `BlockClient.put_many`, answer with one result
per frame.  Life of a fetch: authority for all hashes in two queries, choose as many as one answer
may carry, `BlockClient.get_many`, send frames.  Layout of a frame: `protocol/block_frames.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Final, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from api.answers import NO_STORE, NOSNIFF, Answer, json_answer
from api.authority import Authority
from api.bodies import Run, read_body
from api.call import Call
from api.errors import error_body
from api.hash_lists import parse_hashes
from api.metrics import BlockMetrics
from api.openapi import FRAMES, ErrorDetail, binary, binary_body
from api.routing import Route
from api.watcher import WatchSample
from cluster.block_client import BlockClient
from protocol.block_frames import (
    FRAME_HEADER_BYTES,
    MEDIA_TYPE,
    FrameStatus,
    iter_frames,
    pack_frame_header,
)
from protocol.errors import BlockNotFound, HashMismatch, HaversackError, InvalidRequest
from protocol.hashing import Buffer
from protocol.ids import BlockHash
from protocol.limits import BATCH_BLOCKS_MAX, BATCH_BODY_BYTES_MAX, BLOCK_BYTES_MAX, KIB

JOIN_BYTES_MAX: Final = 16 * KIB
"""Blocks up to this are copied into shared pieces of an answer; larger ones go as they are."""

PIECE_BYTES: Final = 256 * KIB


class BatchProblem(BaseModel):
    """One block of a batch that was not stored."""

    index: int
    hash: str
    error: ErrorDetail


class BatchAnswer(BaseModel):
    """One result per frame, in order."""

    results: list[Literal["created", "exists", "error"]]
    errors: list[BatchProblem]


class FetchBody(BaseModel):
    """Blocks to read."""

    model_config = ConfigDict(extra="forbid", strict=True)

    hashes: list[str] = Field(max_length=BATCH_BLOCKS_MAX)


class Received(NamedTuple):
    """One frame of an upload; `error` if its data is not what its name says."""

    block: BlockHash
    data: Buffer
    error: HaversackError | None


class BatchRoutes:
    """Endpoints of many blocks at once."""

    def __init__(
        self,
        blocks: BlockClient,
        authority: Authority,
        metrics: BlockMetrics,
        run: Run,
        sample: WatchSample,
    ) -> None:
        self._blocks = blocks
        self._sample = sample
        self._authority = authority
        self._metrics = metrics
        self._run = run

    def routes(self) -> list[Route]:
        """What this class serves."""
        return [
            Route(
                "POST",
                "/v1/blocks/batch",
                self.put_batch,
                responses={200: {"model": BatchAnswer, "description": "One result per frame."}},
                problems=(
                    "invalid_request",
                    "body_too_large",
                    "block_too_large",
                    "unknown_outcome",
                ),
                openapi_extra=binary_body("Frames of blocks, one after the other.", FRAMES),
            ),
            Route(
                "POST",
                "/v1/blocks/fetch",
                self.fetch_blocks,
                responses={200: binary("One frame per distinct hash, in order.", FRAMES)},
                problems=("invalid_request", "malformed_hash", "body_too_large"),
            ),
        ]

    async def put_batch(self, call: Call) -> Answer:
        """Store many blocks; each succeeds or fails on its own."""
        pieces = await read_body(call, BATCH_BODY_BYTES_MAX)
        received: list[Received] = await self._run(verify_frames, pieces)
        good = [(item.block, item.data) for item in received if item.error is None]
        stored = iter(await self._blocks.put_many(call.account.id, good) if good else ())
        results: list[str] = []
        errors: list[dict[str, Any]] = []
        for index, item in enumerate(received):
            outcome = next(stored) if item.error is None else item.error
            self._metrics.put(outcome, len(item.data))
            if not isinstance(outcome, HaversackError) and outcome.new:
                self._sample.notice(item.block)
            if isinstance(outcome, HaversackError):
                results.append("error")
                errors.append(
                    {"index": index, "hash": item.block.hex(), "error": error_body(outcome)}
                )
            else:
                results.append("created" if outcome.new else "exists")
        return json_answer({"results": results, "errors": errors})

    async def fetch_blocks(self, call: Call, body: FetchBody) -> Answer:
        """Read many blocks that the caller references or has claims to."""
        hashes = list(dict.fromkeys(parse_hashes(body.hashes)))
        known = await self._authority.among(call.account, hashes)
        lengths = await self._blocks.lengths([block for block in hashes if block in known])
        chosen, total = choose(hashes, lengths)
        await call.hold(call.downloads, total)
        data = await self._blocks.get_many(chosen) if chosen else []
        found = dict(zip(chosen, data, strict=True))
        got = [block for block in data if not isinstance(block, HaversackError)]
        self._metrics.got(sum(map(len, got)), len(got))
        headers = ((b"content-type", MEDIA_TYPE.encode("ascii")), NO_STORE, NOSNIFF)
        return Answer(200, headers, frame_pieces(hashes, lengths, found))


def verify_frames(pieces: Sequence[Buffer]) -> list[Received]:
    """Walk a framed body and hash every block: runs off the event loop.

    Raises `InvalidRequest` or `BlockTooLarge` for a body that is not well formed.
    """
    body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    received = []
    for index, frame in enumerate(iter_frames(body)):
        if frame.status is not FrameStatus.OK:
            raise InvalidRequest(f"frame {index} of an upload has status {frame.status.name}")
        digest = hashlib.sha256(frame.data).digest()
        error = None
        if digest != frame.block:
            error = HashMismatch(
                f"frame {index} hashes to {digest.hex()}, not to its name {frame.block}",
                {"hash": str(frame.block), "actual": digest.hex()},
            )
        received.append(Received(frame.block, frame.data, error))
    return received


def choose(
    hashes: Sequence[BlockHash], lengths: dict[BlockHash, int]
) -> tuple[list[BlockHash], int]:
    """As many blocks, in order, as one answer may carry, and the bytes of that answer."""
    total = FRAME_HEADER_BYTES * len(hashes)
    chosen = []
    for block in hashes:
        length = lengths.get(block)
        if length is not None and total + length <= BATCH_BODY_BYTES_MAX:
            chosen.append(block)
            total += length
    return chosen, total


def frame_pieces(
    hashes: Sequence[BlockHash],
    lengths: dict[BlockHash, int],
    found: dict[BlockHash, Buffer | HaversackError],
) -> list[Buffer]:
    """Frames of an answer: small ones joined into pieces, the data of large ones left alone."""
    pieces: list[Buffer] = []
    small = bytearray()
    for block in hashes:
        data = found.get(block)
        if isinstance(data, HaversackError):
            missing = isinstance(data, BlockNotFound)
            status = FrameStatus.NOT_FOUND if missing else FrameStatus.UNAVAILABLE
            small += pack_frame_header(block, status, 0)
        elif data is None:
            status = FrameStatus.NOT_SENT if block in lengths else FrameStatus.NOT_FOUND
            small += pack_frame_header(block, status, 0)
        else:
            small += pack_frame_header(block, FrameStatus.OK, len(data))
            if len(data) <= JOIN_BYTES_MAX:
                small += data
            else:
                pieces += (bytes(small), data)
                small = bytearray()
        if len(small) >= PIECE_BYTES:
            pieces.append(bytes(small))
            small = bytearray()
    if small:
        pieces.append(bytes(small))
    return pieces


assert FRAME_HEADER_BYTES * BATCH_BLOCKS_MAX + BLOCK_BYTES_MAX <= BATCH_BODY_BYTES_MAX, (
    "one answer always carries at least one block"
)
