"""Bring blocks to the server: ask which are missing, send those, each once.

Step 3 of the life of a put from a folder.  Called by `client.upload`; may import `protocol` and
`client.api`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from client.api import HaversackClient
from client.report import Ledger, stops
from protocol.errors import HaversackError
from protocol.ids import BlockHash
from protocol.limits import KIB, MIB

_BATCHED_BLOCK_BYTES_MAX = 256 * KIB
"""Blocks up to this travel together: a request of their own would cost more than their bytes."""
_BATCH_BYTES = 4 * MIB
"""Several bodies of this size in parallel keep the server busier than one of the limit."""


class BlockSender:
    """The blocks of one upload.  Remembers what is on the server: 32 bytes a block."""

    def __init__(self, client: HaversackClient, ledger: Ledger, parallel: int) -> None:
        self._client = client
        self._ledger = ledger
        self._slots = asyncio.Semaphore(parallel)
        self._claimed: set[BlockHash] = set()
        self._under_way: dict[BlockHash, asyncio.Future[HaversackError | None]] = {}

    def forget(self, blocks: Iterable[BlockHash]) -> None:
        """Drop what the server no longer lets us reference: our claim ran out."""
        self._claimed.difference_update(blocks)

    async def ensure(
        self, blocks: Sequence[tuple[BlockHash, bytes]]
    ) -> dict[BlockHash, HaversackError]:
        """Make every block present and claimed; the errors of those that could not be.

        Raises the error itself where going on is pointless (`client.report.stops`).
        """
        counters = self._ledger.counters
        mine: dict[BlockHash, bytes] = {}
        others: dict[BlockHash, asyncio.Future[HaversackError | None]] = {}
        for block, data in blocks:
            if block in mine or block in self._claimed:
                counters.blocks_deduplicated += 1
            elif block in self._under_way:
                others[block] = self._under_way[block]
                counters.blocks_deduplicated += 1
            else:
                mine[block] = data
        failed = await self._bring(mine) if mine else {}
        for block, future in others.items():
            error = await asyncio.shield(future)
            if error is not None:
                failed[block] = error
        return failed

    async def _bring(self, mine: dict[BlockHash, bytes]) -> dict[BlockHash, HaversackError]:
        loop = asyncio.get_running_loop()
        futures = {block: loop.create_future() for block in mine}
        self._under_way.update(futures)
        try:
            missing = await self._client.check_blocks(list(mine))
            self._ledger.counters.blocks_deduplicated += len(mine) - len(missing)
            failed = await self._send([(block, mine[block]) for block in mine if block in missing])
            self._claimed.update(block for block in mine if block not in failed)
            for block, future in futures.items():
                future.set_result(failed.get(block))
        except HaversackError as error:
            for future in futures.values():
                if not future.done():
                    future.set_result(error)
            raise
        finally:
            for block, future in futures.items():
                self._under_way.pop(block, None)
                future.cancel()
        return failed

    async def _send(
        self, blocks: Sequence[tuple[BlockHash, bytes]]
    ) -> dict[BlockHash, HaversackError]:
        large = [item for item in blocks if len(item[1]) > _BATCHED_BLOCK_BYTES_MAX]
        small = [item for item in blocks if len(item[1]) <= _BATCHED_BLOCK_BYTES_MAX]
        calls = [self._put_one(block, data) for block, data in large]
        calls += [self._put_batch(some) for some in _cut(small)]
        failed: dict[BlockHash, HaversackError] = {}
        for part in await asyncio.gather(*calls):
            failed.update(part)
        for error in failed.values():
            if stops(error):
                raise error
        return failed

    async def _put_one(self, block: BlockHash, data: bytes) -> dict[BlockHash, HaversackError]:
        async with self._slots:
            try:
                new = await self._client.put_block(block, data)
            except HaversackError as error:
                return {block: error}
        self._sent(new, len(data))
        return {}

    async def _put_batch(
        self, some: Sequence[tuple[BlockHash, bytes]]
    ) -> dict[BlockHash, HaversackError]:
        failed: dict[BlockHash, HaversackError] = {}
        async with self._slots:
            try:
                results = await self._client.put_blocks(some)
            except HaversackError as error:
                return {block: error for block, _ in some}
        for (block, data), result in zip(some, results, strict=True):
            if isinstance(result, HaversackError):
                failed[block] = result
            else:
                self._sent(result, len(data))
        return failed

    def _sent(self, new: bool, length: int) -> None:
        counters = self._ledger.counters
        counters.bytes_moved += length
        if new:
            counters.blocks_new += 1
        else:
            counters.blocks_deduplicated += 1
        self._ledger.changed()


def _cut(
    blocks: Sequence[tuple[BlockHash, bytes]],
) -> Iterable[Sequence[tuple[BlockHash, bytes]]]:
    """Runs of about `_BATCH_BYTES`."""
    start, length = 0, 0
    for position, (_, data) in enumerate(blocks):
        if position > start and length + len(data) > _BATCH_BYTES:
            yield blocks[start:position]
            start, length = position, 0
        length += len(data)
    if start < len(blocks):
        yield blocks[start:]
