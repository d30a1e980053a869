"""Steps 3 to 6 of the life of a get: read k slots of one block, hedge, replace, prove.

One `StripeRead` is one attempt with one view of the volume; `get_path` decides whether to try
again with a newer one.  Talks to nodes through `NodePool` only; may not import SQL or Ray.

k slots are read first, data slots on trusted nodes before all others.  From then on one rule says
what to start: slots that failed are replaced at once, by any slot that is left; slots that are
late are hedged, by trusted ones only.  Whatever arrives is checked (checksums, identity).

* All data slots are there: they are joined, and the envelope's checksum covers the result.
* Parity was needed: the decode is proven by SHA-256 before a byte goes out.
* The result is wrong: every other slot is read too, and subsets are tried until one proves itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import NamedTuple

from cluster.block_client_settings import BlockClientSettings, FragmentProblem, ProblemKind, Run
from cluster.block_index import BlockRow
from cluster.hedging import HedgeBudget
from cluster.node_pool import Direction, NodePool
from cluster.shared_reads import SharedReads
from cluster.topology import VolumeView
from erasure.codec import Codec
from erasure.envelope import unseal_pieces
from erasure.fragment import FRAGMENT_HEADER_BYTES, Fragment, parse_expected, parse_unproven
from erasure.keyring import Keyring
from erasure.scheme import SchemeKind
from erasure.stripe import Recovered, recover
from protocol.clock import Clock
from protocol.errors import (
    BlockUnreadable,
    CorruptFragment,
    FragmentNotFound,
    HaversackError,
    NeedsRepair,
    RetryLater,
)
from protocol.hashing import Buffer, hash_parts
from protocol.ids import NodeId
from protocol.limits import KIB, SMALL_BLOCK_BYTES
from protocol.messages import ItemStatus
from storage_node.interface import FragmentKey, StoredRecord

UNSEAL_INLINE_BYTES = 32 * KIB
"""A compressed or encrypted block of less than this is opened on the event loop."""

_TIMER_MIN_S = 0.001
"""Shortest wait for a late slot: clocks and timers need not agree to the last bit."""


Pieces = tuple[Buffer, ...]
"""Plain bytes of a block, in the pieces they arrived in."""


class ReadTools(NamedTuple):
    """What every read needs; one per block client."""

    pool: NodePool
    reads: SharedReads
    hedges: HedgeBudget
    codec: Codec
    keyring: Keyring | None
    clock: Clock
    rng: random.Random
    run: Run
    settings: BlockClientSettings


class DiskError(NeedsRepair):
    """A node's disk could not read a fragment: says nothing about whether it is there."""

    kind = "disk_error"


def joined(pieces: Pieces) -> Buffer:
    """The pieces as one buffer; copied only if there are several."""
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class SlotFailure(NamedTuple):
    """Why a slot gave no usable fragment."""

    node_id: NodeId | None
    error: HaversackError


def open_record(row: BlockRow, slot: int, answer: StoredRecord) -> Fragment:
    """The verified fragment in a node's answer.

    Raises `FragmentNotFound`, `CorruptFragment`, `DiskError`, `FormatUnsupported`.
    """
    return parse_expected(_record_in(row, slot, answer), row.volume, row.hash, slot)


def open_unproven(row: BlockRow, slot: int, answer: StoredRecord) -> Fragment:
    """`open_record` for `erasure.stripe.rebuild`, which proves the payload; raises as that does."""
    return parse_unproven(_record_in(row, slot, answer), row.volume, row.hash, slot)


def _record_in(row: BlockRow, slot: int, answer: StoredRecord) -> Buffer:
    if answer.status is ItemStatus.OK and answer.record is not None:
        return answer.record
    where = f"slot {slot} of block {row.hash} in {row.volume}"
    if answer.status is ItemStatus.NOT_FOUND:
        raise FragmentNotFound(f"{where}: the node does not hold it")
    if answer.status is ItemStatus.CORRUPT:
        raise CorruptFragment(f"{where}: the node found it corrupt")
    raise DiskError(f"{where}: the node answered {answer.status.name}")


def expected_record_bytes(row: BlockRow, volume: VolumeView) -> int:
    """Length of one slot's record of a block."""
    return FRAGMENT_HEADER_BYTES + volume.scheme.chunk_bytes(row.stored_bytes)


def is_proof_cheap(row: BlockRow, volume: VolumeView) -> bool:
    """Whether a healthy read is proven by SHA-256 as well: where it costs microseconds."""
    return volume.scheme.kind is SchemeKind.REPLICA and row.plain_bytes < SMALL_BLOCK_BYTES


