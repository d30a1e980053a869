"""`NodePort` straight into a `StorageNode` of the same process and event loop.

Used where a socket would be ceremony: tests, benches of one layer, and cells that run in one
process.  Behaves as the data port does where a caller can tell: records are joined, deadlines are
kept, and a write that was not answered in time has an unknown outcome.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from protocol.errors import HaversackError, NodeUnavailable, UnknownOutcome
from protocol.hashing import Buffer
from protocol.ids import NodeId
from protocol.messages import (
    FindingsReply,
    InventoryReply,
    ItemStatus,
    LeaseReply,
    PutPurpose,
    ScrubAction,
    ScrubProgress,
    SummaryReply,
)
from storage_node.interface import FragmentKey, PutOutcome, StoredRecord, VerifiedRecord
from storage_node.node import StorageNode


class LocalPort:
    """One caller's view of one node; it holds nothing that needs closing."""

    def __init__(self, node: StorageNode) -> None:
        self._node = node
        self._closed = False

    @property
    def node_id(self) -> NodeId:
        """The node behind the port."""
        return self._node.node_id

    async def put(
        self,
        incarnation: int,
        records: Sequence[Sequence[Buffer]],
        deadline_s: float,
        *,
        purpose: PutPurpose = PutPurpose.CLIENT,
    ) -> PutOutcome:
        """See `NodePort.put`."""
        async with self._within(deadline_s, UnknownOutcome):
            joined = [b"".join(pieces) for pieces in records]
            return await self._node.put(incarnation, joined, purpose=purpose)

    async def get(self, keys: Sequence[FragmentKey], deadline_s: float) -> list[StoredRecord]:
        """See `NodePort.get`."""
        async with self._within(deadline_s, NodeUnavailable):
            return await self._node.get(keys)

    async def delete(
        self, incarnation: int, keys: Sequence[FragmentKey], deadline_s: float
    ) -> list[ItemStatus]:
        """See `NodePort.delete`."""
        async with self._within(deadline_s, UnknownOutcome):
            return await self._node.delete(incarnation, keys)

    async def lease(self, incarnation: int, lease_s: float, deadline_s: float) -> LeaseReply:
        """See `NodePort.lease`."""
        async with self._within(deadline_s, NodeUnavailable):
            return await self._node.lease(incarnation, lease_s)

    async def summary(self, deadline_s: float) -> SummaryReply:
        """See `NodePort.summary`."""
        async with self._within(deadline_s, NodeUnavailable):
            return await self._node.summary()

    async def inventory(
        self, after: FragmentKey | None, limit: int, deadline_s: float
    ) -> InventoryReply:
        """See `NodePort.inventory`."""
        async with self._within(deadline_s, NodeUnavailable):
            return await self._node.inventory(after, limit)

    async def verify(self, keys: Sequence[FragmentKey], deadline_s: float) -> list[VerifiedRecord]:
        """See `NodePort.verify`."""
        async with self._within(deadline_s, NodeUnavailable):
            found: list[VerifiedRecord] = []
            while len(found) < len(keys):
                answers = await self._node.verify(keys[len(found) :])
                found += [item for item in answers if item.status is not ItemStatus.NOT_SENT]
            return found

    async def scrub(
        self, action: ScrubAction, bytes_per_s: int, deadline_s: float
    ) -> ScrubProgress:
        """See `NodePort.scrub`."""
        async with self._within(deadline_s, NodeUnavailable):
            return await self._node.scrub(action, bytes_per_s)

    async def findings(
        self, after: FragmentKey | None, limit: int, deadline_s: float
    ) -> FindingsReply:
        """See `NodePort.findings`."""
        async with self._within(deadline_s, NodeUnavailable):
            return await self._node.findings(after, limit)

    async def close(self) -> None:
        """Refuse from now on.  Idempotent; the node goes on."""
        self._closed = True

    @asynccontextmanager
    async def _within(self, deadline_s: float, late: type[HaversackError]) -> AsyncIterator[None]:
        if self._closed:
            raise NodeUnavailable(f"the port to {self.node_id} is closed")
        try:
            async with asyncio.timeout(deadline_s):
                yield
        except TimeoutError as error:
            raise late(
                f"{self.node_id} gave no answer within {deadline_s:g} s",
                {"node": str(self.node_id)},
            ) from error
