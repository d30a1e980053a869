"""Makes slots of one volume where they belong, and has their nodes verify them.

Steps 3 and 4 of a move and the whole of repaying debts in place (`docs/design/013-healing.md`).
Called by `executor`, which begins and publishes; knows neither SQL nor Ray.

    held on the target already?  --verified, of the stripe's tag-->  done
        | no
    copy from the old node, or read k others and make all lost slots of the stripe
        |
    put, one frame a target  -->  verify on the target  -->  done
                                      | missing or wrong: again, `rounds_max` times
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from cluster.block_client_settings import Run
from cluster.block_index import BlockRow
from cluster.block_sql import Debt
from cluster.debts import DebtReason
from cluster.node_pool import NodePool
from cluster.repair.gather import Gatherer, StripeParts, is_final, what_failed
from cluster.repair.remake import Record, Remaker, StripeJob, reframe
from cluster.repair.settings import RepairSettings
from cluster.repair.throttle import LiveWatch, Throttle
from cluster.stripe_read import expected_record_bytes, open_unproven
from cluster.topology import VolumeView
from protocol.errors import (
    CorruptFragment,
    FragmentNotFound,
    HaversackError,
    RetryLater,
    StaleEpoch,
    UnknownOutcome,
)
from protocol.ids import BlockHash, NodeId
from protocol.limits import MIB
from protocol.messages import ItemStatus, PutPurpose
from storage_node.interface import FragmentKey, VerifiedRecord

_FRAME_BYTES = 16 * MIB
"""Records of one put: half of what a frame may hold."""

_VERIFY_KEYS = 4_096

_TAG_SOURCES_MAX = 3
"""Other slots asked for the stripe's tag of what a target holds already."""


class Making(NamedTuple):
    """One slot to make."""

    slot: int
    node: NodeId
    incarnation: int
    """Of the node, as the map knew it; a verification holds for this life only."""
    source: NodeId | None = None
    """A living node that holds the slot now."""
    only: Mapping[BlockHash, DebtReason] | None = None
    """Blocks to make, and what is wrong with each now; None: all."""


class RunTools(NamedTuple):
    """What every run needs; one per executor."""

    pool: NodePool
    remaker: Remaker
    throttle: Throttle
    live: LiveWatch
    run: Run
    settings: RepairSettings


class TargetUnfit(Exception):
    """A target does not take or keep what it is sent: another one must be planned."""

    def __init__(self, node_id: NodeId, why: str) -> None:
        super().__init__(f"{node_id}: {why}")
        self.node_id = node_id


@dataclass(slots=True)
class Outcome:
    """What came of one run."""

    verified: dict[int, set[BlockHash]] = field(default_factory=dict)
    """Blocks whose fragment is on the slot's node, read back and right."""
    lost: dict[BlockHash, str] = field(default_factory=dict)
    """Blocks that cannot be made: fewer than k of their fragments are good."""
    postponed: dict[BlockHash, str] = field(default_factory=dict)
    """Blocks that could not be made now: nodes or disks do not answer."""
    found: dict[Debt, DebtReason] = field(default_factory=dict)
    """Fragments of other slots that turned out to be bad."""
    made_fragments: int = 0
    made_bytes: int = 0


Progress = Callable[[int, int], None]
"""(fragments, bytes) that were written since the last call."""