def open_healthy(
    tools: ReadTools, row: BlockRow, volume: VolumeView, fragments: dict[int, Fragment]
) -> Pieces:
    """Plain bytes from all data slots (or from one replica), without a decode, nor a copy of a
    block that is stored as it is.

    Raises `CorruptFragment` if they are not one block.
    """
    slots = sorted(fragments)[: volume.scheme.k]
    first = fragments[slots[0]]
    for slot in slots:
        fragment = fragments[slot]
        if (
            fragment.stripe_tag != first.stripe_tag
            or fragment.stored_length != first.stored_length
            or fragment.scheme != volume.scheme
        ):
            raise CorruptFragment(f"slots {slots} of block {row.hash} are of different stripes")
    payloads = [fragments[slot].payload for slot in slots]
    stored = tools.codec.data_pieces(volume.scheme, payloads, first.stored_length)
    plain = unseal_pieces(stored, tools.keyring)
    length = sum(map(len, plain))
    if length != row.plain_bytes:
        raise CorruptFragment(
            f"block {row.hash} has {length} bytes; the index says {row.plain_bytes}"
        )
    if is_proof_cheap(row, volume) and hash_parts(plain) != row.hash:
        raise CorruptFragment(f"slot {slots[0]} of block {row.hash} holds other bytes")
    return plain


