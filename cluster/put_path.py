"""Steps 3 to 5 of the life of a put: choose a volume, encode, send to all slots, record.

Called by `block_client`, for one block or for many that go to one volume together.  Talks to
nodes through `NodePool` and to SQL through `VolumeMap` and `BlockIndex`; may not import Ray or a
concrete port.

The rule of acknowledgement
---------------------------

1. Every slot acknowledged, each by the incarnation that the map names: record the block.
2. A slot failed: the *whole* block is written again to a volume without the failed nodes.  What
   was written before is an orphan for the verifier.
3. Fewer healthy failure domains than slots exist, or the placement service had its time to open
   a volume without the failed nodes (`VolumeChooser.has_waited`): `write_minimum`
   acknowledgements are enough, and the missing slots become debts in the transaction that
   records the block.
4. A receipt does not match the node table any more (FENCED): refresh the map, write again.

Nothing is reported as stored before `BlockIndex.record_puts` has returned.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from cluster.block_client_settings import BlockClientSettings, PutResult, Run
from cluster.block_index import BlockRow, NewBlock, Receipt, RecordOutcome
from cluster.block_rows import BlockRows
from cluster.node_pool import NodePool
from cluster.topology import VolumeView
from cluster.volume_choice import Avoided, Choice, VolumeChooser
from cluster.volume_map import VolumeMap
from erasure.codec import Codec
from erasure.envelope import seal
from erasure.keyring import Keyring
from erasure.scheme import Scheme
from erasure.stripe import make_stripe
from protocol.clock import Clock
from protocol.errors import (
    HaversackError,
    NotEnoughNodes,
    Overloaded,
    StaleEpoch,
    StaleIncarnation,
)
from protocol.hashing import Buffer
from protocol.ids import BlockHash, NodeId
from protocol.limits import KIB
from protocol.messages import ItemStatus
from storage_node.interface import PutOutcome

ENCODE_INLINE_BYTES = 32 * KIB
"""Less than this is sealed and encoded on the event loop: a thread costs more than the work."""


class Recorder(Protocol):
    """Where blocks become known: the block index, or what moves rows to another volume."""

    async def record_puts(self, entries: Sequence[NewBlock]) -> list[RecordOutcome]:
        """As `BlockIndex.record_puts`."""
        ...


Settle: TypeAlias = Callable[[BlockHash, PutResult | HaversackError], None]
"""Called once for each block, as soon as its own result is known."""

_Stripe = list[tuple[bytes, Buffer]]
"""(header, payload) per slot."""


class PendingBlock:
    """A block on its way in.  `parts` are dropped once the stored bytes are made."""

    __slots__ = ("block", "length", "owner", "parts", "stored")

    def __init__(self, owner: int, block: BlockHash, parts: Sequence[Buffer], length: int) -> None:
        self.owner = owner
        self.block = block
        self.parts: Sequence[Buffer] = parts
        self.length = length
        self.stored: bytes | None = None


@dataclass(slots=True)
class _Group:
    """Blocks that are tried on one volume after the other, together."""

    scheme: Scheme
    pending: list[PendingBlock]
    deadline: float
    settle: Settle
    avoid: dict[NodeId, Avoided] = field(default_factory=dict)
    """Nodes that failed this group, in the life that did."""
    map_version: int = 0
    """Of the map that the last choice was made from."""
    map_is_stale: bool = False
    overloaded: Overloaded | None = None
    """What a node said in the last attempt whose queue is full."""
    settled: set[BlockHash] = field(default_factory=set)

    def note(self, block: BlockHash, result: PutResult | HaversackError) -> None:
        """The result of one block."""
        self.settled.add(block)
        self.settle(block, result)


@dataclass(slots=True)
class _Answers:
    """What came of one fan-out."""

    failed: dict[int, str] = field(default_factory=dict)
    """Slots that acknowledged nothing, with the reason."""
    refused: dict[int, dict[int, str]] = field(default_factory=dict)
    """Per index of a block: slots that acknowledged others and not this one."""
    passing: set[int] = field(default_factory=set)
    """Slots whose failure says nothing about their node: our map is old, or it is busy."""


class PutPath:
    """Writes stripes; one per block client."""

    def __init__(
        self,
        index: Recorder,
        rows: BlockRows,
        volume_map: VolumeMap,
        pool: NodePool,
        codec: Codec,
        keyring: Keyring | None,
        clock: Clock,
        rng: random.Random,
        run: Run,
        settings: BlockClientSettings,
    ) -> None:
        self._index = index
        self._rows = rows
        self._map = volume_map
        self._pool = pool
        self._chooser = VolumeChooser(volume_map, pool, clock, rng, settings)
        self._codec = codec
        self._keyring = keyring
        self._clock = clock
        self._rng = rng
        self._run = run
        self._settings = settings

    async def store(self, scheme: Scheme, blocks: Sequence[PendingBlock], settle: Settle) -> None:
        """Make blocks durable and known; one result per block, never an exception of ours.

        The blocks are distinct, and together fit into one frame to a node.  Those that the first
        volume took are settled before the others are tried on the next.
        """
        deadline = self._clock.monotonic() + self._settings.put_s
        group = _Group(scheme, list(blocks), deadline, settle)
        try:
            await self._map.refresh(self._settings.map_age_s)
            for _ in range(self._settings.put_attempts_max):
                choice = await self._chooser.choose(group.scheme, group.avoid, group.deadline)
                group.map_version = self._map.version
                group.overloaded = None
                await self._attempt(group, choice)
                if not group.pending:
                    return
                await self._prepare_retry(group)
            error: HaversackError = self._gave_up(group)
        except HaversackError as caught:
            error = caught
        for item in group.pending:
            group.note(item.block, error)

    # -- one attempt ---------------------------------------------------------------------------

    async def _attempt(self, group: _Group, choice: Choice) -> None:
        """Write all pending blocks to one volume and record those that may be acknowledged."""
        stripes = await self._encode(group, choice.volume)
        answers = await self._send(group, choice, stripes)
        if answers.failed:
            await self._forgive_earlier_lives(choice, answers)
        accepted: list[PendingBlock] = []
        entries: list[NewBlock] = []
        for number, item in enumerate(group.pending):
            entry = self._entry(group, choice, answers, number, item)
            if entry is not None:
                accepted.append(item)
                entries.append(entry)
        if entries:
            await self._record(group, accepted, entries)
        group.pending = [item for item in group.pending if item.block not in group.settled]

    async def _encode(self, group: _Group, volume: VolumeView) -> list[_Stripe]:
        total = sum(item.length for item in group.pending)
        if total <= ENCODE_INLINE_BYTES:
            return self._make_stripes(group.pending, volume)
        stripes: list[_Stripe] = await self._run(self._make_stripes, group.pending, volume)
        return stripes

    def _make_stripes(self, items: Sequence[PendingBlock], volume: VolumeView) -> list[_Stripe]:
        stripes = []
        for item in items:
            if item.stored is None:
                item.stored = seal(
                    item.parts,
                    item.length,
                    keyring=self._keyring,
                    compress=self._settings.compress,
                )
                item.parts = ()
            stripes.append(
                make_stripe(
                    self._codec,
                    volume.scheme,
                    item.block,
                    volume.volume_id,
                    volume.epoch,
                    item.stored,
                )
            )
        return stripes

    async def _send(self, group: _Group, choice: Choice, stripes: Sequence[_Stripe]) -> _Answers:
        """One frame to each slot's node, in parallel; notes every slot that did not acknowledge."""
        left_s = group.deadline - self._clock.monotonic()
        if left_s <= 0:
            raise self._gave_up(group)
        deadline_s = min(self._settings.put_slot_s, left_s)
        outcomes = await asyncio.gather(
            *(
                self._pool.write(
                    receipt.node_id,
                    receipt.incarnation,
                    [stripe[receipt.slot] for stripe in stripes],
                    deadline_s,
                )
                for receipt in choice.receipts
            ),
            return_exceptions=True,
        )
        answers = _Answers()
        for receipt, outcome in zip(choice.receipts, outcomes, strict=True):
            self._note(group, answers, receipt, outcome, len(stripes))
        return answers

    def _note(
        self,
        group: _Group,
        answers: _Answers,
        receipt: Receipt,
        outcome: PutOutcome | BaseException,
        expected: int,
    ) -> None:
        """Sort one slot's answer into `answers`, and its node into `group.avoid`."""
        if isinstance(outcome, BaseException):
            if not isinstance(outcome, HaversackError):
                raise outcome
            answers.failed[receipt.slot] = str(outcome)
            if isinstance(outcome, StaleIncarnation | StaleEpoch):
                answers.passing.add(receipt.slot)
                group.map_is_stale = True
            elif isinstance(outcome, Overloaded):
                answers.passing.add(receipt.slot)
                group.overloaded = outcome
            else:
                group.avoid[receipt.node_id] = Avoided(str(outcome), receipt.incarnation)
            return
        if outcome.incarnation != receipt.incarnation:
            answers.failed[receipt.slot] = f"answered as incarnation {outcome.incarnation}"
            answers.passing.add(receipt.slot)
            group.map_is_stale = True
            return
        if len(outcome.statuses) != expected:
            why = f"answered for {len(outcome.statuses)} of {expected} records"
            answers.failed[receipt.slot] = why
            group.avoid[receipt.node_id] = Avoided(why, receipt.incarnation)
            return
        if not any(outcome.statuses):  # OK is zero
            return
        for number, status in enumerate(outcome.statuses):
            if status == ItemStatus.OK:
                continue
            why = ItemStatus(status).name
            answers.refused.setdefault(number, {})[receipt.slot] = why
            if status == ItemStatus.STALE_EPOCH:
                answers.passing.add(receipt.slot)
                group.map_is_stale = True
            else:
                group.avoid[receipt.node_id] = Avoided(why, receipt.incarnation)

    async def _forgive_earlier_lives(self, choice: Choice, answers: _Answers) -> None:
        """A slot failed: if the newest map names another life of its node, the node is fine."""
        await self._map.refresh()
        for receipt in choice.receipts:
            if receipt.slot not in answers.failed:
                continue
            if self._map.node(receipt.node_id).incarnation != receipt.incarnation:
                answers.passing.add(receipt.slot)

    def _entry(
        self,
        group: _Group,
        choice: Choice,
        answers: _Answers,
        number: int,
        item: PendingBlock,
    ) -> NewBlock | None:
        """What to record for a block, or None if it has to be written again."""
        receipts, missing = choice.receipts, choice.missing
        refused = answers.refused.get(number)
        if answers.failed or refused:
            lost = {*answers.failed, *(refused or ())}
            if lost & answers.passing:
                return None
            receipts = tuple(receipt for receipt in receipts if receipt.slot not in lost)
            missing = tuple(sorted({*missing, *lost}))
            if len(receipts) < group.scheme.write_minimum:
                return None
            enough = self._chooser.healthy_nodes(group.avoid) >= group.scheme.n
            may_owe = choice.may_owe or self._chooser.has_waited(group.scheme)
            if enough and not may_owe:
                return None
        assert item.stored is not None
        return NewBlock(
            item.block,
            item.owner,
            choice.volume.volume_id,
            choice.volume.epoch,
            len(item.stored),
            item.length,
            receipts,
            missing,
        )

    async def _record(
        self, group: _Group, accepted: Sequence[PendingBlock], entries: Sequence[NewBlock]
    ) -> None:
        """Commit to the index.  What the index does not confirm stays pending or is an error."""
        try:
            outcomes = await self._index.record_puts(entries)
        except HaversackError as error:
            for item in accepted:
                group.note(item.block, error)
            return
        for entry, outcome in zip(entries, outcomes, strict=True):
            if outcome is RecordOutcome.FENCED:
                group.map_is_stale = True
                continue
            new = outcome is RecordOutcome.NEW
            if new and not entry.missing_slots:
                self._chooser.recorded_whole(group.scheme)
            if new:
                self._rows.learn(
                    BlockRow(entry.hash, entry.volume, entry.stored_bytes, entry.plain_bytes)
                )
            group.note(
                entry.hash, PutResult(new, entry.stored_bytes, new and bool(entry.missing_slots))
            )

    async def _prepare_retry(self, group: _Group) -> None:
        """After a refusal that names our map: read it again, and give it a moment to change.
        After one that says busy: give the node a moment."""
        if group.map_is_stale:
            await self._map.refresh()
        stays_the_same = group.map_is_stale and self._map.version == group.map_version
        if stays_the_same or group.overloaded is not None:
            await self._clock.sleep(self._settings.retry_pause_s * (0.5 + self._rng.random()))
        if stays_the_same:
            await self._map.refresh()
        group.map_is_stale = False

    # -- giving up -----------------------------------------------------------------------------

    def _gave_up(self, group: _Group) -> HaversackError:
        if group.overloaded is not None:
            return group.overloaded
        return NotEnoughNodes(
            f"no volume of scheme {group.scheme} took the block within "
            f"{self._settings.put_attempts_max} attempts and {self._settings.put_s:g} s",
            self._chooser.details(group.scheme, group.avoid),
        )
