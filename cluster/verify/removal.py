"""Removal of strays: a frozen plan, and its execution.

Planning reads SQL and has nodes verify records; it changes nothing (`--dry-run` stops there).  A
fragment is planned for removal only if it has been known as a stray for the grace period and

* an **orphan**: a fresh read finds no row of its block in its volume, and the volume takes no more
  puts: it is sealed, or gone;
* **stale**: the slot's holder has just read its own record, whole, of the right length and of the
  same seal.  A misplaced fragment whose slot lacks a good one is kept: repair can use it.

Execution repeats the SQL half in a transaction before each delete.  That transaction fences:

* it raises the epoch of the orphan's volume, so that a put that is still under way is refused its
  row from then on;
* it marks the strays as being removed: no move begins to make fragments where a delete may still
  arrive (`stray_rows.may_receive`), and none that has begun is interfered with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from sqlalchemy import Connection, update

from cluster import map_rows
from cluster.events import EventKind, record_event
from cluster.schema import volumes
from cluster.topology import VolumeState
from cluster.verify.differences import Difference
from cluster.verify.index_scan import Truth, read_truth
from cluster.verify.lead import Lead
from cluster.verify.node_ports import NodePorts
from cluster.verify.settings import VerifierSettings
from cluster.verify.stray_rows import StrayRow, forget_strays, mark_removing, page_strays
from erasure.fragment import FRAGMENT_HEADER_BYTES
from protocol.clock import Clock
from protocol.errors import HaversackError, UnknownOutcome
from protocol.ids import NodeId, VolumeId
from protocol.messages import ItemStatus
from storage_node.interface import FragmentKey, VerifiedRecord

_Place = tuple[NodeId, FragmentKey]


class StrayRemoval(NamedTuple):
    """One fragment to be deleted."""

    stray: StrayRow
    difference: Difference
    """`ORPHAN` or `STALE`, as of the planning."""
    incarnation: int
    """Life of the node that the plan was made for."""
    holder: NodeId | None
    """Who was verified to have a stale one's slot, and in which life."""
    holder_incarnation: int


class Verdict(NamedTuple):
    """What SQL says of a stray now."""

    keep: str = ""
    """Why it is kept; empty if it may go, or may go if `holder` is verified."""
    holder: NodeId | None = None
    """Who has the slot of a stale one; None for an orphan."""


@dataclass(frozen=True, slots=True)
class RemovalPlan:
    """What would be deleted, and why the rest is kept."""

    removals: tuple[StrayRemoval, ...]
    kept: tuple[tuple[str, int], ...]
    """Reason and number, by reason."""
    more: bool
    """Whether there are strays of that age beyond what one plan holds."""

    def to_json(self, examples_max: int) -> dict[str, Any]:
        """For people and scripts."""
        counts = Counter(removal.difference.value for removal in self.removals)
        return {
            "planned": dict(sorted(counts.items())),
            "planned_bytes": sum(removal.stray.length for removal in self.removals),
            "kept": dict(self.kept),
            "more": self.more,
            "examples": [
                {
                    "node": removal.stray.node,
                    "volume": str(removal.stray.key.volume),
                    "block": str(removal.stray.key.block),
                    "slot": removal.stray.key.slot,
                    "kind": removal.difference.value,
                }
                for removal in self.removals[:examples_max]
            ],
        }


@dataclass(slots=True)
class RemovalOutcome:
    """What became of a plan."""

    removed: int = 0
    removed_bytes: int = 0
    skipped: int = 0
    """No longer to be removed when their turn came."""
    unknown: int = 0
    """Deletes without an answer: the next pass sees whether they are gone."""
    failed: int = 0

    def to_json(self) -> dict[str, int]:
        """All of it."""
        return {
            "removed": self.removed,
            "removed_bytes": self.removed_bytes,
            "skipped": self.skipped,
            "unknown": self.unknown,
            "failed": self.failed,
        }


