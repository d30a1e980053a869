"""Carries out moves and repays debts: begin, copy, verify, publish (`docs/design/013-healing.md`).

Called by `service` for repair and by jobs (drain, rebalance, replace), which differ in who plans
and in where bytes come from.  Talks to nodes through `NodePool` and to SQL through transactions
that only the holder of the repair role may make (`lead`).  May not import Ray.

The rows of `slot_moves` and what verifies on the targets are the only state: whoever is killed at
any step leaves nothing else behind, and `run` with the same moves goes on from there.  Work may be
cancelled at any time.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import structlog
from sqlalchemy import Connection

from cluster import map_rows
from cluster.block_index import BlockIndex, BlockRow
from cluster.block_sql import Debt
from cluster.debts import DebtReason, OwedFragment, read_debts, record_debts, repay_debts
from cluster.events import EventKind, record_event
from cluster.move_rows import (
    NewMove,
    Verified,
    abandon_moves,
    begin_moves,
    incarnations_hold,
    publish_moves,
)
from cluster.repair import repair_rows
from cluster.repair.plan import SlotMove, VolumeRepair
from cluster.repair.volume_blocks import volume_rows
from cluster.repair.volume_run import (
    Making,
    Outcome,
    Progress,
    RunTools,
    TargetUnfit,
    VolumeRun,
)
from cluster.topology import NodeState, VolumeView
from cluster.verify.stray_rows import may_receive
from cluster.volume_map import VolumeMap
from protocol.clock import Clock
from protocol.errors import DatabaseBusy, HaversackError, NodeUnavailable, NotLeader
from protocol.ids import BlockHash, NodeId, VolumeId
from sql.database import Database

T = TypeVar("T")

log = structlog.get_logger()


class Lead(Protocol):
    """A transaction that only the holder of the role may make.  Raises `NotLeader`."""

    def __call__(self, work: Callable[[Connection], T]) -> Awaitable[T]: ...


class RunState(enum.Enum):
    """How the work on one volume ended."""

    DONE = "done"
    """Every slot was made, verified and published, every debt repaid, but for blocks in `lost`."""
    PARTIAL = "partial"
    """Some blocks could not be made, and their slots are kept where they are: nodes that do not
    answer now may do so later, a disk that is away may come back."""
    MOVED_ON = "moved on"
    """The map changed under the work: plan again."""
    UNFIT = "unfit"
    """A target does not take or keep records: plan another."""


@dataclass(frozen=True, slots=True)
class VolumeResult:
    """What came of the work on one volume."""

    volume: VolumeId
    state: RunState
    made_fragments: int = 0
    made_bytes: int = 0
    repaid: int = 0
    lost: Mapping[BlockHash, str] | None = None
    """Blocks that cannot be made, and why."""
    postponed: Mapping[BlockHash, str] | None = None
    """Blocks that could not be made now, and why."""
    unfit: NodeId | None = None
    detail: str = ""


def no_progress(_fragments: int, _bytes: int) -> None:
    """For callers that do not show any."""


class RepairExecutor:
    """One per process that holds the repair role.  One event loop."""

    def __init__(
        self,
        db: Database,
        index: BlockIndex,
        volume_map: VolumeMap,
        tools: RunTools,
        clock: Clock,
        lead: Lead,
    ) -> None:
        self._db = db
        self._index = index
        self._map = volume_map
        self._tools = tools
        self._clock = clock
        self._lead = lead
        self._locks: dict[VolumeId, asyncio.Lock] = {}

    async def run(
        self, moves: Iterable[SlotMove], progress: Progress = no_progress
    ) -> list[VolumeResult]:
        """Carry out moves, those of one volume together, some volumes at a time; one result each.

        Never raises for what nodes do.  Raises `NotLeader` and `DatabaseBusy`; whatever was made
        stays, and another call with the same moves goes on from there.
        """
        grouped: dict[VolumeId, list[SlotMove]] = {}
        for move in moves:
            grouped.setdefault(move.volume, []).append(move)
        turns = asyncio.Semaphore(self._tools.settings.volumes_at_once)

        async def one(volume: VolumeId, mine: list[SlotMove]) -> VolumeResult:
            async with turns:
                return await self.repair(volume, mine, (), progress)

        return await _all(one(volume, mine) for volume, mine in grouped.items())

    async def repair_all(
        self, repairs: Sequence[VolumeRepair], progress: Progress = no_progress
    ) -> list[VolumeResult]:
        """Carry out a plan's repairs in order, some volumes at a time.  Raises as `run`."""
        turns = asyncio.Semaphore(self._tools.settings.volumes_at_once)

        async def one(item: VolumeRepair) -> VolumeResult:
            async with turns:
                return await self.repair(item.volume, item.moves, item.debts, progress)

        return await _all(one(item) for item in repairs)

    async def abandon(self, slots: Sequence[tuple[VolumeId, int]]) -> None:
        """Forget moves that nobody needs any more."""

        def work(connection: Connection) -> None:
            abandon_moves(connection, slots)
            for volume, slot in slots:
                detail = f"slot {slot}: not needed any more"
                record_event(connection, self._clock.wall(), EventKind.MOVE_ENDED, volume, detail)

        await self._lead(work)

    async def repair(
        self,
        volume_id: VolumeId,
        moves: Sequence[SlotMove],
        debts: Sequence[int],
        progress: Progress = no_progress,
    ) -> VolumeResult:
        """All that one volume needs: its moves, and the debts of these slots."""
        async with self._alone(volume_id):
            try:
                return await self._repair(volume_id, moves, debts, progress)
            except TargetUnfit as error:
                return VolumeResult(
                    volume_id, RunState.UNFIT, unfit=error.node_id, detail=str(error)
                )
            except (NotLeader, DatabaseBusy):
                raise
            except HaversackError as error:
                return VolumeResult(volume_id, RunState.MOVED_ON, detail=error.message)

    @contextlib.asynccontextmanager
    async def _alone(self, volume_id: VolumeId) -> AsyncIterator[None]:
        """One piece of work per volume at a time."""
        lock = self._locks.setdefault(volume_id, asyncio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.locked() and self._locks.get(volume_id) is lock:
                del self._locks[volume_id]

    async def _repair(
        self,
        volume_id: VolumeId,
        moves: Sequence[SlotMove],
        debts: Sequence[int],
        progress: Progress,
    ) -> VolumeResult:
        volume = await self._begin(volume_id, moves)
        if volume is None:
            return VolumeResult(volume_id, RunState.MOVED_ON, detail="planned for another map")
        await self._map.refresh()
        owed = await self._db.read(
            lambda connection: read_debts(
                connection, volume_id, self._tools.settings.debts_per_volume
            )
        )
        rows = await self._rows(volume, moves, debts, owed)
        makings = self._makings(volume, moves, debts, owed)
        run = VolumeRun(
            self._tools,
            volume,
            makings,
            rows,
            _bad_slots(owed),
            self._readable(volume, moves),
            progress,
        )
        try:
            outcome = await run.run()
        finally:
            await self._note_found(run.outcome)
        return await self._finish(volume, makings, rows, owed, outcome)

    async def _begin(self, volume_id: VolumeId, moves: Sequence[SlotMove]) -> VolumeView | None:
        """Step 2 of a move; for debts alone, just the volume."""
        if not moves:
            return await self._db.read(lambda connection: _read_volume(connection, volume_id))
        new = [
            NewMove(move.slot, move.source, move.target, move.reason, move.job_id) for move in moves
        ]
        now = self._clock.wall()
        fade_s = self._tools.settings.delete_fade_s

        def work(connection: Connection) -> VolumeView | None:
            for move in new:
                if not may_receive(connection, move.target, volume_id, move.slot, now - fade_s):
                    raise TargetUnfit(
                        move.target, f"a delete of slot {move.slot} may still be under way there"
                    )
            before = _read_volume(connection, volume_id)
            volume = begin_moves(connection, volume_id, new, now)
            if volume is not None and before is not None and volume.epoch != before.epoch:
                for move in new:
                    detail = f"slot {move.slot} to {move.target}: {move.reason}"
                    record_event(connection, now, EventKind.MOVE_BEGUN, volume_id, detail)
            return volume

        return await self._lead(work)

    async def _rows(
        self,
        volume: VolumeView,
        moves: Sequence[SlotMove],
        debts: Sequence[int],
        owed: Sequence[OwedFragment],
    ) -> list[BlockRow]:
        """Blocks to work on: all of the volume for a move, those that owe for debts."""
        if moves:
            return await volume_rows(
                self._index, self._db, self._tools.pool, volume, self._tools.settings.call_s
            )
        hashes = sorted({item.hash for item in owed if item.slot in debts})
        found = await self._index.lookup(hashes) if hashes else {}
        return [
            found[block]
            for block in hashes
            if block in found and found[block].volume == volume.volume_id
        ]

    def _makings(
        self,
        volume: VolumeView,
        moves: Sequence[SlotMove],
        debts: Sequence[int],
        owed: Sequence[OwedFragment],
    ) -> list[Making]:
        makings = []
        moving = set()
        for move in moves:
            incarnation = self._map.node(move.target).incarnation
            makings.append(Making(move.slot, move.target, incarnation, move.source))
            moving.add(move.slot)
        for slot in debts:
            holder = volume.slots[slot]
            if slot in moving or holder is None:
                continue
            only = {item.hash: item.reason for item in owed if item.slot == slot}
            makings.append(Making(slot, holder, self._map.node(holder).incarnation, only=only))
        return makings

    def _readable(self, volume: VolumeView, moves: Sequence[SlotMove]) -> dict[int, NodeId]:
        """Slots that can be read: not those whose fragments are lost."""
        lost = {move.slot for move in moves if move.source is None}
        readable: dict[int, NodeId] = {}
        for slot, node_id in enumerate(volume.slots):
            if node_id is None or slot in lost:
                continue
            with contextlib.suppress(NodeUnavailable):  # not in our map: cannot be reached
                if self._map.node(node_id).state is not NodeState.GONE:
                    readable[slot] = node_id
        return readable

    # -- the end of a run --------------------------------------------------------------------------

    async def _note_found(self, outcome: Outcome) -> None:
        """Bad fragments that were met on the way are debts of their slots."""
        if not outcome.found:
            return
        now = self._clock.wall()

        def work(connection: Connection) -> None:
            for reason in DebtReason:
                rows = [debt for debt, why in outcome.found.items() if why is reason]
                record_debts(connection, rows, now, reason)

        await self._lead(work)

    def _may_publish(self, volume: VolumeView, making: Making, outcome: Outcome) -> bool:
        """Whether a slot may change hands.  One that lacks blocks may not while the disk that held
        it may come back with them: it may be the last to hold their fragments.  A disk that calls
        itself bad is no exception: what it still reads is whole."""
        if outcome.postponed:
            return False
        holder = volume.slots[making.slot]
        if not outcome.lost or holder is None:
            return True
        if making.source is not None:
            return False
        node = self._map.node(holder)
        away_s = self._clock.wall() - node.state_since
        patience_s = self._tools.settings.last_fragment_wait_s
        return node.state is NodeState.GONE or away_s >= patience_s

    async def _finish(
        self,
        volume: VolumeView,
        makings: Sequence[Making],
        rows: Sequence[BlockRow],
        owed: Sequence[OwedFragment],
        outcome: Outcome,
    ) -> VolumeResult:
        """Step 5: publish moves, strike out debts, list what cannot be made."""
        moved = [making for making in makings if making.only is None]
        in_place = [making for making in makings if making.only is not None]
        ready = [making for making in moved if self._may_publish(volume, making, outcome)]
        held_back = len(ready) < len(moved)
        repaid = _repaid(volume, in_place, rows, outcome, owed)
        verified = _verified(ready, rows, outcome)
        failed = {**outcome.postponed, **outcome.lost}
        now = self._clock.wall()
        worked = [row.hash for row in rows]

        def work(connection: Connection) -> tuple[bool, int]:
            lives = {making.node: making.incarnation for making in in_place}
            struck = 0
            if incarnations_hold(connection, lives):
                struck = repay_debts(connection, repaid, {volume.volume_id: volume.epoch})
            repair_rows.save_unrepairable(connection, volume.volume_id, worked, failed, now)
            if not verified:
                return not moved, struck
            done = publish_moves(connection, volume.volume_id, volume.epoch, verified, now)
            if done:
                for item in verified:
                    detail = f"slot {item.slot} is on {item.target}"
                    record_event(
                        connection, now, EventKind.MOVE_PUBLISHED, volume.volume_id, detail
                    )
            return done, struck

        done, struck = await self._lead(work)
        state = RunState.DONE if done else RunState.MOVED_ON
        return VolumeResult(
            volume.volume_id,
            RunState.PARTIAL if held_back else state,
            outcome.made_fragments,
            outcome.made_bytes,
            struck,
            outcome.lost,
            outcome.postponed,
        )


def _read_volume(connection: Connection, volume_id: VolumeId) -> VolumeView | None:
    found = map_rows.read_volumes(connection, [volume_id])
    return found[0] if found else None


def _bad_slots(owed: Sequence[OwedFragment]) -> dict[BlockHash, set[int]]:
    """Slots whose record is wrong or gone.  One that a disk could not read once may be the last
    good one: it is asked like any other."""
    bad: dict[BlockHash, set[int]] = {}
    for item in owed:
        if item.reason is not DebtReason.UNREADABLE:
            bad.setdefault(item.hash, set()).add(item.slot)
    return bad


def _verified(
    moved: Sequence[Making], rows: Sequence[BlockRow], outcome: Outcome
) -> list[Verified]:
    """Whole slots: every block was verified, or cannot be made from anything."""
    whole = []
    for making in moved:
        missing = {row.hash for row in rows} - outcome.verified[making.slot]
        assert missing <= outcome.lost.keys(), "a slot is published that nobody verified"
        whole.append(Verified(making.slot, making.node, making.incarnation, tuple(sorted(missing))))
    return whole


def _repaid(
    volume: VolumeView,
    in_place: Sequence[Making],
    rows: Sequence[BlockRow],
    outcome: Outcome,
    owed: Sequence[OwedFragment],
) -> list[Debt]:
    """Debts whose fragment was verified, and those of blocks that are gone."""
    alive = {row.hash for row in rows}
    slots = {making.slot: outcome.verified[making.slot] for making in in_place}
    return [
        Debt(volume.volume_id, item.slot, item.hash)
        for item in owed
        if item.slot in slots and (item.hash in slots[item.slot] or item.hash not in alive)
    ]


async def _all(works: Iterable[Any]) -> list[VolumeResult]:
    """All of them at once; the first error ends the others and is raised as it is."""
    tasks: list[asyncio.Task[VolumeResult]] = []
    try:
        async with asyncio.TaskGroup() as group:
            tasks.extend(group.create_task(work) for work in works)
    except* HaversackError as errors:
        error: BaseException = errors
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None
    return [task.result() for task in tasks]
