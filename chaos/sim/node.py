"""A storage-node process of a simulated cell: the real `StorageNode` on a simulated disk.

Does what `storage_node/actor.py` does at a start: look at the directory's identity, wait for the
disk, open the store, listen on a fresh port, register until there is a lease; after a failed write
close the store and open it again.  Its public methods are what `chaos/sim/port.py` calls through
the network.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from chaos.sim.disk import SimDisk
from chaos.sim.process import SimProcess
from protocol.clock import Clock
from protocol.errors import (
    DirectoryCorrupt,
    DirectoryForeign,
    DirectoryInUse,
    HandshakeRefused,
    HaversackError,
)
from protocol.hashing import Buffer
from protocol.ids import NodeId
from protocol.messages import InventoryReply, ItemStatus, LeaseReply, SummaryReply
from storage_node import identity
from storage_node.identity import Identity
from storage_node.interface import FragmentKey, NodeRegistration, PutOutcome, StoredRecord
from storage_node.node import StorageNode
from storage_node.service_state import ServiceState

OPEN_RETRY_S = 1.0
"""Between two looks at a directory that is in use or not our own."""

REGISTER_RETRY_S = 1.0
"""Between two registrations while there is no lease."""

Register = Callable[[NodeRegistration], Awaitable[None]]


class SimNode:
    """One life of a storage-node process."""

    def __init__(
        self,
        expected: Identity,
        directory: Path,
        disk: SimDisk,
        process: SimProcess,
        clock: Clock,
        life: int,
        node_class: type[StorageNode] = StorageNode,
    ) -> None:
        self.life = life
        self.clock = clock
        self.node = node_class(expected, None, clock, disk.run, pid=life)
        self._expected = expected
        self._directory = directory
        self._disk = disk
        self._process = process

    async def main(self, endpoint: str, register: Register) -> None:
        """From start to death."""
        registration = NodeRegistration(
            self.node.node_id,
            self._expected.store_id,
            endpoint,
            self.life,
            str(self._directory),
            1 << 40,
        )
        while True:
            if self.node.state is ServiceState.FAILED:
                await self._reopen()
            elif self.node.state is not ServiceState.SERVING:
                self._open()
            if self.node.state is ServiceState.SERVING and not self.node.has_lease:
                with contextlib.suppress(HaversackError):  # placement is away: ask again
                    await register(registration)
            await self.clock.sleep(REGISTER_RETRY_S)

    def _open(self) -> None:
        try:
            identity.expect(self._directory, self._expected)
            store = self._disk.open(self._process)
        except (DirectoryForeign, DirectoryCorrupt) as error:
            self.node.refuse(str(error))
        except DirectoryInUse:
            pass  # another life still holds it
        else:
            self.node.attach(store)

    async def _reopen(self) -> None:
        store = self.node.detach()
        if store is not None:
            store.close()
        self._open()

    # -- the data port -------------------------------------------------------------------------

    async def greet(self, cluster_id: str, node_id: NodeId) -> None:
        """The handshake, without its cryptography."""
        if (cluster_id, node_id) != (self._expected.cluster_id, self._expected.node_id):
            raise HandshakeRefused(f"this is {self._expected.node_id}, not {node_id}")

    async def put(self, incarnation: int, records: Sequence[Buffer]) -> PutOutcome:
        """See `StorageNode.put`."""
        return await self.node.put(incarnation, records)

    async def get(self, keys: Sequence[FragmentKey]) -> list[StoredRecord]:
        """See `StorageNode.get`."""
        return await self.node.get(keys)

    async def delete(self, incarnation: int, keys: Sequence[FragmentKey]) -> list[ItemStatus]:
        """See `StorageNode.delete`."""
        return await self.node.delete(incarnation, keys)

    async def lease(self, incarnation: int, lease_s: float) -> LeaseReply:
        """See `StorageNode.lease`."""
        return await self.node.lease(incarnation, lease_s)

    async def summary(self) -> SummaryReply:
        """See `StorageNode.summary`."""
        return await self.node.summary()

    async def inventory(self, after: FragmentKey | None, limit: int) -> InventoryReply:
        """See `StorageNode.inventory`."""
        return await self.node.inventory(after, limit)
