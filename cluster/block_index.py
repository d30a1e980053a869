"""The block index: which blocks exist, in which volume, and who may reference them
(steps 2 and 5 of a put, step 1 of a get, all of a check).

Called by `block_client` and `api`.  Reads and writes `cell.db` through `sql.database`; may not
import the placement service, a node port or Ray.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from sqlalchemy import Connection, func, select

from cluster.block_sql import BlockSql, BlockValues, Debt, Fence, Growth
from cluster.block_sql_portable import PortableBlockSql
from cluster.block_sql_sqlite import SqliteBlockSql
from cluster.coalescer import Coalescer
from cluster.schema import debts, volumes
from protocol.clock import Clock
from protocol.ids import BlockHash, NodeId, VolumeId
from protocol.limits import BATCH_BLOCKS_MAX, CLAIM_SECONDS
from sql.database import Database

RECORD_BATCH_BLOCKS: Final = 2 * BATCH_BLOCKS_MAX
"""Blocks of one transaction: bounds how long other writers wait for it, and its log."""

WAITING_BLOCKS_MAX: Final = 8 * RECORD_BATCH_BLOCKS
"""Blocks waiting for a transaction before callers are told to slow down."""

COALESCED_LOOKUP_HASHES: Final = 16
"""Lookups of up to so many hashes share a query; larger ones would make the small ones wait."""

LOOKUP_BATCH_HASHES: Final = 1_024
"""Hashes of one shared query."""


class BlockRow(NamedTuple):
    """One live block of the index."""

    hash: BlockHash
    volume: VolumeId
    stored_bytes: int
    plain_bytes: int


class Receipt(NamedTuple):
    """A node's word that it holds a slot durably, and in which of its lives it gave it."""

    slot: int
    node_id: NodeId
    incarnation: int


class NewBlock(NamedTuple):
    """A block whose fragments are durable, to be made known by `record_puts`."""

    hash: BlockHash
    owner: int
    """Account that sent the bytes: gets the claim."""
    volume: VolumeId
    epoch: int
    """The volume's epoch that the fragments were written under."""
    stored_bytes: int
    plain_bytes: int
    receipts: tuple[Receipt, ...]
    missing_slots: tuple[int, ...] = ()
    """Slots that nobody acknowledged: become debts.  Every slot is here or has a receipt."""


class RecordOutcome(enum.Enum):
    """What became of one `NewBlock`."""

    NEW = "new"
    EXISTS = "exists"
    """Known already, perhaps in another volume; the owner has a claim now all the same."""
    FENCED = "fenced"
    """A receipt is from another incarnation, or the volume moved on: nothing was recorded.
    Refresh the map, write the block again."""


class Totals(NamedTuple):
    """Sums over all live blocks."""

    blocks: int
    plain_bytes: int
    stored_bytes: int
    """After the envelope, before coding."""


