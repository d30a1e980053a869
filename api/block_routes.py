"""`/v1/blocks/{hash}`: put, get, head; and `/v1/blocks/check`.

Life of a put over HTTP:

    1. refuse a length that is absent or too large, before the body
    2. take a share of the memory for bodies, read
    3. hash off the event loop, refuse a mismatch
    4. `BlockClient.put`; 201 if the block was new, else 200

Life of a get, over HTTP:

    1. may the caller know of the block?  If not, it is not there
    2. its length; `If-None-Match`: 304
    3. take a share of the memory for answers
    4. `BlockClient.get`, whole, for a range too
    5. 200, 206 or 416

May not import a node port, a codec or SQL.
"""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field

from api.answers import NOSNIFF, Answer, json_answer, json_bytes
from api.authority import Authority
from api.bodies import Run, hash_body, read_body, required_length
from api.call import Call
from api.hash_lists import parse_hashes
from api.metrics import BlockMetrics
from api.openapi import HASH_PARAMETER, binary, binary_body, header
from api.ranges import cut_pieces, etag_of, matches_none, parse_range, range_applies
from api.routing import Route
from api.watcher import WatchSample
from cluster.block_client import BlockClient
from cluster.block_index import BlockIndex
from protocol.errors import BlockNotFound, BlockTooLarge, HashMismatch, HaversackError
from protocol.ids import BlockHash
from protocol.limits import BATCH_BLOCKS_MAX, BLOCK_BYTES_MAX

_BLOCK: Final = (
    (b"content-type", b"application/octet-stream"),
    # Private: a shared cache may not hand a block to whoever knows its hash.
    (b"cache-control", b"private, max-age=31536000, immutable"),
    (b"accept-ranges", b"bytes"),
    NOSNIFF,
)


class StoredBlock(BaseModel):
    """Answer to a put."""

    hash: str
    new: bool
    """False if the store had the block already."""
    length: int


class CheckBody(BaseModel):
    """Blocks that a caller wants to commit."""

    model_config = ConfigDict(extra="forbid", strict=True)

    hashes: list[str] = Field(max_length=BATCH_BLOCKS_MAX)


class CheckAnswer(BaseModel):
    """Blocks that must be uploaded; the others are claimed for the caller now."""

    missing: list[str]


