"""`HaversackClient`: one method per route of the HTTP API.

Called by `client.upload`, `client.download`, `cli`, `chaos` and `bench`.  Every block received is
hashed, in a thread, before the caller sees it.  May import `protocol` and its own package.

    async with HaversackClient("http://127.0.0.1:8420", token) as client:
        await client.put_block(hash_block(data), data)
"""

from __future__ import annotations

import asyncio
import random
import urllib.parse
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

import orjson

from client.batches import bodies, framed, or_error, until_settled
from client.entries import Entry, NewEntry
from client.replies import (
    Committed,
    Page,
    batch_results,
    commit_results,
    deleted_count,
    entry_of,
    json_object,
    missing_blocks,
    page_of,
    verified_frames,
)
from client.retry import RetryPolicy
from client.transport import Call, LostReply, Transport, text_query
from protocol import block_frames
from protocol.block_frames import FrameStatus
from protocol.clock import Clock, SystemClock
from protocol.errors import (
    BlockNotFound,
    CorruptReply,
    EntryNotFound,
    HaversackError,
    InvalidRequest,
    UnknownOutcome,
)
from protocol.hashing import Buffer, hash_block
from protocol.ids import BlockHash
from protocol.limits import (
    BATCH_BLOCKS_MAX,
    BATCH_BODY_BYTES_MAX,
    BLOCK_BYTES_MAX,
    COMMIT_ENTRIES_MAX,
    JSON_BODY_BYTES_MAX,
    LISTING_PAGE_MAX,
)

T = TypeVar("T")

_THREADS = 4
"""For hashing, and for reading and writing local files: some of them wait for a disk."""
_CONNECTIONS = 32
_FETCH_ROUNDS_MAX = 64
_HASH_IN_LOOP_BYTES = 16 * 1024
"""Below this, hashing takes less time than handing the work to a thread."""


