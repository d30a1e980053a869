"""Planted defects, one class each, to show that the simulation finds them.

Each is the product's class with one promise broken, the way a tired person would break it.  Only
`tests/sim/test_checkers_bite.py` uses them.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import random
import sqlite3
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from sqlalchemy import Connection

from cluster import map_rows
from cluster.block_client import BlockClient
from cluster.block_client_settings import FragmentProblem
from cluster.block_index import BlockIndex, NewBlock, RecordOutcome
from cluster.change.plans import Plan
from cluster.change.requests import ChangeRequest, preview
from cluster.members import begin_drain
from cluster.node_pool import NodePool
from cluster.placement import OpenVolumesPlan, StockTarget, plan_volumes
from cluster.placement_service import PlacementService
from cluster.repair.volume_run import VolumeRun
from cluster.topology import CellView, NodeEvent, NodeState, NodeView
from metadata.accounts import Account
from metadata.batch import CommitResult
from metadata.changes import CommitRequest
from metadata.tree import Tree
from protocol.errors import (
    BlockUnreadable,
    DatabaseBusy,
    EntryNotFound,
    HaversackError,
    NodeUnavailable,
    UnknownOutcome,
)
from protocol.hashing import Buffer
from protocol.ids import BlockHash, NodeId
from protocol.messages import ItemStatus, LeaseReply, PutPurpose, SummaryReply
from storage_node.interface import FragmentKey, PutOutcome, StoredRecord
from storage_node.memory_store import Disk, MemoryStore
from storage_node.node import StorageNode


class AcksBeforeDurable(MemoryStore):
    """Writes reach the disk with the next write, after they were acknowledged."""

    def __init__(self, disk: Disk) -> None:
        super().__init__(disk)
        self._buffered: Sequence[tuple[FragmentKey, Buffer]] = ()

    def put_group(
        self,
        records: Sequence[tuple[FragmentKey, Buffer]],
        purpose: PutPurpose = PutPurpose.CLIENT,
    ) -> None:
        super().put_group(self._buffered, purpose)
        self._buffered = [(key, bytes(record)) for key, record in records]


class NeverSyncs(MemoryStore):
    """Records are there until the process dies: written, never synced."""

    unsynced: dict[int, list[bytes]] = {}  # noqa: RUF012 - what the page caches of all disks hold

    def __init__(self, disk: Disk) -> None:
        super().__init__(disk)
        for key in self.unsynced.pop(id(disk), []):
            disk._remove(key)

    def put_group(
        self,
        records: Sequence[tuple[FragmentKey, Buffer]],
        purpose: PutPurpose = PutPurpose.CLIENT,
    ) -> None:
        super().put_group(records, purpose)
        self.unsynced.setdefault(id(self._disk), []).extend(key.pack() for key, _ in records)

    def close(self) -> None:
        self.unsynced.pop(id(self._disk), None)
        super().close()


class NeverTrustsAgain(NodePool):
    """A node that failed a write once is not written to again."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._banned: dict[NodeId, None] = {}

    async def write(
        self,
        node_id: NodeId,
        incarnation: int,
        records: Sequence[Sequence[Buffer]],
        deadline_s: float,
    ) -> PutOutcome:
        if node_id in self._banned:
            raise NodeUnavailable(f"{node_id} failed before")
        try:
            return await super().write(node_id, incarnation, records, deadline_s)
        except HaversackError:
            self._banned[node_id] = None
            raise


class IgnoresIncarnation(StorageNode):
    """Takes writes meant for another of its lives."""

    def _admit_write(self, incarnation: int) -> None:
        super()._admit_write(self.incarnation)

    def _admit_answer(self, incarnation: int) -> None:
        super()._admit_answer(self.incarnation)


class IgnoresLease(StorageNode):
    """Once leased, leased for ever."""

    async def lease(self, incarnation: int, lease_s: float) -> LeaseReply:
        return await super().lease(incarnation, math.inf)


class DividesByZero(StorageNode):
    """A bug that is no declared error."""

    async def summary(self) -> SummaryReply:
        raise ZeroDivisionError


class CountsSends(NodePool):
    """Takes a request that was sent for one that was carried out."""

    async def write(
        self,
        node_id: NodeId,
        incarnation: int,
        records: Sequence[Sequence[Buffer]],
        deadline_s: float,
    ) -> PutOutcome:
        try:
            return await super().write(node_id, incarnation, records, deadline_s)
        except UnknownOutcome:
            return PutOutcome(incarnation, [ItemStatus.OK] * len(records))


class WaitsForEver(NodePool):
    """Asks again until the node answers, without looking at the clock."""

    async def write(
        self,
        node_id: NodeId,
        incarnation: int,
        records: Sequence[Sequence[Buffer]],
        deadline_s: float,
    ) -> PutOutcome:
        while True:
            try:
                return await super().write(node_id, incarnation, records, deadline_s)
            except NodeUnavailable:
                await asyncio.sleep(1.0)