class BlockRoutes:
    """Endpoints of single blocks."""

    def __init__(
        self,
        blocks: BlockClient,
        index: BlockIndex,
        authority: Authority,
        metrics: BlockMetrics,
        run: Run,
        sample: WatchSample,
    ) -> None:
        self._blocks = blocks
        self._sample = sample
        self._index = index
        self._authority = authority
        self._metrics = metrics
        self._run = run

    def routes(self) -> list[Route]:
        """What this class serves."""
        path = "/v1/blocks/{hash}"
        conditional = header("If-None-Match", "Answered 304 if it names this block.")
        ranged = header("Range", "One range of bytes; several are answered by the whole.")
        return [
            Route(
                "PUT",
                path,
                self.put_block,
                responses={
                    201: {"model": StoredBlock, "description": "Stored, durably."},
                    200: {"model": StoredBlock, "description": "The store had it already."},
                },
                problems=(
                    "hash_mismatch",
                    "malformed_hash",
                    "length_required",
                    "block_too_large",
                    "not_enough_nodes",
                    "unknown_outcome",
                ),
                openapi_extra={
                    **binary_body(f"The block: at most {BLOCK_BYTES_MAX} bytes."),
                    "parameters": [HASH_PARAMETER],
                },
            ),
            Route(
                "GET",
                path,
                self.get_block,
                responses={
                    200: binary("The block."),
                    206: binary("The range that was asked for."),
                    304: {"description": "The caller holds it."},
                },
                problems=(
                    "malformed_hash",
                    "block_not_found",
                    "range_not_satisfiable",
                    "block_unreadable",
                ),
                openapi_extra={"parameters": [HASH_PARAMETER, ranged, conditional]},
                reads_block=True,
            ),
            Route(
                "HEAD",
                path,
                self.head_block,
                responses={
                    200: {"description": "Content-Length is the block's."},
                    304: {"description": "The caller holds it."},
                },
                problems=("malformed_hash", "block_not_found"),
                openapi_extra={"parameters": [HASH_PARAMETER, conditional]},
            ),
            Route(
                "POST",
                "/v1/blocks/check",
                self.check_blocks,
                responses={200: {"model": CheckAnswer, "description": "What is missing."}},
                problems=("invalid_request", "malformed_hash", "body_too_large"),
            ),
        ]

    async def put_block(self, call: Call) -> Answer:
        """Store one block under its SHA-256."""
        block = BlockHash.parse(call.argument)
        length = required_length(call)
        if length > BLOCK_BYTES_MAX:
            raise _too_large(f"this one has {length} bytes")
        parts = await read_body(call, BLOCK_BYTES_MAX, _too_large)
        digest = await hash_body(parts, length, self._run)
        if digest != block:
            raise HashMismatch(
                f"the body hashes to {digest}, not to its name {block}: nothing was stored",
                {"hash": str(block), "actual": str(digest)},
            )
        try:
            result = await self._blocks.put(call.account.id, block, parts, length)
        except HaversackError as error:
            self._metrics.put(error, length)
            raise
        self._metrics.put(result, length)
        if result.new:
            self._sample.notice(block)
        new = b"true" if result.new else b"false"
        body = b'{"hash":"%b","new":%b,"length":%d}' % (call.argument.encode(), new, length)
        return json_bytes(body, 201 if result.new else 200)

    async def get_block(self, call: Call) -> Answer:
        """Read one block that the caller references or has a claim to."""
        block = await self._known(call)
        etag = etag_of(call.argument)
        headers = (*_BLOCK, (b"etag", etag))
        length = await self._length(block)
        if matches_none(call.field(b"if-none-match"), etag):
            return _not_modified(etag)
        await call.hold(call.downloads, length)
        pieces = await self._blocks.get_pieces(block)
        self._metrics.got(length)
        wanted = None
        if range_applies(call.field(b"if-range"), etag):
            wanted = parse_range(call.field(b"range"), length)
        if wanted is None:
            return Answer(200, headers, pieces)
        start, end = wanted
        content_range = b"bytes %d-%d/%d" % (start, end - 1, length)
        return Answer(
            206, (*headers, (b"content-range", content_range)), cut_pieces(pieces, start, end)
        )

    async def head_block(self, call: Call) -> Answer:
        """Length of one block, without reading it."""
        block = await self._known(call)
        etag = etag_of(call.argument)
        length = await self._length(block)
        if matches_none(call.field(b"if-none-match"), etag):
            return _not_modified(etag)
        return Answer(200, (*_BLOCK, (b"etag", etag)), length=length)

    async def check_blocks(self, call: Call, body: CheckBody) -> Answer:
        """Say which blocks must be uploaded before they can be committed."""
        hashes = list(dict.fromkeys(parse_hashes(body.hashes)))
        known = await self._authority.among(call.account, hashes)
        wanted = [block for block in hashes if block in known]
        held = await self._index.claim(call.account.id, wanted) if wanted else set()
        return json_answer({"missing": [block.hex() for block in hashes if block not in held]})

    async def _known(self, call: Call) -> BlockHash:
        """The block of the path, if the caller may know of it; else it is not there."""
        block = BlockHash.parse(call.argument)
        if not await self._authority.covers(call.account, block):
            raise BlockNotFound(block)
        return block

    async def _length(self, block: BlockHash) -> int:
        length = (await self._blocks.lengths((block,))).get(block)
        if length is None:
            raise BlockNotFound(block)
        return length


def _not_modified(etag: bytes) -> Answer:
    answer = Answer(304, (_BLOCK[1], (b"etag", etag)))
    answer.raw_headers.pop()  # a 304 has no length of its own
    return answer


def _too_large(message: str) -> BlockTooLarge:
    limits: dict[str, Any] = {"bytes_max": BLOCK_BYTES_MAX}
    return BlockTooLarge(f"a block has at most {BLOCK_BYTES_MAX} bytes; {message}", limits)