class VolumeRun:
    """One attempt to make some slots of one volume."""

    def __init__(
        self,
        tools: RunTools,
        volume: VolumeView,
        makings: Sequence[Making],
        rows: Sequence[BlockRow],
        bad: Mapping[BlockHash, Collection[int]],
        readable: Mapping[int, NodeId],
        progress: Progress,
    ) -> None:
        """`bad`: slots of a block that are known to be bad; `readable`: where to read other slots
        from."""
        self._tools = tools
        self._volume = volume
        self._makings = {making.slot: making for making in makings}
        self._rows = rows
        self._bad = bad
        self._gatherer = Gatherer(tools.pool, volume, readable, tools.settings.call_s)
        self._readable = readable
        self._progress = progress
        self._tags: dict[tuple[int, BlockHash], int] = {}
        """What was written in this run and not yet verified."""
        self.outcome = Outcome({making.slot: set() for making in makings})

    async def run(self) -> Outcome:
        """Make and verify.  Raises `TargetUnfit`, and `StaleEpoch` when the volume moved on."""
        await self._look_at_targets()
        for _ in range(self._tools.settings.rounds_max):
            todo = [row for row in self._rows if self._wanted(row)]
            if not todo:
                break
            await self._make_all(todo)
            await self._verify_made()
        for row in self._rows:
            if self._wanted(row):
                raise TargetUnfit(self._makings[self._wanted(row)[0]].node, "does not keep records")
        return self.outcome

    def _wanted(self, row: BlockRow) -> list[int]:
        """Slots of a block that are still to be made in this run."""
        if row.hash in self.outcome.lost or row.hash in self.outcome.postponed:
            return []
        return [
            slot
            for slot, making in self._makings.items()
            if (making.only is None or row.hash in making.only)
            and row.hash not in self.outcome.verified[slot]
        ]

    # -- what is there already -------------------------------------------------------------------

    async def _look_at_targets(self) -> None:
        """Whatever a target holds, verifies, and tagged as another slot is, needs no work: this is
        how a move resumes."""
        for slot, making in self._makings.items():
            hashes = [
                row.hash
                for row in self._rows
                if making.only is None
                or (row.hash in making.only and making.only[row.hash] is not DebtReason.LYING)
            ]
            held = {
                block: record.stripe_tag
                async for block, record in self._verify(making.node, slot, hashes)
                if record.status is ItemStatus.OK
            }
            if held:
                tags = await self._tags_of(slot, list(held))
                self.outcome.verified[slot].update(
                    block
                    for block, tag in held.items()
                    if tags.get(block, tag if _was_unreadable(making, block) else None) == tag
                )

    async def _tags_of(self, slot: int, hashes: Sequence[BlockHash]) -> dict[BlockHash, int]:
        """The stripe's tag of each block, as another slot's node reads it from its disk."""
        tags: dict[BlockHash, int] = {}
        if self._volume.scheme.n == 1:
            return tags
        asked = 0
        for other, node_id in self._readable.items():
            left = [
                block for block in hashes if block not in tags and not self._is_bad(block, other)
            ]
            if other == slot or not left:
                continue
            if asked == _TAG_SOURCES_MAX:
                break
            asked += 1
            with contextlib.suppress(TargetUnfit):  # another slot knows as well
                async for block, record in self._verify(node_id, other, left):
                    if record.status is ItemStatus.OK:
                        tags[block] = record.stripe_tag
        return tags

    def _is_bad(self, block: BlockHash, slot: int) -> bool:
        return slot in self._bad.get(block, ())

    async def _verify(
        self, node_id: NodeId, slot: int, hashes: Sequence[BlockHash]
    ) -> AsyncIterator[tuple[BlockHash, VerifiedRecord]]:
        """Have a node read its fragments of one slot.  Raises `TargetUnfit` if it cannot."""
        for start in range(0, len(hashes), _VERIFY_KEYS):
            part = hashes[start : start + _VERIFY_KEYS]
            keys = [FragmentKey(self._volume.volume_id, block, slot) for block in part]
            try:
                port = self._tools.pool.port(node_id)
                answers = await port.verify(keys, self._tools.settings.verify_s)
            except HaversackError as error:
                raise TargetUnfit(node_id, error.message) from error
            for block, answer in zip(part, answers, strict=True):
                yield block, answer

    async def _verify_made(self) -> None:
        """Every fragment written in this round is read back from its disk by its node."""
        for slot, making in self._makings.items():
            tags = {block: tag for (at, block), tag in self._tags.items() if at == slot}
            async for block, record in self._verify(making.node, slot, sorted(tags)):
                if record.status is ItemStatus.OK and record.stripe_tag == tags[block]:
                    self.outcome.verified[slot].add(block)
        self._tags.clear()

    # -- making ------------------------------------------------------------------------------------

    async def _make_all(self, rows: Sequence[BlockRow]) -> None:
        """Batches of stripes, a few at a time: one is read while another is written."""
        turns = asyncio.Semaphore(self._tools.settings.batches_at_once)

        async def one(batch: list[BlockRow]) -> None:
            try:
                await self._make_batch(batch)
            finally:
                turns.release()

        try:
            async with asyncio.TaskGroup() as tasks:
                for batch in self._batches(rows):
                    await turns.acquire()
                    tasks.create_task(one(batch))
        except* (TargetUnfit, StaleEpoch, RetryLater, UnknownOutcome) as group:
            raise _first(group) from None

    def _batches(self, rows: Iterable[BlockRow]) -> Iterable[list[BlockRow]]:
        settings = self._tools.settings
        batch: list[BlockRow] = []
        size = 0
        for row in rows:
            if batch and (
                size + row.stored_bytes > settings.batch_bytes
                or len(batch) == settings.batch_blocks
            ):
                yield batch
                batch, size = [], 0
            batch.append(row)
            size += row.stored_bytes
        if batch:
            yield batch

    async def _make_batch(self, rows: Sequence[BlockRow]) -> None:
        wanted = {row.hash: self._wanted(row) for row in rows}
        slots = [slot for row in rows for slot in wanted[row.hash]]
        size = sum(expected_record_bytes(row, self._volume) * len(wanted[row.hash]) for row in rows)
        await self._tools.throttle.take(size)
        records: dict[int, list[tuple[BlockHash, Record]]] = {slot: [] for slot in set(slots)}
        copied = await self._copy(rows, wanted)
        for slot, block, record in copied:
            records[slot].append((block, record))
            wanted[block].remove(slot)
        rest = [row for row in rows if wanted[row.hash]]
        if rest:
            for job in await self._decode(rest, wanted):
                for slot, record in job.made.items():
                    records[slot].append((job.row.hash, record))
        async with asyncio.TaskGroup() as tasks:
            for slot, mine in records.items():
                tasks.create_task(self._put(slot, mine))

    async def _copy(
        self, rows: Sequence[BlockRow], wanted: Mapping[BlockHash, Sequence[int]]
    ) -> list[tuple[int, BlockHash, Record]]:
        """Fragments that a living node still holds."""
        copied: list[tuple[int, BlockHash, Record]] = []
        for slot, making in self._makings.items():
            if making.source is None:
                continue
            parts = [
                StripeParts(row)
                for row in rows
                if slot in wanted[row.hash] and not self._is_bad(row.hash, slot)
            ]
            if not parts:
                continue
            self._tools.live.count(making.source, len(parts))
            await self._gatherer.read_slot(making.source, slot, parts)
            copied += [
                (slot, part.row.hash, reframe(part.fragments[slot], self._volume.epoch))
                for part in parts
                if slot in part.fragments
            ]
        return copied

    async def _decode(
        self, rows: Sequence[BlockRow], wanted: Mapping[BlockHash, Sequence[int]]
    ) -> list[StripeJob]:
        """All wanted slots of each stripe from one read of k others."""
        scheme, epoch = self._volume.scheme, self._volume.epoch
        bad = {row.hash: {*self._bad.get(row.hash, ()), *wanted[row.hash]} for row in rows}
        self._count_reads(len(rows))
        stripes = await self._gatherer.gather(rows, scheme.k, bad, open_unproven)
        jobs: list[StripeJob] = []
        for stripe in stripes:
            self._note_failures(stripe)
            if len(stripe.fragments) >= scheme.k:
                jobs.append(StripeJob(stripe.row, stripe.fragments, wanted[stripe.row.hash]))
            else:
                self._give_up(stripe)
        if jobs:
            await self._tools.run(self._tools.remaker.make, jobs, scheme, epoch)
        doubtful = [job.row for job in jobs if job.error is not None]
        good = [job for job in jobs if job.error is None]
        return good + (await self._prove(doubtful, wanted) if doubtful else [])

    async def _prove(
        self, rows: Sequence[BlockRow], wanted: Mapping[BlockHash, Sequence[int]]
    ) -> list[StripeJob]:
        """Fragments disagree: read all there are, and let SHA-256 decide."""
        stripes = await self._gatherer.gather(rows, self._volume.scheme.n, {})
        jobs = [StripeJob(part.row, part.fragments, wanted[part.row.hash]) for part in stripes]
        scheme, epoch = self._volume.scheme, self._volume.epoch
        await self._tools.run(self._tools.remaker.prove, jobs, scheme, epoch)
        proven: list[StripeJob] = []
        for job, stripe in zip(jobs, stripes, strict=True):
            self._note_failures(stripe)
            if job.error is not None:
                self._give_up(stripe, job.error.message)
                continue
            for slot in job.liars:
                self._note(slot, job.row.hash, DebtReason.LYING)
            proven.append(job)
        return proven

    def _count_reads(self, stripes: int) -> None:
        for node_id in list(self._readable.values())[: self._volume.scheme.k]:
            self._tools.live.count(node_id, stripes)

    # -- what is wrong -----------------------------------------------------------------------------

    def _note_failures(self, stripe: StripeParts) -> None:
        for slot, error in stripe.failures.items():
            if isinstance(error, FragmentNotFound):
                self._note(slot, stripe.row.hash, DebtReason.MISSING)
            elif isinstance(error, CorruptFragment):
                self._note(slot, stripe.row.hash, DebtReason.CORRUPT)

    def _note(self, slot: int, block: BlockHash, reason: DebtReason) -> None:
        if slot not in self._makings or self._makings[slot].only is not None:
            self.outcome.found.setdefault(Debt(self._volume.volume_id, slot, block), reason)

    def _give_up(self, stripe: StripeParts, why: str = "") -> None:
        """List a block that cannot be made, now or at all; the others go on."""
        k = self._volume.scheme.k
        bad = sorted(self._bad.get(stripe.row.hash, ()))
        text = why or f"{len(stripe.fragments)} good fragments, {k} needed: {what_failed(stripe)}"
        if bad:
            text += f"; slots {bad} are owed"
        passing = any(not is_final(error) for error in stripe.failures.values())
        listed = self.outcome.postponed if passing else self.outcome.lost
        listed[stripe.row.hash] = text

    # -- writing -----------------------------------------------------------------------------------

    async def _put(self, slot: int, records: Sequence[tuple[BlockHash, Record]]) -> None:
        """Send one slot's records, a frame at a time."""
        frame: list[tuple[BlockHash, Record]] = []
        size = 0
        for item in records:
            if frame and size + item[1].size > _FRAME_BYTES:
                await self._put_frame(slot, frame)
                frame, size = [], 0
            frame.append(item)
            size += item[1].size
        if frame:
            await self._put_frame(slot, frame)

    async def _put_frame(self, slot: int, frame: Sequence[tuple[BlockHash, Record]]) -> None:
        making = self._makings[slot]
        self._tools.live.count(making.node, len(frame))
        pieces = [(record.header, record.payload) for _, record in frame]
        try:
            reply = await self._tools.pool.write(
                making.node,
                making.incarnation,
                pieces,
                self._tools.settings.call_s,
                PutPurpose.REPAIR,
            )
        except UnknownOutcome:
            # Perhaps durable, perhaps not: the verification tells.
            self._tags.update(((slot, block), record.stripe_tag) for block, record in frame)
            return
        except HaversackError as error:
            raise TargetUnfit(making.node, error.message) from error
        written = 0
        for (block, record), status in zip(frame, reply.statuses, strict=True):
            if status is ItemStatus.STALE_EPOCH:
                raise StaleEpoch(f"{self._volume.volume_id} has moved on from {self._volume.epoch}")
            if status is ItemStatus.OK:
                self._tags[slot, block] = record.stripe_tag
                written += record.size
        self.outcome.made_fragments += len(frame)
        self.outcome.made_bytes += written
        self._progress(len(frame), written)


def _was_unreadable(making: Making, block: BlockHash) -> bool:
    """Whether all that was ever held against a fragment is a read that failed: whole now, it may
    be the last one, with none to compare it with."""
    return making.only is not None and making.only.get(block) is DebtReason.UNREADABLE


def _first(group: BaseExceptionGroup[Exception]) -> Exception:
    """One of the errors that ended a batch: they are all reasons to start over."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, Exception)
    return error
