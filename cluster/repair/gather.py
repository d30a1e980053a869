"""Reads what is left of many stripes of one volume: k good fragments of each, in few large frames.

The reading half of a move (`executor`, step "copy").  Talks to nodes through `NodePool`; may not
import SQL or Ray.

All stripes of a batch are asked of the same k slots first, one frame a node; whatever is missing
from their answers is asked of the slots that are left, round by round.  A failure that may pass
(the node does not answer) is told apart from one that will not (its disk says that the fragment is
not there, or is wrong): only the second makes a block unrepairable.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.block_index import BlockRow
from cluster.node_pool import Direction, NodePool
from cluster.stripe_read import DiskError, expected_record_bytes, open_record
from cluster.topology import VolumeView
from erasure.fragment import Fragment
from protocol.errors import (
    CorruptFragment,
    FragmentNotFound,
    HaversackError,
    NeedsRepair,
    NodeUnavailable,
)
from protocol.ids import BlockHash, NodeId
from storage_node.interface import FragmentKey, StoredRecord

OpenAnswer = Callable[[BlockRow, int, StoredRecord], Fragment]
"""`open_record`, or `open_unproven`."""


@dataclass(slots=True)
class StripeParts:
    """What was found of one stripe."""

    row: BlockRow
    fragments: dict[int, Fragment] = field(default_factory=dict)
    """By slot, checked as far as was asked for."""
    failures: dict[int, HaversackError] = field(default_factory=dict)
    """Why the other slots that were asked gave nothing."""

    def may_come_back(self, k: int) -> bool:
        """Whether enough slots failed for a reason that passes."""
        passing = sum(not is_final(error) for error in self.failures.values())
        return len(self.fragments) + passing >= k


def is_final(error: HaversackError) -> bool:
    """Whether a fragment is gone or wrong, as opposed to out of reach.  A disk that cannot read
    says nothing about what is there."""
    return isinstance(error, NeedsRepair) and not isinstance(error, DiskError)


class Gatherer:
    """Reads stripes of one volume from all slots but those being made."""

    def __init__(
        self,
        pool: NodePool,
        volume: VolumeView,
        sources: Mapping[int, NodeId],
        call_s: float,
    ) -> None:
        """`sources`: the nodes to read from, by slot."""
        self._pool = pool
        self._volume = volume
        self._sources = dict(sources)
        self._call_s = call_s

    async def gather(
        self,
        rows: Sequence[BlockRow],
        wanted: int,
        distrusted: Mapping[BlockHash, Collection[int]],
        open_answer: OpenAnswer = open_record,
    ) -> list[StripeParts]:
        """At least `wanted` fragments of each stripe where there are so many, in order of `rows`.
        `distrusted`: slots of a block that are known to be bad; `open_answer`: how far a fragment
        is checked here."""
        stripes = [StripeParts(row) for row in rows]
        order = self._order()
        while True:
            asked: dict[int, list[StripeParts]] = {}
            for stripe in stripes:
                bad = distrusted.get(stripe.row.hash, ())
                left = [
                    slot
                    for slot in order
                    if slot not in stripe.fragments
                    and slot not in stripe.failures
                    and slot not in bad
                ]
                for slot in left[: max(0, wanted - len(stripe.fragments))]:
                    asked.setdefault(slot, []).append(stripe)
            if not asked:
                return stripes
            async with asyncio.TaskGroup() as tasks:
                for slot, wanting in asked.items():
                    tasks.create_task(
                        self.read_slot(self._sources[slot], slot, wanting, open_answer)
                    )

    def _order(self) -> list[int]:
        """Data slots on trusted nodes, then parity slots on them, then the others.  Parity is
        turned by the volume's number, so that no node is always the one that is spared."""
        k, n = self._volume.scheme.k, self._volume.scheme.n
        turn = int(self._volume.volume_id)

        def rank(slot: int) -> tuple[bool, bool, int]:
            trusted = self._pool.is_trusted(self._sources[slot], Direction.READ)
            is_parity = slot >= k
            return not trusted, is_parity, (slot - turn) % n if is_parity else slot

        return sorted(self._sources, key=rank)

    async def read_slot(
        self,
        node_id: NodeId,
        slot: int,
        stripes: Sequence[StripeParts],
        open_answer: OpenAnswer = open_record,
    ) -> None:
        """Ask one node for its fragments of these stripes; never raises for what it answers."""
        keys = [FragmentKey(self._volume.volume_id, part.row.hash, slot) for part in stripes]
        size = sum(expected_record_bytes(part.row, self._volume) for part in stripes)
        try:
            answers = await self._pool.read(node_id, keys, size, self._call_s)
        except HaversackError as error:
            failure = error if not is_final(error) else NodeUnavailable(error.message)
            for part in stripes:
                part.failures[slot] = failure
            return
        for part, answer in zip(stripes, answers, strict=True):
            try:
                part.fragments[slot] = open_answer(part.row, slot, answer)
            except HaversackError as error:
                part.failures[slot] = error


def what_failed(parts: StripeParts) -> str:
    """For people: each slot that gave nothing and why, in a word."""
    words = []
    for slot, error in sorted(parts.failures.items()):
        match error:
            case FragmentNotFound():
                word = "missing"
            case CorruptFragment():
                word = "corrupt"
            case _:
                word = error.kind
        words.append(f"{slot} {word}")
    return ", ".join(words)
