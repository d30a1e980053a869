"""The block client: puts and gets blocks, over many nodes that come and go.

Called by the gateway (`api`), the simulation and the bench: the walks "life of a put" and "life of
a get" of `docs/architecture.md` start here.  `put_path`, `get_path` and `batch_read` hold the
steps; this file owns what is common to a process: the answer "exists already", one flight per
hash, groups of small puts, and the budgets of bytes.  May not import Ray, HTTP or a concrete port.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import random
from collections.abc import Iterator, Sequence
from typing import Final, TypeAlias

from cluster.batch_read import read_batch
from cluster.block_client_settings import (
    BlockClientSettings,
    PutResult,
    ReportFragment,
    Run,
    ignore_problem,
)
from cluster.block_index import BlockIndex, BlockRow
from cluster.block_rows import BlockRows
from cluster.byte_budget import ByteBudget
from cluster.get_path import GetPath
from cluster.grouping import GroupCall, Grouping
from cluster.hedging import HedgeBudget
from cluster.node_pool import NodePool
from cluster.put_path import PendingBlock, PutPath, Settle
from cluster.shared_reads import SharedReads
from cluster.stripe_read import Pieces, ReadTools, joined
from cluster.volume_map import VolumeMap
from erasure.codec import Codec
from erasure.fragment import FRAGMENT_HEADER_BYTES, Fragment
from erasure.keyring import Keyring
from erasure.scheme import Scheme, SchemeKind
from protocol.clock import Clock
from protocol.errors import BlockNotFound, DatabaseBusy, HaversackError
from protocol.hashing import Buffer
from protocol.ids import BlockHash
from protocol.limits import (
    BATCH_BLOCKS_MAX,
    BATCH_BODY_BYTES_MAX,
    BLOCK_BYTES_MAX,
    ENVELOPE_BYTES,
    KIB,
    SMALL_BLOCK_BYTES,
)

_Outcome: TypeAlias = PutResult | HaversackError

_Flight = asyncio.Future[HaversackError | None]
"""Ends with the leader's error, or None: then whoever waited looks for itself."""

GROUPED_BYTES_MAX: Final = 32 * KIB
"""Blocks up to this size that are put one by one at the same time share frames.  Of larger ones the
bytes cost more than the request."""

GROUP_PUTS_MAX: Final = 64
"""Puts of one group: more do not make a put cheaper, and all of them wait for the last byte."""

PUT_LANES: Final = 4
"""Groups of small puts under way before others wait to be grouped: enough to keep all nodes busy,
few enough that a busy gateway writes large groups."""

PUT_LATE_S: Final = 0.1
"""A group that takes longer has met a bad node or a busy disk: others no longer wait for it."""

SMALL_PUTS_MAX: Final = 1_024
"""Small puts that wait or run; the gateway lets fewer in."""

assert GROUP_PUTS_MAX * GROUPED_BYTES_MAX <= BATCH_BODY_BYTES_MAX
assert GROUPED_BYTES_MAX < SMALL_BLOCK_BYTES