class StrayRemover:
    """Plans and carries out.  One event loop."""

    def __init__(
        self, lead: Lead, clock: Clock, ports: NodePorts, settings: VerifierSettings
    ) -> None:
        self._lead = lead
        self._clock = clock
        self._ports = ports
        self._settings = settings

    # -- deciding ------------------------------------------------------------------------------

    async def plan(self) -> RemovalPlan:
        """Decide; changes nothing.  Raises `DatabaseBusy`."""
        await self._ports.adopt(await self._lead.db.read(map_rows.read_nodes))
        old = (float("-inf"), self._clock.wall() - self._settings.grace_s)
        removals: list[StrayRemoval] = []
        kept: Counter[str] = Counter()
        after: _Place | None = None
        while len(removals) < self._settings.removal_max:
            page = await self._lead.db.read(
                partial(
                    page_strays, after=after, limit=self._settings.removal_batch, first_seen=old
                )
            )
            if not page:
                break
            after = page[-1].place
            removals += await self._decide(page, kept)
        more = len(removals) >= self._settings.removal_max
        return RemovalPlan(tuple(removals), tuple(sorted(kept.items())), more)

    async def _decide(self, page: Sequence[StrayRow], kept: Counter[str]) -> list[StrayRemoval]:
        truth = await self._lead.db.read(partial(read_truth, keys=[row.key for row in page]))
        removals: list[StrayRemoval] = []
        stale: list[tuple[StrayRow, NodeId]] = []
        for row in page:
            verdict = judge_stray(row, truth)
            if verdict.keep:
                kept[verdict.keep] += 1
            elif verdict.holder is None:
                removals.append(self._removal(row, Difference.ORPHAN, None))
            else:
                stale.append((row, verdict.holder))
        answers = await self._verify(
            [(row.node, row.key) for row, _ in stale] + [(node, row.key) for row, node in stale]
        )
        for row, holder in stale:
            reason = _why_keep(row, truth, answers.get(row.place), answers.get((holder, row.key)))
            if reason:
                kept[reason] += 1
            else:
                removals.append(self._removal(row, Difference.STALE, holder))
        return removals

    def _removal(
        self, row: StrayRow, difference: Difference, holder: NodeId | None
    ) -> StrayRemoval:
        of_holder = 0 if holder is None else self._ports.incarnation(holder)
        incarnation = self._ports.incarnation(row.node)
        return StrayRemoval(row, difference, incarnation, holder, of_holder)

    async def _verify(self, places: Sequence[_Place]) -> dict[_Place, VerifiedRecord]:
        """What nodes find on their disks; those that do not answer are left out."""
        wanted: dict[NodeId, list[FragmentKey]] = {}
        for node, key in places:
            wanted.setdefault(node, []).append(key)
        found: dict[_Place, VerifiedRecord] = {}
        for node, keys in sorted(wanted.items()):
            try:
                answers = await self._ports.verify(node, keys)
            except HaversackError:
                continue  # unanswered is a reason to keep, told as such
            found.update(zip([(node, key) for key in keys], answers, strict=True))
        return found

    # -- doing ---------------------------------------------------------------------------------

    async def execute(self, plan: RemovalPlan) -> RemovalOutcome:
        """Delete what still may be deleted.  Raises `NotLeader`, `DatabaseBusy`."""
        outcome = RemovalOutcome()
        step = self._settings.removal_batch
        for start in range(0, len(plan.removals), step):
            await self._remove(plan.removals[start : start + step], outcome)
        return outcome

    async def _remove(self, batch: Sequence[StrayRemoval], outcome: RemovalOutcome) -> None:
        now = self._clock.wall()
        allowed = await self._lead.write(lambda connection: _fence(connection, batch, now))
        outcome.skipped += len(batch) - len(allowed)
        by_node: dict[tuple[NodeId, int], list[StrayRow]] = {}
        for removal in allowed:
            place = removal.stray.node, removal.incarnation
            by_node.setdefault(place, []).append(removal.stray)
        for (node, incarnation), rows in sorted(by_node.items()):
            await self._delete(node, incarnation, rows, outcome)

    async def _delete(
        self, node: NodeId, incarnation: int, rows: Sequence[StrayRow], outcome: RemovalOutcome
    ) -> None:
        keys = [row.key for row in rows]
        try:
            statuses = await self._ports.port(node).delete(incarnation, keys, self._settings.call_s)
        except UnknownOutcome:
            outcome.unknown += len(rows)  # the marks stay: the delete may still arrive
            return
        except HaversackError:
            outcome.failed += len(rows)
            await self._lead.write(
                lambda connection: mark_removing(connection, [row.place for row in rows], None)
            )
            return
        gone = [
            row
            for row, status in zip(rows, statuses, strict=True)
            if status in (ItemStatus.OK, ItemStatus.NOT_FOUND)
        ]
        outcome.removed += len(gone)
        outcome.removed_bytes += sum(row.length for row in gone)
        outcome.failed += len(rows) - len(gone)
        now = self._clock.wall()

        def forget(connection: Connection) -> None:
            forget_strays(connection, [row.place for row in gone])
            detail = f"{len(gone)} fragments in no row's slot"
            record_event(connection, now, EventKind.STRAYS_REMOVED, node, detail)

        await self._lead.write(forget)