class StripeRead:
    """One attempt to read one block.  `known` are fragments that were verified before."""

    def __init__(
        self,
        tools: ReadTools,
        row: BlockRow,
        volume: VolumeView,
        deadline: float,
        known: dict[int, Fragment] | None = None,
    ) -> None:
        self._tools = tools
        self._row = row
        self._volume = volume
        self._deadline = deadline
        self._expected = expected_record_bytes(row, volume)
        self._wanted = volume.scheme.k
        self._is_suspicious = False
        self._tried_all = False
        self._trusted: list[int] = []
        self._doubted: list[int] = []
        self._pending: dict[int, asyncio.Task[Fragment]] = {}
        self._started: dict[int, float] = {}
        self._late_at: dict[int, float] = {}
        self._bug: BaseException | None = None
        self._event = asyncio.Event()
        self.fragments: dict[int, Fragment] = dict(known or {})
        self.failures: dict[int, SlotFailure] = {}
        self.problems: list[FragmentProblem] = []
        self._rank_slots()

    async def read(self) -> Pieces | None:
        """The block's plain bytes, proven where it is not obvious; None if too few slots are good.

        `failures` and `problems` then say why, and also what was wrong on the way to a success.
        """
        plain: Pieces | None = None
        self._tools.hedges.earn()
        try:
            while plain is None:
                self._start_slots()
                if self._is_ready():
                    plain = await self._assemble()
                elif not self._pending:
                    return None
                else:
                    await self._wait()
            self._count_lost_races()
        finally:
            await self._abandon()
        return plain

    @property
    def may_come_back(self) -> bool:
        """Whether enough of the slots that failed did so for a reason that passes."""
        passing = sum(isinstance(item.error, RetryLater) for item in self.failures.values())
        return passing > 0 and len(self.fragments) + passing >= self._volume.scheme.k

    # -- which slots, and when -----------------------------------------------------------------

    def _rank_slots(self) -> None:
        """Data slots first; replicas in the order of the moment, so that the load spreads."""
        scheme = self._volume.scheme
        slots = list(range(scheme.n))
        if scheme.kind is SchemeKind.REPLICA:
            slots.sort(key=lambda slot: self._tools.reads.rank(self._volume.slots[slot]))
        for slot in slots:
            if slot in self.fragments:
                continue
            node_id = self._volume.slots[slot]
            if node_id is None:
                self.failures[slot] = SlotFailure(None, FragmentNotFound("the slot has no node"))
            elif self._tools.pool.is_trusted(node_id, Direction.READ):
                self._trusted.append(slot)
            else:
                self._doubted.append(slot)

    def _start_slots(self) -> None:
        """As many as are missing; late ones count as missing where a trusted one can step in."""
        while len(self.fragments) + len(self._pending) < self._wanted:
            if self._trusted:
                self._start(self._trusted.pop(0))
            elif self._doubted:
                self._start(self._doubted.pop(0))
            else:
                break
        now = self._tools.clock.monotonic()
        late = sum(1 for slot in self._pending if self._late_at[slot] <= now)
        on_time = len(self._pending) - late
        while (
            self._trusted
            and len(self.fragments) + on_time < self._wanted
            and self._tools.hedges.spend()
        ):
            self._start(self._trusted.pop(0))
            on_time += 1

    def _start(self, slot: int) -> None:
        node_id = self._volume.slots[slot]
        assert node_id is not None
        now = self._tools.clock.monotonic()
        self._started[slot] = now
        self._late_at[slot] = now + self._tools.pool.hedge_delay_s(node_id, self._expected)
        task = asyncio.get_running_loop().create_task(self._read_slot(slot, node_id))
        self._pending[slot] = task
        task.add_done_callback(lambda done: self._on_done(slot, node_id, done))

    async def _read_slot(self, slot: int, node_id: NodeId) -> Fragment:
        left_s = self._deadline - self._tools.clock.monotonic()
        deadline_s = max(_TIMER_MIN_S, min(self._tools.settings.get_slot_s, left_s))
        key = FragmentKey(self._row.volume, self._row.hash, slot)
        answer = await self._tools.reads.read(node_id, key, self._expected, deadline_s)
        return open_record(self._row, slot, answer)

    def _on_done(self, slot: int, node_id: NodeId, task: asyncio.Task[Fragment]) -> None:
        """Sort a slot's result; wake the read if there is something to decide."""
        if self._pending.pop(slot, None) is None or task.cancelled():
            return
        error = task.exception()
        if error is None:
            self.fragments[slot] = task.result()
            if len(self.fragments) < self._wanted and self._pending:
                return
        elif isinstance(error, HaversackError):
            self._fail(slot, node_id, error)
        else:
            self._bug = error
        self._event.set()

    def _fail(self, slot: int, node_id: NodeId, error: HaversackError) -> None:
        self.failures[slot] = SlotFailure(node_id, error)
        match error:
            case FragmentNotFound():
                kind = ProblemKind.MISSING
            case CorruptFragment():
                kind = ProblemKind.CORRUPT
            case DiskError():
                kind = ProblemKind.IO_ERROR
            case _:
                return
        self._report(kind, slot, node_id, str(error))

    def _report(self, kind: ProblemKind, slot: int, node_id: NodeId, detail: str) -> None:
        self.problems.append(
            FragmentProblem(
                kind,
                self._row.hash,
                self._row.volume,
                self._volume.epoch,
                slot,
                node_id,
                detail,
            )
        )

    async def _wait(self) -> None:
        """Until a slot fails, the wanted number is there, or the next slot is late."""
        now = self._tools.clock.monotonic()
        timers = [self._late_at[slot] - now for slot in self._pending]
        upcoming = [seconds for seconds in timers if seconds > 0]
        timeout_s = max(_TIMER_MIN_S, min(upcoming)) if upcoming and self._trusted else None
        self._event.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._event.wait()
        if self._bug is not None:
            raise self._bug

    def _is_ready(self) -> bool:
        """Whether to try the fragments we have."""
        if self._tried_all or len(self.fragments) < self._volume.scheme.k:
            return False
        return len(self.fragments) >= self._wanted or not self._pending

    # -- bytes ---------------------------------------------------------------------------------

    async def _assemble(self) -> Pieces | None:
        """Plain bytes of the fragments we have, or None after asking for more."""
        scheme = self._volume.scheme
        is_healthy = scheme.kind is SchemeKind.REPLICA or all(
            slot in self.fragments for slot in range(scheme.k)
        )
        # A copy: late slots may still arrive while another thread reads it.
        fragments = dict(self.fragments)
        try:
            if is_healthy and not self._is_suspicious:
                return await self._open_healthy(fragments)
            recovered: Recovered = await self._tools.run(
                recover, self._tools.codec, self._tools.keyring, self._row.hash, fragments
            )
        except (CorruptFragment, BlockUnreadable):
            self._ask_all()
            return None
        for slot in recovered.liars:
            node_id = self._volume.slots[slot]
            assert node_id is not None
            self._report(ProblemKind.LIAR, slot, node_id, "its bytes are not the block's")
        return (recovered.plain,)

    async def _open_healthy(self, fragments: dict[int, Fragment]) -> Pieces:
        arguments = (self._tools, self._row, self._volume, fragments)
        if self._row.plain_bytes <= UNSEAL_INLINE_BYTES or (
            self._tools.keyring is None and self._row.stored_bytes > self._row.plain_bytes
        ):
            return open_healthy(*arguments)
        plain: Pieces = await self._tools.run(open_healthy, *arguments)
        return plain

    def _ask_all(self) -> None:
        """Something lies: only a wider choice of fragments can tell what.  The second time, all
        there is has been tried."""
        self._tried_all = self._is_suspicious
        self._is_suspicious = True
        self._wanted = self._volume.scheme.n

    # -- the end -------------------------------------------------------------------------------

    def _count_lost_races(self) -> None:
        """Tell the pool which nodes were late when the block was complete without them."""
        now = self._tools.clock.monotonic()
        for slot in self._pending:
            node_id = self._volume.slots[slot]
            if self._late_at[slot] <= now and node_id is not None:
                self._tools.pool.lost_race(node_id, self._expected, now - self._started[slot])

    async def _abandon(self) -> None:
        """Cancel the reads that nobody waits for any more."""
        tasks = list(self._pending.values())
        self._pending.clear()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.gather(*tasks, return_exceptions=True)
