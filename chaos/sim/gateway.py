"""A gateway process of a simulated cell: the product's own objects, without HTTP.

Assembled by `chaos/sim/world.py` at every start of the process, from files and the network alone,
as the real gateway is.  Its public methods are what clients may call through the simulated
network; they do what the routes of `api/` do: authenticate, authorise, call.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from chaos.workloads import EntrySeen
from cluster.block_client import BlockClient
from cluster.block_client_settings import BlockClientSettings
from cluster.block_index import BlockIndex, NewBlock, RecordOutcome
from cluster.lookout import Lookout
from cluster.node_pool import NodePool
from cluster.problem_log import ProblemLog
from cluster.topology import NodeView
from cluster.volume_map import VolumeMap
from erasure.codec import Codec
from erasure.keyring import Keyring
from metadata.accounts import Account, Accounts
from metadata.changes import CommitRequest
from metadata.tree import Tree
from protocol.clock import Clock
from protocol.errors import BlockNotFound, HaversackError
from protocol.hashing import Buffer, hash_block
from protocol.ids import BlockHash
from protocol.limits import BATCH_BODY_BYTES_MAX
from sql.database import Database
from storage_node.interface import NodePort

Run = Callable[..., Awaitable[Any]]

LOOK_S = 3.0
"""Between two looks of a gateway: seldom, because looks are most of the steps of a quiet run."""

MTIME = 1.0
"""Of every committed file: the same blocks again are then the same content."""


@dataclass(frozen=True, slots=True)
class GatewayParts:
    """The classes a gateway is made of; tests replace one by a mutant."""

    block_index: type[BlockIndex] = BlockIndex
    block_client: type[BlockClient] = BlockClient
    volume_map: type[VolumeMap] = VolumeMap
    node_pool: type[NodePool] = NodePool
    tree: type[Tree] = Tree


WatchPuts = Callable[[Sequence[NewBlock]], Callable[[Sequence[RecordOutcome]], None]]
"""Told of blocks before they are recorded; what it returns is told of the outcomes."""


def watched(base: type[BlockIndex], watch: WatchPuts) -> type[BlockIndex]:
    """The same index, with a checker looking over its shoulder."""

    class WatchedIndex(base):  # type: ignore[misc, valid-type]
        async def record_puts(self, entries: Sequence[NewBlock]) -> list[RecordOutcome]:
            judge = watch(entries)
            outcomes: list[RecordOutcome] = await super().record_puts(entries)
            judge(outcomes)
            return outcomes

    return WatchedIndex


class SimGateway:
    """One life of a gateway process."""

    def __init__(
        self,
        parts: GatewayParts,
        cell_db: Database,
        metadata_db: Database,
        connect: Callable[[NodeView], NodePort],
        clock: Clock,
        rng: random.Random,
        run: Run,
        codec: Codec,
        keyring: Keyring | None,
        settings: BlockClientSettings,
        name: str,
    ) -> None:
        self.index = parts.block_index(cell_db, clock)
        self.map = parts.volume_map(cell_db, clock)
        self.pool = parts.node_pool(self.map, connect, clock, rng)
        self.problems = ProblemLog(cell_db, clock)
        self.lookout = Lookout(name, cell_db, self.map, self.pool, clock, rng, LOOK_S)
        self.blocks = parts.block_client(
            self.index,
            self.map,
            self.pool,
            codec,
            keyring,
            clock,
            rng,
            run,
            settings,
            self.problems.report,
        )
        self.tree = parts.tree(metadata_db, clock)
        self.accounts = Accounts(metadata_db, clock, rng.randbytes)

    # -- what clients call ---------------------------------------------------------------------

    async def put(self, token: str, data: bytes) -> None:
        """`PUT /v1/blocks/{hash}`."""
        account = await self.accounts.authenticate(token)
        await self.blocks.put(account.id, hash_block(data), (data,), len(data))

    async def put_many(self, token: str, blocks: Sequence[bytes]) -> list[HaversackError | None]:
        """`POST /v1/blocks/batch`."""
        account = await self.accounts.authenticate(token)
        named = [(hash_block(data), data) for data in blocks]
        results = await self.blocks.put_many(account.id, named)
        return [result if isinstance(result, HaversackError) else None for result in results]

    async def get(self, token: str, block: BlockHash) -> bytes:
        """`GET /v1/blocks/{hash}`: unknown and not allowed look the same."""
        account = await self.accounts.authenticate(token)
        if block not in await self._readable(account, [block]):
            raise BlockNotFound(block)
        return bytes(await self.blocks.get(block))

    async def get_many(
        self, token: str, blocks: Sequence[BlockHash]
    ) -> list[Buffer | HaversackError]:
        """`POST /v1/blocks/fetch`, asked again until nothing is left out for its size."""
        account = await self.accounts.authenticate(token)
        readable = await self._readable(account, blocks)
        lengths = await self.blocks.lengths([block for block in blocks if block in readable])
        found: dict[BlockHash, Buffer | HaversackError] = {}
        for part in _parts(lengths):
            answers = await self.blocks.get_many(part)
            for block, answer in zip(part, answers, strict=True):
                found[block] = answer if isinstance(answer, HaversackError) else bytes(answer)
        return [found[block] if block in found else BlockNotFound(block) for block in blocks]

    async def check(self, token: str, blocks: Sequence[BlockHash]) -> set[BlockHash]:
        """`POST /v1/blocks/check`: what the caller need not send."""
        account = await self.accounts.authenticate(token)
        readable = await self._readable(account, blocks)
        return await self.index.claim(account.id, sorted(readable))

    async def commit(
        self,
        token: str,
        path: str,
        blocks: tuple[BlockHash, ...],
        size: int,
        parent_rev: str | None,
    ) -> str:
        """`POST /v1/metadata/commit`; the revision that is there now."""
        account = await self.accounts.authenticate(token)
        claimed = await self.index.claimed(account.id, list(dict.fromkeys(blocks)))
        request = CommitRequest(path, size, MTIME, block_list=blocks, parent_rev=parent_rev)
        result = await self.tree.commit(account, request, claimed)
        return result.entry.rev

    async def entry(self, token: str, path: str) -> EntrySeen:
        """`GET /v1/metadata/entry`."""
        account = await self.accounts.authenticate(token)
        entry = await self.tree.entry(account, path)
        return EntrySeen(entry.rev, entry.block_list or ())

    async def delete(self, token: str, path: str, parent_rev: str | None) -> None:
        """`POST /v1/metadata/delete`."""
        account = await self.accounts.authenticate(token)
        await self.tree.delete(account, path, parent_rev)

    async def _readable(self, account: Account, blocks: Sequence[BlockHash]) -> set[BlockHash]:
        """Blocks that the caller references or has a claim to."""
        wanted = list(dict.fromkeys(blocks))
        referenced = await self.tree.references(account, wanted)
        rest = [block for block in wanted if block not in referenced]
        return referenced | (await self.index.claimed(account.id, rest) if rest else set())


def _parts(lengths: dict[BlockHash, int]) -> Iterator[list[BlockHash]]:
    """Runs of blocks whose sum fits into one answer."""
    part: list[BlockHash] = []
    size = 0
    for block, length in lengths.items():
        if part and size + length > BATCH_BODY_BYTES_MAX:
            yield part
            part, size = [], 0
        part.append(block)
        size += length
    if part:
        yield part