def judge_stray(row: StrayRow, truth: Truth) -> Verdict:
    """Whether SQL lets a stray go."""
    key = row.key
    if any(volume == key.volume for volume, _ in truth.moves):
        return Verdict("a move is under way in its volume")
    volume = truth.volumes.get(key.volume)
    if volume is None:
        known = truth.known.get(key.block) == key.volume
        return Verdict("its volume is missing from the index" if known else "")
    if truth.known.get(key.block) != key.volume or key.slot >= volume.scheme.n:
        is_open = volume.state is VolumeState.OPEN
        return Verdict("its volume still takes puts" if is_open else "")
    holder = truth.holder(key)
    if holder is None:
        return Verdict("its slot has no node")
    if holder == row.node:
        return Verdict("it is in its slot by now")
    if key in truth.owed:
        return Verdict("its slot is owed a good one")
    return Verdict(holder=holder)


def _why_keep(
    row: StrayRow, truth: Truth, own: VerifiedRecord | None, held: VerifiedRecord | None
) -> str:
    """Why a stale copy stays although SQL would let it go; empty if it goes."""
    volume, live = truth.volumes[row.key.volume], truth.rows[row.key.block]
    expected = FRAGMENT_HEADER_BYTES + volume.scheme.chunk_bytes(live.stored_bytes)
    if own is None or held is None:
        return "a node did not answer"
    if held.status is not ItemStatus.OK or held.length != expected:
        return "its slot lacks a good one"
    if own.status is ItemStatus.OK and own.stripe_tag != held.stripe_tag:
        return "it is of another seal than its slot's own"
    return ""


def _fence(connection: Connection, batch: Sequence[StrayRemoval], now: float) -> list[StrayRemoval]:
    """Those of a batch that may still go; see the module's docstring."""
    truth = read_truth(connection, [removal.stray.key for removal in batch])
    lives = {node.node_id: node.incarnation for node in map_rows.read_nodes(connection)}
    allowed = []
    sealed: set[VolumeId] = set()
    for removal in batch:
        verdict = judge_stray(removal.stray, truth)
        if verdict != Verdict(holder=removal.holder):
            continue
        if removal.holder is None:
            if removal.stray.key.volume in truth.volumes:
                sealed.add(removal.stray.key.volume)
        elif lives.get(removal.holder) != removal.holder_incarnation:
            continue
        allowed.append(removal)
    if sealed:
        version = map_rows.next_version(connection)
        connection.execute(
            update(volumes)
            .where(volumes.c.volume_id.in_([int(volume) for volume in sorted(sealed)]))
            .values(epoch=volumes.c.epoch + 1, changed=version)
        )
    mark_removing(connection, [removal.stray.place for removal in allowed], now)
    return allowed
