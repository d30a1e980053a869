"""`NodePort` over the simulated network: what gateways and the placement service hold.

The twin of `storage_node.port_client.SocketPort`; it raises the same errors in the same cases:

    refused, unreachable, no handshake in time            NodeUnavailable
    put or delete sent, no answer                         UnknownOutcome
    anything else sent, no answer                         NodeUnavailable
    answered with an error                                that error

Built by `chaos/sim/world.py` for every `NodePool` and for the placement service.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chaos.sim.network import Connection, Network, NotSent, Unanswered
from chaos.sim.process import SimProcess
from protocol.errors import NodeUnavailable, UnknownOutcome
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


class SimPort:
    """One caller's connection to one life of a node; `greeting` is what the handshake proves."""

    def __init__(
        self,
        network: Network,
        source: SimProcess,
        node_id: NodeId,
        endpoint: str,
        cluster_id: str,
    ) -> None:
        self._network = network
        self._node_id = node_id
        self._connection = Connection(
            source, endpoint, greeting=(cluster_id, node_id), idempotent=True
        )

    @property
    def node_id(self) -> NodeId:
        return self._node_id

    async def put(
        self,
        incarnation: int,
        records: Sequence[Sequence[Buffer]],
        deadline_s: float,
        *,
        purpose: PutPurpose = PutPurpose.CLIENT,
    ) -> PutOutcome:
        """See `NodePort.put`.  The pieces are joined here: the wire keeps no reference."""
        sent = [b"".join(pieces) for pieces in records]
        outcome: PutOutcome = await self._change("put", (incarnation, sent, purpose), deadline_s)
        return outcome

    async def get(self, keys: Sequence[FragmentKey], deadline_s: float) -> list[StoredRecord]:
        """See `NodePort.get`."""
        answer: list[StoredRecord] = await self._look("get", (list(keys),), deadline_s)
        return answer

    async def delete(
        self, incarnation: int, keys: Sequence[FragmentKey], deadline_s: float
    ) -> list[ItemStatus]:
        """See `NodePort.delete`."""
        statuses: list[ItemStatus] = await self._change(
            "delete", (incarnation, list(keys)), deadline_s
        )
        return statuses

    async def lease(self, incarnation: int, lease_s: float, deadline_s: float) -> LeaseReply:
        """See `NodePort.lease`."""
        reply: LeaseReply = await self._look("lease", (incarnation, lease_s), deadline_s)
        return reply

    async def summary(self, deadline_s: float) -> SummaryReply:
        """See `NodePort.summary`."""
        reply: SummaryReply = await self._look("summary", (), deadline_s)
        return reply

    async def inventory(
        self, after: FragmentKey | None, limit: int, deadline_s: float
    ) -> InventoryReply:
        """See `NodePort.inventory`."""
        reply: InventoryReply = await self._look("inventory", (after, limit), deadline_s)
        return reply

    async def verify(self, keys: Sequence[FragmentKey], deadline_s: float) -> list[VerifiedRecord]:
        """See `NodePort.verify`: asks again for what the node did not get to."""
        found: list[VerifiedRecord] = []
        while len(found) < len(keys):
            answers: list[VerifiedRecord] = await self._look(
                "verify", (list(keys[len(found) :]),), deadline_s
            )
            found += [item for item in answers if item.status is not ItemStatus.NOT_SENT]
        return found

    async def scrub(
        self, action: ScrubAction, bytes_per_s: int, deadline_s: float
    ) -> ScrubProgress:
        """See `NodePort.scrub`."""
        progress: ScrubProgress = await self._look("scrub", (action, bytes_per_s), deadline_s)
        return progress

    async def findings(
        self, after: FragmentKey | None, limit: int, deadline_s: float
    ) -> FindingsReply:
        """See `NodePort.findings`."""
        reply: FindingsReply = await self._look("findings", (after, limit), deadline_s)
        return reply

    async def close(self) -> None:
        """Close the connection: requests under way fail as if it were lost.  Idempotent."""
        self._network.disconnect(self._connection)

    async def _look(self, method: str, args: tuple[Any, ...], deadline_s: float) -> Any:
        """A request that changes nothing a caller must know of."""
        try:
            return await self._network.call(self._connection, method, args, deadline_s)
        except (NotSent, Unanswered) as error:
            raise self._unavailable(error) from None

    async def _change(self, method: str, args: tuple[Any, ...], deadline_s: float) -> Any:
        """A request that may be carried out although no answer comes."""
        try:
            return await self._network.call(self._connection, method, args, deadline_s)
        except NotSent as error:
            raise self._unavailable(error) from None
        except Unanswered as error:
            raise UnknownOutcome(
                f"{self._node_id}: {error}", {"node": str(self._node_id)}
            ) from None

    def _unavailable(self, error: Exception) -> NodeUnavailable:
        return NodeUnavailable(f"{self._node_id}: {error}", {"node": str(self._node_id)})