class HaversackClient:
    """Connections to one cell, in the name of one token.  An async context manager.

    Every method may raise the errors of `client.transport.Transport.call`.
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        policy: RetryPolicy | None = None,
        clock: Clock | None = None,
        rng: random.Random | None = None,
        executor: Executor | None = None,
        connections: int = _CONNECTIONS,
    ) -> None:
        self._transport = Transport(
            url,
            token,
            policy=policy or RetryPolicy(),
            clock=clock or SystemClock(),
            rng=rng or random.Random(),
            connections=connections,
        )
        self._given_executor = executor
        self._own_executor: ThreadPoolExecutor | None = None

    async def __aenter__(self) -> Self:
        self._transport.open()
        if self._given_executor is None:
            self._own_executor = ThreadPoolExecutor(_THREADS, "haversack-client")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections and the threads.  Idempotent."""
        await self._transport.close()
        if self._own_executor is not None:
            self._own_executor.shutdown(wait=False)

    async def run(self, work: Callable[[], T]) -> T:
        """Run blocking work in this client's threads."""
        executor = self._given_executor or self._own_executor
        assert executor is not None, "use the client inside `async with`"
        return await asyncio.get_running_loop().run_in_executor(executor, work)

    # ------------------------------------------------------------------ blocks

    async def check_blocks(self, blocks: Sequence[BlockHash]) -> set[BlockHash]:
        """Which of `blocks` must be uploaded.  The others are claimed for the caller."""
        missing: set[BlockHash] = set()
        for start in range(0, len(blocks), BATCH_BLOCKS_MAX):
            missing |= await self._check_some(blocks[start : start + BATCH_BLOCKS_MAX])
        return missing

    async def _check_some(self, some: Sequence[BlockHash]) -> set[BlockHash]:
        body = orjson.dumps({"hashes": [block.hex() for block in some]})
        return await self._transport.call(
            Call("POST", "/v1/blocks/check", body=[body]),
            lambda reply: missing_blocks(reply, some),
        )

    async def put_block(self, block: BlockHash, data: Buffer) -> bool:
        """Upload one block.  True if it was new to the store.

        `block` must be the hash of `data`: the server refuses anything else (`HashMismatch`).
        """
        return await self._transport.call(
            Call(
                "PUT",
                f"/v1/blocks/{block}",
                body=[data],
                media_type="application/octet-stream",
            ),
            lambda reply: bool(json_object(reply, "a block upload").get("new")),
        )

    async def get_block(self, block: BlockHash) -> bytes:
        """Download one block.  Raises `BlockNotFound`; retries an answer with wrong bytes, then
        raises `CorruptReply`."""
        backoff = self._transport.backoff()
        while True:
            data = await self._transport.call(
                Call("GET", f"/v1/blocks/{block}", answer_bytes_max=BLOCK_BYTES_MAX),
                lambda reply: reply.body,
            )
            if await self._hash(data) == block:
                return data
            await backoff.pause(
                CorruptReply(
                    f"the server sent {len(data)} bytes for block {block} that hash to "
                    "something else",
                    {"hash": str(block)},
                )
            )

    async def head_block(self, block: BlockHash) -> int | None:
        """Length of a block in bytes; None if there is none that the caller may read."""
        try:
            return await self._transport.call(
                Call("HEAD", f"/v1/blocks/{block}"),
                lambda reply: int(reply.headers.get("Content-Length", "0")),
            )
        except (BlockNotFound, EntryNotFound):  # an answer to HEAD has no body to tell the kind
            return None

    async def put_blocks(
        self, blocks: Sequence[tuple[BlockHash, Buffer]]
    ) -> list[bool | HaversackError]:
        """Upload small blocks in one framed body each 16 MiB or 4,096 blocks.

        Per block: True if it was new, False if it was there, or its error.  Blocks refused for a
        reason that may pass are sent again, alone.
        """
        results: list[bool | HaversackError] = []
        for some in bodies(blocks):
            results += await self._put_batch(some)
        return results

    async def _put_batch(
        self, blocks: Sequence[tuple[BlockHash, Buffer]]
    ) -> list[bool | HaversackError]:
        async def send(some: Sequence[tuple[BlockHash, Buffer]]) -> list[bool | HaversackError]:
            return await self._transport.call(
                Call(
                    "POST",
                    "/v1/blocks/batch",
                    body=[framed(some)],
                    media_type=block_frames.MEDIA_TYPE,
                ),
                lambda reply: batch_results(reply, len(some)),
            )

        return await until_settled(blocks, send, self._transport.backoff())

    async def fetch_blocks(self, blocks: Sequence[BlockHash]) -> list[Buffer | HaversackError]:
        """Download many blocks in framed answers: bytes or the error of each, in order.

        The bytes are views into the answers, which live as long as one of them is referenced.
        A block that the answer could not carry is asked for again, alone if need be.
        """
        found: dict[BlockHash, Buffer | HaversackError] = {}
        wanted = list(dict.fromkeys(blocks))
        rounds = 0
        while wanted:
            rounds += 1
            before = len(found)
            if rounds <= _FETCH_ROUNDS_MAX:
                await self._fetch_some(wanted[:BATCH_BLOCKS_MAX], found)
            if len(found) == before:  # no progress in a framed answer: one by one
                found[wanted[0]] = await or_error(self.get_block(wanted[0]))
            wanted = [block for block in wanted if block not in found]
        return [found[block] for block in blocks]

    async def _fetch_some(
        self, some: Sequence[BlockHash], found: dict[BlockHash, Buffer | HaversackError]
    ) -> None:
        """One framed answer into `found`; blocks it did not bring in good order stay out."""
        body = await self._transport.call(
            Call(
                "POST",
                "/v1/blocks/fetch",
                body=[orjson.dumps({"hashes": [block.hex() for block in some]})],
                answer_bytes_max=BATCH_BODY_BYTES_MAX + BLOCK_BYTES_MAX,
            ),
            lambda reply: reply.body,
        )
        asked = set(some)
        unavailable: list[BlockHash] = []
        try:
            frames = await self.run(lambda: verified_frames(body))
        except CorruptReply:
            return
        for block, status, data in frames:
            if block not in asked:
                continue
            if status is FrameStatus.OK and data is not None:
                found[block] = data
            elif status is FrameStatus.NOT_FOUND:
                found[block] = BlockNotFound(block)
            elif status is not FrameStatus.NOT_SENT:
                unavailable.append(block)  # unreadable there, or its bytes are wrong here
        alone = await asyncio.gather(*(or_error(self.get_block(block)) for block in unavailable))
        found.update(zip(unavailable, alone, strict=True))  # retried, and with the exact reason

    # ---------------------------------------------------------------- metadata

    async def commit(self, new: NewEntry) -> Committed:
        """Make one version.  Raises `RevConflict`, `MissingBlocks`, `InvalidPath`, and
        `UnknownOutcome` if no answer could be had; repeating an identical commit is harmless."""
        return await self._transport.call(
            Call(
                "POST",
                "/v1/metadata/commit",
                LostReply.CONFIRM,
                body=[orjson.dumps(new.to_json())],
            ),
            lambda reply: Committed(entry_of(reply, "a commit"), reply.status == 201),
        )

    async def commit_many(self, entries: Sequence[NewEntry]) -> list[Entry | HaversackError]:
        """Make up to 1,000 versions in one call: the entry or the error of each, in order.

        Entries refused for a reason that may pass are sent again.
        """
        if len(entries) > COMMIT_ENTRIES_MAX:
            raise InvalidRequest(f"at most {COMMIT_ENTRIES_MAX} entries in one commit batch")

        async def send(some: Sequence[NewEntry]) -> list[Entry | HaversackError]:
            body = orjson.dumps({"entries": [new.to_json() for new in some]})
            assert len(body) <= JSON_BODY_BYTES_MAX, "batches are cut by json_bytes_at_most"
            return await self._transport.call(
                Call("POST", "/v1/metadata/commit_batch", LostReply.CONFIRM, body=[body]),
                lambda reply: commit_results(reply, len(some)),
            )

        return await until_settled(entries, send, self._transport.backoff())

    async def list_page(
        self,
        path: str,
        *,
        recursive: bool = False,
        cursor: str | None = None,
        limit: int = LISTING_PAGE_MAX,
    ) -> Page:
        """One page of what is under a folder.  Raises `EntryNotFound`."""
        return await self._transport.call(
            Call(
                "GET",
                "/v1/metadata/list",
                query=text_query(path=path, recursive=recursive, cursor=cursor, limit=limit),
            ),
            page_of,
        )

    async def iter_folder(self, path: str, *, recursive: bool = False) -> AsyncIterator[Entry]:
        """Everything under a folder, page by page."""
        cursor: str | None = None
        while True:
            page = await self.list_page(path, recursive=recursive, cursor=cursor)
            for entry in page.entries:
                yield entry
            if page.cursor is None:
                return
            if page.cursor == cursor:
                raise CorruptReply(f"the listing of {path!r} does not advance")
            cursor = page.cursor

    async def entry(self, path: str) -> Entry:
        """What stands at a path.  Raises `EntryNotFound`."""
        return await self._transport.call(
            Call("GET", "/v1/metadata/entry", query=text_query(path=path)),
            lambda reply: entry_of(reply, "a path"),
        )

    async def delete(self, path: str, parent_rev: str | None = None) -> int:
        """Delete a file or a folder with all under it; versions are kept.  Entries deleted.

        Sent once: raises `UnknownOutcome` when the answer was lost, saying what stands there now.
        """
        request: dict[str, Any] = {"path": path}
        if parent_rev is not None:
            request["parent_rev"] = parent_rev
        try:
            return await self._transport.call(
                Call("POST", "/v1/metadata/delete", LostReply.TELL, body=[orjson.dumps(request)]),
                deleted_count,
            )
        except UnknownOutcome as error:
            raise UnknownOutcome(
                f"deleting {path!r}: {error} ({await self._standing(path)})", error.details
            ) from error

    async def _standing(self, path: str) -> str:
        try:
            entry = await self.entry(path)
        except EntryNotFound:
            return "nothing stands there now"
        except HaversackError as error:
            return f"what stands there now could not be learned: {error.kind}"
        return f"a {entry.kind.value} stands there now, rev {entry.rev}"

    async def make_folder(self, path: str) -> Entry:
        """Make a folder and its parents; an existing folder is a success."""
        return await self._transport.call(
            Call(
                "POST",
                "/v1/metadata/folder",
                LostReply.CONFIRM,
                body=[orjson.dumps({"path": path})],
            ),
            lambda reply: entry_of(reply, "making a folder"),
        )

    # ------------------------------------------------------------ account, admin

    async def account(self) -> dict[str, Any]:
        """Who the token belongs to."""
        return await self._get_json("/v1/account")

    async def status(self) -> dict[str, Any]:
        """The cell's nodes, volumes and bytes; for administrators."""
        return await self._get_json("/v1/admin/status")

    async def verification(self) -> dict[str, Any]:
        """What the verifier found and is about to do; for administrators."""
        return await self._get_json("/v1/admin/verify")

    async def request_verification(
        self, *, deep: bool = False, remove_strays: bool = False, dry_run: bool = False
    ) -> int:
        """Ask the verifier for a pass or a removal of strays; returns the request's number."""
        body = {"deep": deep, "remove_strays": remove_strays, "dry_run": dry_run}
        return await self._transport.call(
            Call("POST", "/v1/admin/verify", body=[orjson.dumps(body)]),
            lambda reply: int(json_object(reply, "a request to verify")["request"]),
        )

    async def why(self, subject: str) -> dict[str, Any]:
        """What is known of a block, a volume or a node; for administrators.  Raises
        `EntryNotFound`, `MalformedId`."""
        return await self._get_json(f"/v1/admin/why/{urllib.parse.quote(subject, safe='')}")

    async def what_if(
        self, lose: Sequence[str] = (), *, any_one: str | None = None
    ) -> dict[str, Any]:
        """What the loss of all of `lose` would leave, or the worst of one `any_one` (node, host,
        rack); for administrators.  Raises `InvalidRequest`."""
        query = text_query(lose=",".join(lose) or None, any_one=any_one)
        return await self._get_json("/v1/admin/what-if", query)

    async def events(self, subject: str | None = None, limit: int = 50) -> dict[str, Any]:
        """What happened, newest first; for administrators."""
        return await self._get_json("/v1/admin/events", text_query(subject=subject, limit=limit))

    async def is_ready(self) -> bool:
        """Whether the server says that it serves; False also when it cannot be reached."""
        try:
            await self._transport.call(Call("GET", "/readyz", anonymous=True), lambda _: None)
        except HaversackError:
            return False
        return True

    async def ask_admin(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """One call below /v1/admin, for administrators: its JSON answer.

        A change is sent once: if its answer is lost, `UnknownOutcome` says so.
        """
        lost = LostReply.REPEAT if method == "GET" else LostReply.TELL
        sent = None if body is None else [orjson.dumps(body)]
        call = Call(method, f"/v1/admin/{path}", lost, body=sent)
        return await self._transport.call(call, lambda reply: json_object(reply, path))

    # ------------------------------------------------------------------ plumbing

    async def _get_json(self, path: str, query: Mapping[str, str] | None = None) -> dict[str, Any]:
        return await self._transport.call(
            Call("GET", path, query=query or {}), lambda reply: json_object(reply, path)
        )

    async def _hash(self, data: bytes) -> BlockHash:
        if len(data) <= _HASH_IN_LOOP_BYTES:
            return hash_block(data)
        return await self.run(lambda: hash_block(data))
