"""A port to a node of the same process that fails the way a test says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from protocol.clock import Clock
from protocol.errors import HaversackError, NodeUnavailable, UnknownOutcome
from protocol.hashing import Buffer
from protocol.ids import BlockHash, NodeId
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
from storage_node.local_port import LocalPort
from storage_node.node import StorageNode


class Network(Protocol):
    """What the ports of one test share."""

    clock: Clock
    nodes: dict[NodeId, StorageNode]
    """Present processes: a port to an earlier one refuses."""
    faults: dict[NodeId, Faults]
    calls: list[str]
    """What reached a node, as "get node-01"."""
    call_times: list[float]


@dataclass
class Faults:
    """What is wrong with one node, as a client meets it."""

    refuses: Exception | None = None
    """Raised at once by every call, as by a process that is gone."""
    put_refuses: HaversackError | None = None
    is_stopped: bool = False
    """Nothing is answered before the deadline, and nothing is done."""
    loses_replies: bool = False
    """Puts are done and not answered."""
    delay_s: Callable[[], float] = field(default=lambda: 0.0)
    answers_as: int | None = None
    """Incarnation that puts claim to have been stored by."""
    put_statuses: dict[BlockHash, ItemStatus] = field(default_factory=dict)
    get_status: ItemStatus | None = None
    tamper: Callable[[bytes], bytes] | None = None
    """Applied to each record read."""


class FaultyPort:
    """A port whose faults are looked up at each call."""

    def __init__(self, cell: Network, node: StorageNode) -> None:
        self._cell = cell
        self._node = node
        self._inner = LocalPort(node)
        self._faults = cell.faults[node.node_id]
        self._clock = cell.clock

    @property
    def node_id(self) -> NodeId:
        return self._inner.node_id

    async def _arrive(self, what: str, deadline_s: float, late: type[HaversackError]) -> None:
        self._cell.calls.append(f"{what} {self.node_id}")
        self._cell.call_times.append(self._clock.monotonic())
        if self._cell.nodes[self.node_id] is not self._node:
            raise NodeUnavailable(f"{self.node_id}: that process is gone")
        if self._faults.refuses is not None:
            raise self._faults.refuses
        delay_s = self._faults.delay_s()
        if self._faults.is_stopped or delay_s >= deadline_s:
            await self._clock.sleep(deadline_s)
            raise late(f"{self.node_id} gave no answer in {deadline_s:.3f} s")
        if delay_s:
            await self._clock.sleep(delay_s)

    async def put(
        self,
        incarnation: int,
        records: Sequence[Sequence[Buffer]],
        deadline_s: float,
        *,
        purpose: PutPurpose = PutPurpose.CLIENT,
    ) -> PutOutcome:
        await self._arrive("put", deadline_s, UnknownOutcome)
        if self._faults.put_refuses is not None:
            raise self._faults.put_refuses
        outcome = await self._inner.put(incarnation, records, deadline_s, purpose=purpose)
        if self._faults.loses_replies:
            raise UnknownOutcome(f"{self.node_id}: the connection was lost")
        if self._faults.answers_as is not None:
            return PutOutcome(self._faults.answers_as, outcome.statuses)
        if self._faults.put_statuses:
            statuses = [
                self._faults.put_statuses.get(BlockHash(bytes(record[0][40:72])), status)
                for record, status in zip(records, outcome.statuses, strict=True)
            ]
            return PutOutcome(outcome.incarnation, statuses)
        return outcome

    async def get(self, keys: Sequence[FragmentKey], deadline_s: float) -> list[StoredRecord]:
        await self._arrive("get", deadline_s, NodeUnavailable)
        if self._faults.get_status is not None:
            return [StoredRecord(self._faults.get_status, None)] * len(keys)
        answers = await self._inner.get(keys, deadline_s)
        if self._faults.tamper is not None:
            return [
                StoredRecord(status, None if record is None else self._faults.tamper(bytes(record)))
                for status, record in answers
            ]
        return answers

    async def delete(
        self, incarnation: int, keys: Sequence[FragmentKey], deadline_s: float
    ) -> list[ItemStatus]:
        await self._arrive("delete", deadline_s, UnknownOutcome)
        return await self._inner.delete(incarnation, keys, deadline_s)

    async def lease(self, incarnation: int, lease_s: float, deadline_s: float) -> LeaseReply:
        return await self._inner.lease(incarnation, lease_s, deadline_s)

    async def summary(self, deadline_s: float) -> SummaryReply:
        await self._arrive("summary", deadline_s, NodeUnavailable)
        return await self._inner.summary(deadline_s)

    async def inventory(
        self, after: FragmentKey | None, limit: int, deadline_s: float
    ) -> InventoryReply:
        await self._arrive("inventory", deadline_s, NodeUnavailable)
        return await self._inner.inventory(after, limit, deadline_s)

    async def verify(self, keys: Sequence[FragmentKey], deadline_s: float) -> list[VerifiedRecord]:
        await self._arrive("verify", deadline_s, NodeUnavailable)
        return await self._inner.verify(keys, deadline_s)

    async def scrub(
        self, action: ScrubAction, bytes_per_s: int, deadline_s: float
    ) -> ScrubProgress:
        await self._arrive("scrub", deadline_s, NodeUnavailable)
        return await self._inner.scrub(action, bytes_per_s, deadline_s)

    async def findings(
        self, after: FragmentKey | None, limit: int, deadline_s: float
    ) -> FindingsReply:
        await self._arrive("findings", deadline_s, NodeUnavailable)
        return await self._inner.findings(after, limit, deadline_s)

    async def close(self) -> None:
        await self._inner.close()