class BlockClient:
    """One per process and event loop.  Close the pool after the last call."""

    def __init__(
        self,
        index: BlockIndex,
        volume_map: VolumeMap,
        pool: NodePool,
        codec: Codec,
        keyring: Keyring | None,
        clock: Clock,
        rng: random.Random,
        run: Run,
        settings: BlockClientSettings,
        report_fragment: ReportFragment = ignore_problem,
    ) -> None:
        self._index = index
        self._settings = settings
        self._rows = BlockRows(index, settings.rows_cached_max)
        self._map = volume_map
        reads = SharedReads(pool, rng, settings.get_slot_s)
        self._tools = ReadTools(
            pool, reads, HedgeBudget(), codec, keyring, clock, rng, run, settings
        )
        self._put_path = PutPath(
            index, self._rows, volume_map, pool, codec, keyring, clock, rng, run, settings
        )
        self._get_path = GetPath(self._rows, volume_map, self._tools, report_fragment)
        self._put_budget = ByteBudget("puts", settings.put_bytes_max, settings.queue_s)
        self._get_budget = ByteBudget("gets", settings.get_bytes_max, settings.queue_s)
        self._flights: dict[BlockHash, _Flight] = {}
        self._small_puts = Grouping[PendingBlock, _Outcome | None](
            self._lead_group,
            items_max=GROUP_PUTS_MAX,
            calls_max=SMALL_PUTS_MAX,
            lanes=PUT_LANES,
            late_s=PUT_LATE_S,
        )

    # -- put -----------------------------------------------------------------------------------

    async def put(
        self, owner: int, block: BlockHash, parts: Sequence[Buffer], length: int
    ) -> PutResult:
        """Store a block of `length` bytes, given in `parts` that the caller has hashed to `block`.

        Returns when the block is durable and known and `owner` holds a claim to it.  Raises
        `NotEnoughNodes`, `DatabaseBusy`, `Overloaded` (nothing was claimed: retry later) or
        `UnknownOutcome` (ask again before sending again).  A caller that is cancelled leaves at
        most fragments that no row refers to, or a block that is stored after all.
        """
        assert 0 <= length <= BLOCK_BYTES_MAX
        while True:
            existing = await self._claim_existing(owner, [block])
            if block in existing:
                return PutResult(False, existing[block].stored_bytes, False)
            flight = self._flights.get(block)
            if flight is not None:
                error = await asyncio.shield(flight)
                if error is not None:
                    raise copy.copy(error)
                continue
            item = PendingBlock(owner, block, parts, length)
            if length > GROUPED_BYTES_MAX:
                outcome: _Outcome | None = (await self._lead([item]))[block]
            else:
                outcome = await self._small_puts.submit(item)
            if isinstance(outcome, HaversackError):
                raise copy.copy(outcome)
            if outcome is not None:
                return outcome

    async def put_many(
        self, owner: int, blocks: Sequence[tuple[BlockHash, Buffer]]
    ) -> list[_Outcome]:
        """Store many blocks, verified by the caller, with one frame to each node; one result each.

        A block that is named twice is new at most once.  Raises only for what concerns them all:
        `DatabaseBusy` while looking them up, `Overloaded`.
        """
        data: dict[BlockHash, Buffer] = {}
        for block, plain in blocks:
            data.setdefault(block, plain)
        results: dict[BlockHash, _Outcome] = {}
        for block, row in (await self._claim_existing(owner, list(data))).items():
            results[block] = PutResult(False, row.stored_bytes, False)
        unknown = [block for block in data if block not in results]
        others = [block for block in unknown if block in self._flights]
        mine = [
            PendingBlock(owner, block, (data[block],), len(data[block]))
            for block in unknown
            if block not in self._flights
        ]
        if mine:
            results.update(await self._lead(mine))
        for block in others:
            results[block] = await self._put_caught(owner, block, data[block])
        return _in_order(blocks, results)

    async def _put_caught(self, owner: int, block: BlockHash, data: Buffer) -> _Outcome:
        try:
            return await self.put(owner, block, (data,), len(data))
        except HaversackError as error:
            return error

    async def _claim_existing(
        self, owner: int, blocks: Sequence[BlockHash]
    ) -> dict[BlockHash, BlockRow]:
        """Rows of the blocks that exist, after `owner` got a claim to each: a hit is a write."""
        rows = await self._index.lookup(blocks)
        if not rows:
            return {}
        claimed = await self._index.claim(owner, list(rows))
        return {block: row for block, row in rows.items() if block in claimed}

    async def _lead_group(self, calls: Sequence[GroupCall[PendingBlock, _Outcome | None]]) -> None:
        """Store small blocks that arrived at the same time.  The answer None sends a caller back
        to look: somebody else has stored that block meanwhile, or is about to."""
        leaders: dict[BlockHash, GroupCall[PendingBlock, _Outcome | None]] = {}
        followers = []
        for call in calls:
            block = call.item.block
            if block in self._flights or block in leaders:
                followers.append(call)
            else:
                leaders[block] = call
        for call in followers:
            if call.item.block not in leaders:
                call.settle(None)  # it waits for that flight
        if leaders:
            outcomes = await self._lead(
                [call.item for call in leaders.values()],
                lambda block, outcome: leaders[block].settle(outcome),
            )
            for call in followers:
                outcome = outcomes.get(call.item.block)
                call.settle(outcome if isinstance(outcome, HaversackError) else None)

    async def _lead(
        self, items: Sequence[PendingBlock], settle: Settle | None = None
    ) -> dict[BlockHash, _Outcome]:
        """Store blocks that nobody else in this process is storing; others wait for the flight.

        Each block's flight ends with its own result, and `settle` hears of it then.  Whatever ends
        it, no flight is left behind: after a cancellation the next in line leads.
        """
        loop = asyncio.get_running_loop()
        flights: dict[BlockHash, _Flight] = {item.block: loop.create_future() for item in items}
        assert not flights.keys() & self._flights.keys()
        self._flights.update(flights)
        outcomes: dict[BlockHash, _Outcome] = {}

        def note(block: BlockHash, outcome: _Outcome) -> None:
            outcomes[block] = outcome
            self._land(block, outcome if isinstance(outcome, HaversackError) else None)
            if settle is not None:
                settle(block, outcome)

        try:
            async with self._put_budget.hold(sum(map(self._put_cost, items))):
                with contextlib.suppress(DatabaseBusy):  # each group meets it, and says so
                    await self._map.refresh(self._settings.map_age_s)
                large = self._large  # one for the whole call: the map may change meanwhile
                for scheme in dict.fromkeys((large.small_twin(), large)):
                    mine = [item for item in items if _scheme_of(item, large) == scheme]
                    for group in self._groups(mine):
                        await self._put_path.store(scheme, group, note)
        finally:
            for block in [block for block in flights if block not in outcomes]:
                self._land(block, None)
        return outcomes

    def _land(self, block: BlockHash, error: HaversackError | None) -> None:
        self._flights.pop(block).set_result(error)

    @property
    def _large(self) -> Scheme:
        """What new large blocks get: the cell may be moving to another scheme."""
        schemes = self._map.schemes
        return schemes[0] if schemes else self._settings.scheme

    def _put_cost(self, item: PendingBlock) -> int:
        """Bytes a put holds at its height: the plain parts, the stored block, the fragments."""
        scheme = _scheme_of(item, self._large)
        stored = item.length + ENVELOPE_BYTES
        fragments = scheme.n * FRAGMENT_HEADER_BYTES
        if scheme.kind is SchemeKind.RS:
            fragments += scheme.n * scheme.chunk_bytes(stored)
        return item.length + stored + fragments

    def _groups(self, items: Sequence[PendingBlock]) -> Iterator[list[PendingBlock]]:
        """Runs of blocks that fit into one frame together."""
        group: list[PendingBlock] = []
        size = 0
        for item in items:
            if group and (
                size + item.length > self._settings.put_group_bytes_max
                or len(group) >= BATCH_BLOCKS_MAX
            ):
                yield group
                group, size = [], 0
            group.append(item)
            size += item.length
        if group:
            yield group

    # -- get -----------------------------------------------------------------------------------

    async def get(self, block: BlockHash) -> Buffer:
        """The plain bytes of a block; never others.  Raises what `get_pieces` raises."""
        return joined(await self.get_pieces(block))

    async def get_pieces(self, block: BlockHash) -> Pieces:
        """The plain bytes of a block, in the pieces they arrived in.

        Raises `BlockNotFound`, `BlockUnreadable` (too few good fragments answered; `details.slots`
        says why), `DatabaseBusy`, `Overloaded`.
        """
        row = (await self._rows.find([block])).get(block)
        if row is None:
            raise BlockNotFound(block)
        async with self._get_budget.hold(_get_cost(row)):
            return await self._get_path.read(row)

    async def get_many(self, blocks: Sequence[BlockHash]) -> list[Buffer | HaversackError]:
        """The plain bytes of many blocks, one result each, with one frame to each node.

        The caller bounds their sum (see `lengths`).  Raises `DatabaseBusy`, `Overloaded`.
        """
        rows = await self._rows.find(list(dict.fromkeys(blocks)))
        results: dict[BlockHash, Buffer | HaversackError] = {}
        async with self._get_budget.hold(sum(map(_get_cost, rows.values()))):
            await self._get_path.freshen_map()
            batch = await read_batch(self._tools, self._map, list(rows.values()))
            results.update(batch.plain)
            if batch.left:
                results.update(await self._read_singly(rows, batch.left))
        return [results[block] if block in results else BlockNotFound(block) for block in blocks]

    async def lengths(self, blocks: Sequence[BlockHash]) -> dict[BlockHash, int]:
        """Plain bytes of those that exist.  Raises `DatabaseBusy`."""
        rows = await self._rows.find(list(dict.fromkeys(blocks)))
        return {block: row.plain_bytes for block, row in rows.items()}

    async def _read_singly(
        self, rows: dict[BlockHash, BlockRow], left: dict[BlockHash, dict[int, Fragment]]
    ) -> dict[BlockHash, Buffer | HaversackError]:
        """Blocks that the batch could not read, a bounded number at a time."""
        turns = asyncio.Semaphore(self._settings.single_reads_max)

        async def read(block: BlockHash, known: dict[int, Fragment]) -> Buffer | HaversackError:
            async with turns:
                try:
                    return joined(await self._get_path.read(rows[block], known))
                except HaversackError as error:
                    return error

        async with asyncio.TaskGroup() as tasks:
            reads = {block: tasks.create_task(read(block, known)) for block, known in left.items()}
        return {block: task.result() for block, task in reads.items()}


def _scheme_of(item: PendingBlock, large: Scheme) -> Scheme:
    return large.small_twin() if item.length < SMALL_BLOCK_BYTES else large


def _get_cost(row: BlockRow) -> int:
    """Bytes a get holds at its height: the fragments, and the block made of them."""
    return row.stored_bytes + max(row.stored_bytes, row.plain_bytes)


def _in_order(
    blocks: Sequence[tuple[BlockHash, Buffer]],
    results: dict[BlockHash, _Outcome],
) -> list[_Outcome]:
    """One result per entry; a repetition of a block was not new."""
    ordered: list[_Outcome] = []
    seen: set[BlockHash] = set()
    for block, _ in blocks:
        result = results[block]
        if block in seen and isinstance(result, PutResult):
            result = PutResult(False, result.stored_bytes, False)
        seen.add(block)
        ordered.append(result)
    return ordered