class NeverForgives(NodePool):
    """A node that failed once is not read from again."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._banned: dict[NodeId, None] = {}

    async def read(
        self, node_id: NodeId, keys: Sequence[FragmentKey], expected_bytes: int, deadline_s: float
    ) -> list[StoredRecord]:
        if node_id in self._banned:
            raise NodeUnavailable(f"{node_id} failed before")
        try:
            return await super().read(node_id, keys, expected_bytes, deadline_s)
        except HaversackError:
            self._banned[node_id] = None
            raise


class ForgetsDebts(BlockIndex):
    """Records a degraded block as if it were whole."""

    def _insert(self, connection: Connection, rows: list[NewBlock], now: float) -> set[BlockHash]:
        whole = [row._replace(missing_slots=()) for row in rows]
        return super()._insert(connection, whole, now)


class TakesUnknownForSuccess(BlockIndex):
    """A lost answer of the database is good news."""

    async def record_puts(self, entries: Sequence[NewBlock]) -> list[RecordOutcome]:
        try:
            return await super().record_puts(entries)
        except UnknownOutcome:
            return [RecordOutcome.NEW] * len(entries)


class TakesUnknownForFailure(BlockIndex):
    """A lost answer of the database means that nothing was done."""

    async def record_puts(self, entries: Sequence[NewBlock]) -> list[RecordOutcome]:
        try:
            return await super().record_puts(entries)
        except UnknownOutcome as error:
            raise DatabaseBusy("nothing was done") from error


class ServesOldBytes(BlockClient):
    """Now and then the buffer of another read goes out."""

    _last: Buffer = b""

    async def get(self, block: BlockHash) -> Buffer:
        data = await super().get(block)
        last, self._last = self._last, data
        return last if len(last) == len(data) > 100 else data


class GivesUpOnParity(BlockClient):
    """A read that met damage is an error, although the parity is there."""

    def __init__(self, *args: Any) -> None:
        *others, report = args

        def note(problem: FragmentProblem) -> None:
            self._problems.append(problem)
            report(problem)

        self._problems: list[FragmentProblem] = []
        super().__init__(*others, note)

    async def get(self, block: BlockHash) -> Buffer:
        before = len(self._problems)
        data = await super().get(block)
        if len(self._problems) > before:
            raise BlockUnreadable("a fragment was bad")
        return data


class TrustsTheHash(Tree):
    """Whoever knows a hash may reference it."""

    async def commit(
        self, account: Account, request: CommitRequest, claimed: AbstractSet[BlockHash]
    ) -> CommitResult:
        return await super().commit(account, request, frozenset(request.block_list or ()))


class IgnoresClaims(Tree):
    """Only what the namespace references already may be referenced."""

    async def commit(
        self, account: Account, request: CommitRequest, claimed: AbstractSet[BlockHash]
    ) -> CommitResult:
        return await super().commit(account, request, frozenset())


class LastWriterWins(Tree):
    """Overwrites whatever is there."""

    async def commit(
        self, account: Account, request: CommitRequest, claimed: AbstractSet[BlockHash]
    ) -> CommitResult:
        try:
            current = (await self.entry(account, request.path)).rev
        except EntryNotFound:
            current = None
        forced = dataclasses.replace(request, parent_rev=current)
        return await super().commit(account, forced, claimed)


class AcksBeforeCommit(Tree):
    """Answers a commit that fails as if it had been made."""

    async def commit(
        self, account: Account, request: CommitRequest, claimed: AbstractSet[BlockHash]
    ) -> CommitResult:
        try:
            return await super().commit(account, request, claimed)
        except (DatabaseBusy, UnknownOutcome):
            entry = await self.entry(account, request.path)
            return CommitResult(entry._replace(rev="0" * 16), created=True)


async def counts_sent_fragments(self: VolumeRun) -> None:
    """`VolumeRun._verify_made`: what was sent is there."""
    for slot, block in self._tags:
        self.outcome.verified[slot].add(block)
    self._tags.clear()


async def believes_debts_repaid(self: VolumeRun) -> None:
    """`VolumeRun._look_at_targets`: what is owed has surely arrived by now."""
    for slot, making in self._makings.items():
        self.outcome.verified[slot].update(making.only or ())


def drains_at_once(connection: Connection, node_id: NodeId, now: float, why: str) -> NodeView:
    """`begin_drain` for which a node is empty as soon as somebody wants it to be."""
    view = begin_drain(connection, node_id, now, why)
    version = map_rows.next_version(connection)
    map_rows.set_node_state(connection, node_id, NodeState.DRAINED, now, why, version)
    return view


def sets_nothing_aside(_scrubber: Any, _groups: Any) -> int:
    """`Scrubber._set_aside`: reads everything and tells nobody."""
    return 0


def previews_by_writing(connection: Connection, request: ChangeRequest) -> Plan:
    """A preview that changes the map."""
    path = connection.engine.url.database
    assert path is not None
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("UPDATE map_version SET version = version + 1")
        other.commit()
    return preview(connection, request)


def opens_on_one_node_twice(
    view: CellView, targets: Sequence[StockTarget], rng: random.Random
) -> OpenVolumesPlan:
    """`plan_volumes` that lets a node hold two slots."""
    plan = plan_volumes(view, targets, rng)
    openings = tuple(
        dataclasses.replace(opening, slots=(opening.slots[1], *opening.slots[1:]))
        for opening in plan.openings
    )
    return dataclasses.replace(plan, openings=openings)


class NeverWelcomesBack(PlacementService):
    """A node that was down stays down."""

    def _heard(self) -> Any:
        change = super()._heard()
        kept = {
            node: event for node, event in change.events.items() if not self._came_back(node, event)
        }
        return dataclasses.replace(change, events=kept)

    def _came_back(self, node: NodeId, event: tuple[NodeEvent, str]) -> bool:
        states = {view.node_id: view.state for view in self._started().views()}
        return event[0] is NodeEvent.ANSWERED and states[node] == "down"
