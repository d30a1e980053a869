"""Jobs that write the blocks of one scheme anew in another, while reads go on.

Called by `runner`, one `TranscodingJob` per job.  A block is read as a client reads it and written
by the put path's own code; only the last step differs (`Relocator`): instead of a new row, the
row of the block is moved, once all n fragments of the new stripe were read back from their disks.

    read (get path) --> seal, encode, send (put path) --> verify on every node --> move the rows

The row moves by comparison with the volume that it was read in, so a block that was deleted, or
moved by somebody else, leaves nothing but strays.  A gateway with an old row finds the old
fragments until the verifier removes them, and looks the row up again when it does not.  An emptied
volume's row goes in the transaction that empties it.  May not import Ray.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

from sqlalchemy import Connection, bindparam, delete, select, update

from cluster import map_rows
from cluster.block_client import BlockClient
from cluster.block_client_settings import BlockClientSettings, PutResult, Run
from cluster.block_index import BlockIndex, BlockRow, NewBlock, RecordOutcome, receipts_hold
from cluster.block_rows import BlockRows
from cluster.block_sql import LIVE, BlockSql, Growth
from cluster.block_sql_portable import PortableBlockSql
from cluster.block_sql_sqlite import SqliteBlockSql
from cluster.change import requests
from cluster.change.jobs import (
    Blocker,
    Job,
    JobEvent,
    change_job,
    report_progress,
)
from cluster.change.moving import JobTools, Tally
from cluster.change.plans import TranscodePlan
from cluster.events import EventKind, record_event
from cluster.node_pool import NodePool
from cluster.put_path import PendingBlock, PutPath
from cluster.repair.volume_blocks import volume_rows
from cluster.schema import blocks, debts, slot_moves, unrepairable, volume_slots, volumes
from cluster.topology import NodeView, VolumeState, VolumeView
from cluster.volume_map import VolumeMap
from erasure.codec import Codec
from erasure.keyring import Keyring
from erasure.scheme import Scheme
from protocol.clock import Clock
from protocol.errors import BlockNotFound, HaversackError, NotEnoughNodes, RetryLater
from protocol.hashing import Buffer, hash_block
from protocol.ids import BlockHash, NodeId, VolumeId
from protocol.limits import MIB
from protocol.messages import ItemStatus
from sql.database import Database
from storage_node.interface import FragmentKey, NodePort

GROUP_BYTES: Final = 8 * MIB
"""Plain bytes of blocks that are read, written and moved together; they go to one volume."""

GROUP_BLOCKS: Final = 256
RETRY_S: Final = 3.0
VERIFY_S: Final = 30.0
INVENTORY_S: Final = 15.0


class _Moved(NamedTuple):
    """A block's row before, and what it became."""

    old: BlockRow
    new: NewBlock


