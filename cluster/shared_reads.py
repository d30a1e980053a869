"""Slots of small blocks that are read at the same time from one node: one frame for all of them.

Step 3 of the life of a get, between `stripe_read` and `node_pool`.  Each block keeps its own order
of slots, its own lateness and its own hedges; only the frame is shared.  Nothing waits for that: a
frame goes out in the turn of the loop after the one in which it was asked for.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final, NamedTuple

from cluster.grouping import GroupCall, Grouping
from cluster.node_pool import NodePool
from protocol.errors import CorruptFragment
from protocol.ids import NodeId
from protocol.limits import FRAME_BODY_BYTES_MAX, KIB
from storage_node.interface import FragmentKey, StoredRecord

SHARED_RECORD_BYTES_MAX: Final = 32 * KIB
"""Larger records are asked for alone: of them the bytes cost more than the request, and a small one
would wait for them."""

FRAME_READS_MAX: Final = 64
"""Records of one frame."""

READS_MAX: Final = 4_096
"""Small reads of one node under way: beyond what a gateway lets in."""

assert FRAME_READS_MAX * SHARED_RECORD_BYTES_MAX <= FRAME_BODY_BYTES_MAX


class _Read(NamedTuple):
    key: FragmentKey
    expected_bytes: int


class SharedReads:
    """Reads of single slots from all nodes; one per block client."""

    def __init__(self, pool: NodePool, rng: random.Random, deadline_s: float) -> None:
        """`deadline_s` is that of a frame; reads that have less time are asked for alone."""
        self._pool = pool
        self._rng = rng
        self._deadline_s = deadline_s
        self._groupings: dict[NodeId, Grouping[_Read, StoredRecord]] = {}
        self._ranks: dict[NodeId, float] = {}

    def rank(self, node_id: NodeId | None) -> float:
        """Where a node stands in the order in which replicas are asked: random, and the same for
        all blocks of one moment, so that they ask few nodes for much and not all for little."""
        if node_id is None:
            return 1.0
        rank = self._ranks.get(node_id)
        if rank is None:
            rank = self._ranks[node_id] = self._rng.random()
        return rank

    async def read(
        self, node_id: NodeId, key: FragmentKey, expected_bytes: int, deadline_s: float
    ) -> StoredRecord:
        """One record of a node.  Raises what `NodePool.read` raises, `Overloaded`, and
        `CorruptFragment` for an answer that is none."""
        read = _Read(key, expected_bytes)
        if expected_bytes > SHARED_RECORD_BYTES_MAX or deadline_s < self._deadline_s:
            return (await self._ask(node_id, (read,), deadline_s))[0]
        grouping = self._groupings.get(node_id)
        if grouping is None:
            grouping = self._groupings[node_id] = self._new_grouping(node_id)
        return await grouping.submit(read)

    def _new_grouping(self, node_id: NodeId) -> Grouping[_Read, StoredRecord]:
        async def run(calls: Sequence[GroupCall[_Read, StoredRecord]]) -> None:
            self._ranks.clear()
            reads = [call.item for call in calls]
            answers = await self._ask(node_id, reads, self._deadline_s)
            for call, answer in zip(calls, answers, strict=True):
                call.settle(answer)

        return Grouping(
            run,
            items_max=FRAME_READS_MAX,
            calls_max=READS_MAX,
            lanes=READS_MAX,  # no frame waits for another
            late_s=self._deadline_s,
        )

    async def _ask(
        self, node_id: NodeId, reads: Sequence[_Read], deadline_s: float
    ) -> list[StoredRecord]:
        # Judged by the size of one record: that is what a read of one is late in comparison with.
        expected_bytes = max(read.expected_bytes for read in reads)
        keys = [read.key for read in reads]
        answers = await self._pool.read(node_id, keys, expected_bytes, deadline_s)
        if len(answers) != len(keys):
            raise CorruptFragment(f"{node_id} answered {len(answers)} records for {len(keys)} keys")
        return answers