class BlockIndex:
    """One per process and event loop.  All methods may raise `DatabaseBusy` (nothing was done)."""

    def __init__(self, db: Database, clock: Clock, sql: BlockSql | None = None) -> None:
        """`sql` is chosen by the database's dialect unless given."""
        self._db = db
        self._clock = clock
        if sql is None:
            sql = SqliteBlockSql() if db.dialect == "sqlite" else PortableBlockSql()
        self._sql: BlockSql = sql
        self._puts = Coalescer[NewBlock, RecordOutcome](
            self._record, RECORD_BATCH_BLOCKS, WAITING_BLOCKS_MAX
        )
        self._lookups = Coalescer[BlockHash, BlockRow | None](
            self._look_up_each, LOOKUP_BATCH_HASHES, WAITING_BLOCKS_MAX
        )

    async def lookup(self, hashes: Sequence[BlockHash]) -> dict[BlockHash, BlockRow]:
        """The rows of those that exist, in no particular order; any number of hashes."""
        if len(hashes) > COALESCED_LOOKUP_HASHES:
            return await self._look_up(hashes)
        rows = await self._lookups.submit(hashes)
        return {row.hash: row for row in rows if row is not None}

    async def claimed(self, owner: int, hashes: Sequence[BlockHash]) -> set[BlockHash]:
        """Those live blocks that `owner` holds a claim to."""
        now = self._clock.wall()
        wanted = unique_sorted(hashes)
        claimed, _ = await self._db.read(
            lambda connection: self._sql.claim_life(
                connection, owner, wanted, created_after=now - CLAIM_SECONDS, expires_after=now
            )
        )
        return {wanted[position] for position in claimed}

    async def claim(self, owner: int, hashes: Sequence[BlockHash]) -> set[BlockHash]:
        """Claim those that exist and return them, for at least half of `CLAIM_SECONDS` from now.

        The caller has decided that `owner` may know of each.  Existence and claim are one
        transaction; nothing is written for claims with more than half of their life left.
        """
        now = self._clock.wall()
        half_s = CLAIM_SECONDS / 2
        wanted = unique_sorted(hashes)
        # A block whose claim lasts cannot be collected before it ends: reading is enough.
        lasting, others = await self._db.read(
            lambda connection: self._sql.claim_life(
                connection, owner, wanted, created_after=now - half_s, expires_after=now + half_s
            )
        )
        held = {wanted[position] for position in lasting}
        if others:
            renew = sorted(wanted[position] for position in others)
            held |= await self._db.write(
                lambda connection: self._renew(connection, owner, renew, now)
            )
        return held

    async def record_puts(self, entries: Sequence[NewBlock]) -> list[RecordOutcome]:
        """Make blocks known, durably, one outcome per entry in order.

        One transaction, shared with other calls that are waiting; it compares every receipt with
        the node and volume tables, inserts first-wins, and writes claims, debts and volume
        counters.  Raises `Overloaded` when too many wait, and `UnknownOutcome` if the commit's own
        result is not known: look the blocks up before writing them again.
        """
        if not entries:
            return []
        return await self._puts.submit(entries)

    async def totals(self) -> Totals:
        """Sums of the volume counters: cheap."""
        return await self._db.read(read_totals)

    async def debts(self) -> int:
        """Fragments known to be missing."""
        return await self._db.read(count_debts)

    # -- batches -------------------------------------------------------------------------------

    async def _look_up_each(self, hashes: list[BlockHash]) -> list[BlockRow | None]:
        rows = await self._look_up(hashes)
        return [rows.get(block) for block in hashes]

    async def _look_up(self, hashes: Sequence[BlockHash]) -> dict[BlockHash, BlockRow]:
        wanted = unique_sorted(hashes)
        found = await self._db.read(lambda connection: self._sql.lookup(connection, wanted))
        names = [wanted[position] for position in found.positions]
        volume_ids = {number: VolumeId(number) for number in set(found.volumes)}
        volumes_found = [volume_ids[number] for number in found.volumes]
        rows = map(
            BlockRow._make,
            zip(names, volumes_found, found.stored_bytes, found.plain_bytes, strict=True),
        )
        return dict(zip(names, rows, strict=True))

    async def _record(self, entries: list[NewBlock]) -> list[RecordOutcome]:
        now = self._clock.wall()
        return await self._db.write(lambda connection: self._record_in(connection, entries, now))

    def _record_in(
        self, connection: Connection, entries: list[NewBlock], now: float
    ) -> list[RecordOutcome]:
        """The transaction of step 5 of a put."""
        hashes = unique_sorted([entry.hash for entry in entries])
        volume_ids = sorted({entry.volume for entry in entries})
        existing, fences = self._sql.compare(connection, hashes, volume_ids)
        known = {hashes[position] for position in existing}
        outcomes: list[RecordOutcome] = []
        new: dict[BlockHash, NewBlock] = {}
        claims: set[tuple[int, BlockHash]] = set()
        for entry in entries:
            if entry.hash in known or entry.hash in new:
                outcomes.append(RecordOutcome.EXISTS)
                claims.add((entry.owner, entry.hash))
            elif (fence := fences.get(entry.volume)) is None or entry.epoch != fence.epoch:
                outcomes.append(RecordOutcome.FENCED)
            elif receipts_hold(entry, fence):
                outcomes.append(RecordOutcome.NEW)
                new[entry.hash] = entry
            else:
                outcomes.append(RecordOutcome.FENCED)
        if new:
            lost = self._insert(connection, [new[block] for block in sorted(new)], now)
            if lost:
                outcomes = _give_way(entries, outcomes, lost)
                claims |= {(entry.owner, entry.hash) for entry in entries if entry.hash in lost}
        if claims:
            self._claim_existing(connection, sorted(claims), now)
        return outcomes

    def _insert(self, connection: Connection, rows: list[NewBlock], now: float) -> set[BlockHash]:
        """Insert, count, write debts; returns hashes that another transaction inserted first."""
        inserted = self._sql.insert_blocks(
            connection,
            [
                BlockValues(row.hash, row.volume, row.stored_bytes, row.plain_bytes, row.owner)
                for row in rows
            ],
            now,
        )
        lost = {row.hash for row in rows} - inserted if len(inserted) != len(rows) else set()
        mine = [row for row in rows if row.hash not in lost] if lost else rows
        self._sql.grow(connection, _growths(mine))
        owed = sorted(
            Debt(row.volume, slot, row.hash) for row in mine for slot in row.missing_slots
        )
        self._sql.insert_debts(connection, owed, now)
        return lost

    def _claim_existing(
        self, connection: Connection, rows: Sequence[tuple[int, BlockHash]], now: float
    ) -> None:
        half_s = CLAIM_SECONDS / 2
        self._sql.write_claims(
            connection,
            rows,
            created_after=now - half_s,
            renew_before=now + half_s,
            expires=now + CLAIM_SECONDS,
        )

    def _renew(
        self, connection: Connection, owner: int, hashes: Sequence[BlockHash], now: float
    ) -> set[BlockHash]:
        """Claim what still exists in this transaction."""
        claimed, others = self._sql.claim_life(connection, owner, hashes, now, now)
        alive = [hashes[position] for position in claimed + others]
        self._claim_existing(connection, sorted((owner, block) for block in alive), now)
        return set(alive)


