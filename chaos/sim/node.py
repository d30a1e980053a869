"""A storage-node process of a simulated cell: the real host and node on a simulated disk.

`NodeHost` opens the directory, registers, reopens after a failed write and tidies, as in a real
process; here it has no socket, no thread and no RocksDB.  The public methods are what
`chaos/sim/port.py` calls through the network.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from chaos.sim.disk import SimDisk
from chaos.sim.process import SimProcess
from protocol.clock import Clock
from protocol.errors import DirectoryForeign, HandshakeRefused
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
from storage_node import identity
from storage_node.host import NodeHost, Register, scrub_settings
from storage_node.identity import Identity
from storage_node.interface import (
    FragmentKey,
    FragmentStore,
    PutOutcome,
    StoredRecord,
    VerifiedRecord,
)
from storage_node.node import StorageNode
from storage_node.node_config import NodeConfig, NodeUpkeep
from storage_node.port_server import DataPort
from storage_node.rocks_store import RocksStore

CAPACITY_BYTES = 1 << 40

SCRUB_PERIOD_S = 60.0
"""A run lasts minutes: the scrubber must get round within them."""

LOOK_S_MIN = 3.0
"""A simulated host looks after its node this seldom: its frequent looks, mostly at nothing, would
be half of all steps of a run."""


@dataclass(frozen=True, slots=True)
class _Address:
    """All that a host asks of its data port."""

    endpoint: str


class _Unhurried:
    """A clock whose sleeps are never short."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.wall = clock.wall
        self.monotonic = clock.monotonic

    async def sleep(self, seconds: float) -> None:
        """At least `LOOK_S_MIN`."""
        await self._clock.sleep(max(seconds, LOOK_S_MIN))


class SimNode(NodeHost):
    """One life of a storage-node process."""

    def __init__(
        self,
        cluster_id: str,
        node_id: NodeId,
        directory: Path,
        disk: SimDisk,
        process: SimProcess,
        register: Register,
        clock: Clock,
        rng: random.Random,
        life: int,
        endpoint: str,
        node_class: type[StorageNode],
    ) -> None:
        config = NodeConfig(
            node_id=node_id,
            directory=str(directory),
            cluster_id=cluster_id,
            secret_file="",
            bind_host="",
            capacity_bytes=CAPACITY_BYTES,
            namespace="",
            registrar="",
            upkeep=NodeUpkeep(scrub_period_s=SCRUB_PERIOD_S),
        )
        super().__init__(config, register, _Unhurried(clock), rng.randbytes)
        self.life = life
        self.clock = clock
        self.port = cast(DataPort, _Address(endpoint))
        self.node = node_class(
            Identity(cluster_id, node_id, "unknown"),
            None,
            clock,
            disk.run,
            run_slow=disk.run,
            pid=life,
            scrub=scrub_settings(config.upkeep),
        )
        self._disk = disk
        self._process = process

    async def main(self) -> None:
        """From start to death."""
        async with asyncio.TaskGroup() as tasks:
            for work in self._duties():
                tasks.create_task(work)

    async def _in_thread(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await self._disk.run(work, *arguments)

    def _give_memory_back(self) -> None:
        """Not ours alone to give."""

    def _open_directory(self) -> tuple[Identity, RocksStore]:
        """The checks of the real one, with the memory twin behind them."""
        owner = identity.load(self._directory)
        if (owner.cluster_id, owner.node_id) != (self.config.cluster_id, self.config.node_id):
            raise DirectoryForeign(f"{self._directory} belongs to {owner.node_id}")
        store: FragmentStore = self._disk.open(self._process)
        return owner, cast(RocksStore, store)

    # -- the data port -------------------------------------------------------------------------

    async def greet(self, cluster_id: str, node_id: NodeId) -> None:
        """The handshake, without its cryptography."""
        if (cluster_id, node_id) != (self.config.cluster_id, self.config.node_id):
            raise HandshakeRefused(f"this is {self.config.node_id}, not {node_id}")

    async def put(
        self, incarnation: int, records: Sequence[Buffer], purpose: PutPurpose
    ) -> PutOutcome:
        """See `StorageNode.put`."""
        return await self.node.put(incarnation, records, purpose=purpose)

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

    async def verify(self, keys: Sequence[FragmentKey]) -> list[VerifiedRecord]:
        """See `StorageNode.verify`."""
        return await self.node.verify(keys)

    async def scrub(self, action: ScrubAction, bytes_per_s: int) -> ScrubProgress:
        """See `StorageNode.scrub`."""
        return await self.node.scrub(action, bytes_per_s)

    async def findings(self, after: FragmentKey | None, limit: int) -> FindingsReply:
        """See `StorageNode.findings`."""
        return await self.node.findings(after, limit)