class Relocator:
    """Moves rows of blocks to the volume of their new fragments.  A `Recorder` of the put path."""

    def __init__(self, tools: JobTools, pool: NodePool, sql: BlockSql) -> None:
        self._tools = tools
        self._pool = pool
        self._sql = sql
        self._old: dict[BlockHash, BlockRow] = {}
        self.moved = 0

    def expect(self, rows: Sequence[BlockRow]) -> None:
        """The blocks that are to move, and where they are."""
        self._old = {row.hash: row for row in rows}
        self.moved = 0

    async def record_puts(self, entries: Sequence[NewBlock]) -> list[RecordOutcome]:
        """Verify all new fragments, then move the rows in one transaction.

        Raises `NotEnoughNodes` for a stripe with a slot missing: a block is not made less safe
        than it was.
        """
        if any(entry.missing_slots for entry in entries):
            raise NotEnoughNodes("a slot of the new volume was not written: tried again later")
        await self._verify(entries)
        return await self._tools.lead(lambda connection: self._move(connection, entries))

    async def _verify(self, entries: Sequence[NewBlock]) -> None:
        """Have every node read its new fragments back.  Raises `NotEnoughNodes`."""
        keys: dict[NodeId, list[FragmentKey]] = {}
        tags: dict[BlockHash, set[int]] = {entry.hash: set() for entry in entries}
        for entry in entries:
            for receipt in entry.receipts:
                key = FragmentKey(entry.volume, entry.hash, receipt.slot)
                keys.setdefault(receipt.node_id, []).append(key)

        async def ask(node_id: NodeId) -> None:
            found = await self._pool.port(node_id).verify(keys[node_id], VERIFY_S)
            for key, record in zip(keys[node_id], found, strict=True):
                if record.status != ItemStatus.OK:
                    raise NotEnoughNodes(
                        f"{node_id} does not hold a fragment of {key.block} that it acknowledged",
                        {"node": str(node_id), "hash": str(key.block)},
                    )
                tags[key.block].add(record.stripe_tag)

        for outcome in await asyncio.gather(*map(ask, keys), return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome
        for block, seen in tags.items():
            if len(seen) != 1:
                raise NotEnoughNodes(f"fragments of two stripes of {block} were mixed: try again")

    def _move(self, connection: Connection, entries: Sequence[NewBlock]) -> list[RecordOutcome]:
        hashes = sorted(entry.hash for entry in entries)
        ids = sorted({entry.volume for entry in entries})
        _, fences = self._sql.compare(connection, hashes, ids)
        outcomes: list[RecordOutcome] = []
        moved: list[_Moved] = []
        for entry in entries:
            fence = fences.get(entry.volume)
            if fence is None or entry.epoch != fence.epoch or not receipts_hold(entry, fence):
                outcomes.append(RecordOutcome.FENCED)
            elif _take_row(connection, entry, self._old[entry.hash].volume):
                moved.append(_Moved(self._old[entry.hash], entry))
                outcomes.append(RecordOutcome.NEW)
            else:
                outcomes.append(RecordOutcome.EXISTS)  # deleted, or moved by somebody else
        self._sql.grow(connection, _growths(moved))
        now = self._tools.clock.wall()
        for volume in sorted({item.old.volume for item in moved}):
            _forget(connection, volume, [x.old.hash for x in moved if x.old.volume == volume])
            _remove_if_empty(connection, volume, now)
        self.moved += len(moved)
        return outcomes


class TranscodeParts:
    """What reads and writes blocks for transcodes: a client of the cell, as a gateway has one."""

    def __init__(
        self,
        db: Database,
        clock: Clock,
        rng: random.Random,
        ports: Callable[[NodeView], NodePort],
        codec: Codec,
        keyring: Keyring | None,
        run: Run,
        settings: BlockClientSettings,
    ) -> None:
        """`settings`: how blocks are sealed, and how long nodes may take."""
        self._sealing = codec, keyring, clock, rng, run, settings
        self.index = BlockIndex(db, clock)
        self.map = VolumeMap(db, clock)
        self.pool = NodePool(self.map, ports, clock, rng)
        self.client = BlockClient(
            self.index, self.map, self.pool, codec, keyring, clock, rng, run, settings
        )
        self.sql: BlockSql = SqliteBlockSql() if db.dialect == "sqlite" else PortableBlockSql()

    def put_path(self, recorder: Relocator) -> PutPath:
        """The put path, with another last step."""
        rows = BlockRows(self.index, rows_max=GROUP_BLOCKS)
        return PutPath(recorder, rows, self.map, self.pool, *self._sealing)

    def work(self, tools: JobTools, job: Job) -> TranscodingJob:
        """For `JobRunner`."""
        return TranscodingJob(tools, job, self)

    async def aclose(self) -> None:
        """Close the connections to nodes."""
        await self.pool.aclose()


class TranscodingJob:
    """The work of one job, for as long as it runs."""

    def __init__(self, tools: JobTools, job: Job, parts: TranscodeParts) -> None:
        self._tools = tools
        self._job = job
        self._request = requests.request_of(job)
        self._parts = parts
        self._relocator = Relocator(tools, parts.pool, parts.sql)
        self._put_path = parts.put_path(self._relocator)
        self._tally = Tally(tools.clock, job.progress.done_units, job.progress.done_bytes)

    async def work(self) -> bool:
        """Until no volume of the old scheme is left that is to go; nodes never leave by this."""
        while True:
            plan = await self._plan()
            waits = self._request.for_new and bool(plan.blocked)
            if not plan.volumes and not waits:
                await self._finish()
                return False
            moved = False
            for volume_id in plan.volumes:
                moved |= await self._volume(volume_id)
            if not moved:
                await self._tools.clock.sleep(RETRY_S)

    async def show(self) -> None:
        """Note how far it is."""
        progress = self._tally.progress(self._detail())
        await self._tools.lead(
            lambda connection: report_progress(connection, self._job.job_id, progress)
        )

    def _detail(self) -> str:
        blocked = len(self._tally.blockers)
        return f"{blocked} volumes get no further" if blocked else ""

    async def _plan(self) -> TranscodePlan:
        view, busy = await self._tools.db.read(requests.read_cell)
        plan = await self._tools.run(requests.plan_request, view, self._request, busy)
        assert isinstance(plan, TranscodePlan)
        self._tally.left_units, self._tally.left_bytes = plan.units, plan.bytes
        self._tally.made_bytes = 0
        if self._request.for_new:
            self._tally.blockers = {
                blocked.volume: Blocker(str(blocked.volume), blocked.reason)
                for blocked in plan.blocked
            }
        await self.show()
        return plan

    async def _finish(self) -> None:
        now = self._tools.clock.wall()
        progress = self._tally.progress("")

        def work(connection: Connection) -> None:
            report_progress(connection, self._job.job_id, progress)
            change_job(connection, self._job.job_id, JobEvent.FINISH, now)

        await self._tools.lead(work)

    async def _volume(self, volume_id: VolumeId) -> bool:
        """One volume's blocks, group by group; whether any moved."""
        volume = await self._tools.db.read(lambda connection: _sealed(connection, volume_id))
        if volume is None:
            return True  # emptied meanwhile
        before = self._tally.done_bytes
        parts = self._parts
        rows = await volume_rows(parts.index, self._tools.db, parts.pool, volume, INVENTORY_S)
        moved = 0
        failed: dict[BlockHash, str] = {}
        for group in _groups(rows):
            count, errors = await self._group(group)
            moved += count
            failed |= errors
        now = self._tools.clock.wall()
        gone = await self._tools.lead(
            lambda connection: _remove_if_empty(connection, volume_id, now)
        )
        if gone:
            self._tally.done_bytes = before
            self._tally.finished(1, volume.stored_bytes)
            self._tally.blockers.pop(volume_id, None)
        elif failed:
            self._tally.blockers[volume_id] = Blocker(
                str(volume_id),
                next(iter(failed.values())),
                tuple(str(block) for block in list(failed)[:20]),
            )
        self._tally.made_bytes = 0
        return gone or moved > 0

    async def _group(self, rows: Sequence[BlockRow]) -> tuple[int, Mapping[BlockHash, str]]:
        """Read, write, verify, move; how many moved, and why others did not."""
        failed: dict[BlockHash, str] = {}
        found = await self._parts.client.get_many([row.hash for row in rows])
        pending: list[PendingBlock] = []
        going: list[BlockRow] = []
        for row, plain in zip(rows, found, strict=True):
            if isinstance(plain, BlockNotFound):
                continue  # deleted since
            if isinstance(plain, HaversackError):
                failed[row.hash] = plain.message
                continue
            pending.append(PendingBlock(0, row.hash, (plain,), row.plain_bytes))
            going.append(row)
        wrong = await self._tools.run(_wrong, pending)
        assert not wrong, f"the get path gave other bytes than {wrong}"
        if not pending:
            return 0, failed
        self._relocator.expect(going)
        results: dict[BlockHash, PutResult | HaversackError] = {}
        await self._put_path.store(self._scheme, pending, results.__setitem__)
        for block, result in results.items():
            if isinstance(result, HaversackError):
                if not isinstance(result, RetryLater):
                    raise result
                failed[block] = result.message
        moved = self._relocator.moved
        self._tally.made_bytes += sum(row.stored_bytes for row in going if row.hash not in failed)
        return moved, failed

    @property
    def _scheme(self) -> Scheme:
        assert self._request.target_scheme is not None
        return self._request.target_scheme


def _wrong(pending: Sequence[PendingBlock]) -> list[BlockHash]:
    """Blocks whose bytes are not what their name says."""
    return [item.block for item in pending if hash_block(_only(item.parts)) != item.block]


def _only(parts: Sequence[Buffer]) -> Buffer:
    (part,) = parts
    return part


def _groups(rows: Sequence[BlockRow]) -> list[list[BlockRow]]:
    """Runs of blocks of at most `GROUP_BYTES` and `GROUP_BLOCKS`."""
    groups: list[list[BlockRow]] = []
    size = 0
    for row in rows:
        if not groups or size + row.plain_bytes > GROUP_BYTES or len(groups[-1]) >= GROUP_BLOCKS:
            groups.append([])
            size = 0
        groups[-1].append(row)
        size += row.plain_bytes
    return groups


# -- SQL -------------------------------------------------------------------------------------------


def _sealed(connection: Connection, volume_id: VolumeId) -> VolumeView | None:
    found = map_rows.read_volumes(connection, [volume_id])
    if not found or found[0].state is not VolumeState.SEALED:
        return None
    return found[0]


def _take_row(connection: Connection, entry: NewBlock, old: VolumeId) -> bool:
    """Let a block's row name its new volume, if it still names the old one."""
    changed = connection.execute(
        update(blocks)
        .where(blocks.c.hash == entry.hash, blocks.c.volume_id == int(old), blocks.c.state == LIVE)
        .values(volume_id=int(entry.volume), stored_bytes=entry.stored_bytes)
    )
    return bool(changed.rowcount)


def _growths(moved: Sequence[_Moved]) -> list[Growth]:
    """What the volumes that blocks left lose, and the others gain.

    The stored lengths differ if compression or encryption were set otherwise before.
    """
    sums: dict[VolumeId, list[int]] = {}
    for old, new in moved:
        for volume, sign, stored in (
            (old.volume, -1, old.stored_bytes),
            (new.volume, 1, new.stored_bytes),
        ):
            total = sums.setdefault(volume, [0, 0, 0])
            total[0] += sign
            total[1] += sign * stored
            total[2] += sign * old.plain_bytes
    return [Growth(volume, *sums[volume]) for volume in sorted(sums)]


def _forget(connection: Connection, volume: VolumeId, hashes: Sequence[BlockHash]) -> None:
    """What was owed in the old volume is not owed any more."""
    for table in (debts, unrepairable):
        connection.execute(
            delete(table).where(
                table.c.volume_id == int(volume), table.c.hash == bindparam("block")
            ),
            [{"block": bytes(block)} for block in hashes],
        )


def _remove_if_empty(connection: Connection, volume_id: VolumeId, now: float) -> bool:
    """Remove the row of a sealed volume without blocks; whether it is gone.

    A put that is under way to it finds no row and is fenced.
    """
    row = connection.execute(
        select(volumes.c.blocks, volumes.c.state)
        .where(volumes.c.volume_id == int(volume_id))
        .with_for_update()
    ).one_or_none()
    if row is None:
        return True
    if row.blocks or row.state != VolumeState.SEALED.value:
        return False
    map_rows.next_version(connection)
    for table in (slot_moves, debts, volume_slots, volumes):
        connection.execute(delete(table).where(table.c.volume_id == int(volume_id)))
    record_event(connection, now, EventKind.VOLUME_REMOVED, volume_id, "its blocks were transcoded")
    return True