def unique_sorted(hashes: Iterable[BlockHash]) -> list[BlockHash]:
    """Each once, in key order: neighbours share index pages."""
    return sorted(set(hashes))


def read_totals(connection: Connection) -> Totals:
    """Sums of the volume counters."""
    blocks, plain, stored = connection.execute(
        select(
            func.coalesce(func.sum(volumes.c.blocks), 0),
            func.coalesce(func.sum(volumes.c.plain_bytes), 0),
            func.coalesce(func.sum(volumes.c.stored_bytes), 0),
        )
    ).one()
    return Totals(int(blocks), int(plain), int(stored))


def count_debts(connection: Connection) -> int:
    """Rows of the debt table."""
    count: int = connection.execute(select(func.count()).select_from(debts)).scalar_one()
    return count


def receipts_hold(entry: NewBlock, fence: Fence) -> bool:
    """Whether every slot is either missing or vouched for by its node's present incarnation."""
    if not entry.missing_slots and entry.receipts == fence.slots:
        return True  # the ordinary case, in slot order
    vouched = {slot: (node_id, incarnation) for slot, node_id, incarnation in entry.receipts}
    missing = set(entry.missing_slots)
    if len(vouched) != len(entry.receipts) or len(vouched) + len(missing) != len(fence.slots):
        return False
    for slot, node_id, incarnation in fence.slots:
        if slot in missing:
            continue
        if node_id is None or vouched.get(slot) != (node_id, incarnation):
            return False
    return True


def _growths(rows: Sequence[NewBlock]) -> list[Growth]:
    """One sum per volume, in volume order."""
    sums: dict[VolumeId, list[int]] = {}
    for row in rows:
        total = sums.setdefault(row.volume, [0, 0, 0])
        total[0] += 1
        total[1] += row.stored_bytes
        total[2] += row.plain_bytes
    return [Growth(volume, *sums[volume]) for volume in sorted(sums)]


def _give_way(
    entries: Sequence[NewBlock], outcomes: Sequence[RecordOutcome], lost: set[BlockHash]
) -> list[RecordOutcome]:
    """Outcomes after another transaction came first with some hashes."""
    return [
        RecordOutcome.EXISTS if outcome is RecordOutcome.NEW and entry.hash in lost else outcome
        for entry, outcome in zip(entries, outcomes, strict=True)
    ]
