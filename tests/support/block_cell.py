"""A small cell in one process for tests of the block client: memory stores, a real `cell.db` in
memory, virtual time, and nodes that fail the way a test says.

The test plays the placement service: it opens and seals volumes and counts incarnations through
the same functions that the real one uses.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sqlalchemy import Connection, delete, select, update

from chaos.sim.clock import VirtualClock
from chaos.sim.loop import SimLoop
from cluster import map_rows
from cluster.block_client import BlockClient
from cluster.block_client_settings import BlockClientSettings, FragmentProblem
from cluster.block_index import BlockIndex, BlockRow
from cluster.cell import NodeSpec, create_cell, prepare_schema
from cluster.node_pool import NodePool
from cluster.schema import blocks, debts, nodes, volume_slots, volumes
from cluster.topology import NodeState, NodeView
from cluster.volume_map import VolumeMap
from erasure.codec import Codec
from erasure.fragment import parse_expected
from erasure.keyring import Keyring
from erasure.scheme import Scheme
from protocol.clock import Clock
from protocol.errors import HaversackError, NodeUnavailable, UnknownOutcome
from protocol.hashing import Buffer, hash_block
from protocol.ids import BlockHash, NodeId, VolumeId
from protocol.messages import InventoryReply, ItemStatus, LeaseReply, SummaryReply
from sql.database import Database
from storage_node.identity import Identity
from storage_node.interface import FragmentKey, NodePort, PutOutcome, StoredRecord
from storage_node.local_port import LocalPort
from storage_node.memory_store import MemoryStore
from storage_node.node import StorageNode

T = TypeVar("T")

LEASE_S = 1e6
OWNER = 7


def data_of(seed: int, size: int = 200_000) -> bytes:
    """Bytes that do not compress; large enough by default for the cell's own scheme."""
    return random.Random(seed).randbytes(size)


async def run_inline(function: Callable[..., T], *args: Any) -> T:
    """The `run` of tests: no threads."""
    return function(*args)


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

    def __init__(self, cell: BlockCell, node: StorageNode) -> None:
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
        self, incarnation: int, records: Sequence[Sequence[Buffer]], deadline_s: float
    ) -> PutOutcome:
        await self._arrive("put", deadline_s, UnknownOutcome)
        if self._faults.put_refuses is not None:
            raise self._faults.put_refuses
        outcome = await self._inner.put(incarnation, records, deadline_s)
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

    async def close(self) -> None:
        await self._inner.close()


class BlockCell:
    """Nodes, map, index and client.  Create it with `simulate`."""

    def __init__(
        self,
        clock: Clock,
        scheme: Scheme,
        nodes: int,
        seed: int,
        keyring: Keyring | None = None,
        **settings: Any,
    ) -> None:
        self.clock = clock
        self.scheme = scheme
        self.rng = random.Random(seed)
        self.db = Database("sqlite://", inline=True)
        prepare_schema(self.db)
        self.node_ids = [NodeId.numbered(number + 1) for number in range(nodes)]
        specs = [
            NodeSpec(node_id, f"store-{node_id}", f"/{node_id}", "host", "rack")
            for node_id in self.node_ids
        ]
        create_cell(self.db, clock, "cell-of-tests", scheme, specs)
        self.index = BlockIndex(self.db, clock)
        self.map = VolumeMap(self.db, clock)
        self.stores = {node_id: MemoryStore() for node_id in self.node_ids}
        self.nodes: dict[NodeId, StorageNode] = {}
        self.faults = {node_id: Faults() for node_id in self.node_ids}
        self.calls: list[str] = []
        """What reached a node, as "get node-01"."""
        self.call_times: list[float] = []
        self.volumes_opened: list[VolumeId] = []
        self.problems: list[FragmentProblem] = []
        self.keyring = keyring
        self.settings = BlockClientSettings(scheme=scheme, **settings)
        self.codec = Codec()
        self.pool, self.client = self.new_client(seed)

    def new_client(self, seed: int) -> tuple[NodePool, BlockClient]:
        """A client as another gateway has it: it shares the cell and nothing else."""
        volume_map = VolumeMap(self.db, self.clock)
        pool = NodePool(volume_map, self._connect, self.clock, random.Random(seed))
        client = BlockClient(
            BlockIndex(self.db, self.clock),
            volume_map,
            pool,
            self.codec,
            self.keyring,
            self.clock,
            random.Random(seed + 1),
            run_inline,
            self.settings,
            self.problems.append,
        )
        return pool, client

    def _connect(self, view: NodeView) -> NodePort:
        return FaultyPort(self, self.nodes[view.node_id])

    # -- what the placement service would do -----------------------------------------------------

    async def start(self, volumes: int = 3) -> None:
        """Start all nodes and open volumes for both schemes."""
        for node_id in self.node_ids:
            await self.start_node(node_id)
        for _ in range(volumes):
            self.open_volume(self.scheme)
            self.open_volume(self.scheme.small_twin())

    async def start_node(self, node_id: NodeId) -> None:
        """A new life of a node: next incarnation, next endpoint, lease."""

        def work(connection: Connection) -> int:
            version = map_rows.next_version(connection)
            connection.execute(
                update(nodes)
                .where(nodes.c.node_id == str(node_id))
                .values(
                    incarnation=nodes.c.incarnation + 1,
                    endpoint=f"host:{version}",
                    state=NodeState.UP.value,
                    changed=version,
                )
            )
            view = map_rows.read_node(connection, node_id)
            assert view is not None
            return view.incarnation

        incarnation = self.db.transact(work)
        self._replace_node(node_id)
        await self.nodes[node_id].lease(incarnation, LEASE_S)

    def _replace_node(self, node_id: NodeId) -> None:
        """Another process in front of the same disk; the old one is gone from the network."""
        identity = Identity("cell-of-tests", node_id, f"store-{node_id}")
        self.nodes[node_id] = StorageNode(identity, self.stores[node_id], self.clock, run_inline)

    def set_state(self, node_id: NodeId, state: NodeState) -> None:
        """Change a node's state in the map."""
        self.db.transact(
            lambda connection: map_rows.set_node_state(
                connection, node_id, state, 0.0, "", map_rows.next_version(connection)
            )
        )

    def open_volume(self, scheme: Scheme, slots: Sequence[NodeId | None] | None = None) -> VolumeId:
        """Open a volume on these nodes, or on a random choice (short of nodes, with vacancies)."""
        if slots is None:
            picked = self.rng.sample(self.node_ids, min(scheme.n, len(self.node_ids)))
            slots = [*picked, *([None] * (scheme.n - len(picked)))]
        planned = [(scheme, tuple(slots))]
        (volume_id,) = self.db.transact(
            lambda connection: map_rows.insert_volumes(
                connection, planned, 0.0, map_rows.next_version(connection)
            )
        )
        self.volumes_opened.append(volume_id)
        return volume_id

    def seal_volume(self, volume_id: VolumeId) -> None:
        """No more puts."""
        self.db.transact(
            lambda connection: map_rows.seal_volume(
                connection, volume_id, map_rows.next_version(connection)
            )
        )

    def raise_epoch(self, volume_id: VolumeId) -> None:
        """A change of the volume's slots, as far as clients and nodes can tell."""

        def work(connection: Connection) -> None:
            connection.execute(
                update(volumes)
                .where(volumes.c.volume_id == int(volume_id))
                .values(epoch=volumes.c.epoch + 1, changed=map_rows.next_version(connection))
            )

        self.db.transact(work)

    async def move_slots(self, block: BlockHash, moves: dict[int, NodeId]) -> None:
        """What a repair does to a volume of one block: copy fragments, then change the map."""
        volume_id = (await self.index.lookup([block]))[block].volume
        await self.map.refresh()
        old = await self.map.volume(volume_id)
        for slot, target in moves.items():
            key = FragmentKey(volume_id, block, slot)
            source = old.slots[slot]
            assert source is not None
            (answer,) = self.stores[source].get_many([key])
            assert answer.record is not None
            self.stores[target].put_group([(key, answer.record)])
            self.stores[source].delete_group([key])

        def work(connection: Connection) -> None:
            for slot, target in moves.items():
                connection.execute(
                    update(volume_slots)
                    .where(volume_slots.c.volume_id == int(volume_id), volume_slots.c.slot == slot)
                    .values(node_id=str(target))
                )

        self.db.transact(work)
        self.raise_epoch(volume_id)

    def remove_block(self, block: BlockHash) -> None:
        """What the collector does in the end: no fragment, no row."""
        for store in self.stores.values():
            keys = [key for key, _ in store.inventory(None, 10_000)[0] if key.block == block]
            store.delete_group(keys)
        self.db.transact(
            lambda connection: connection.execute(
                delete(blocks).where(blocks.c.hash == bytes(block))
            )
        )

    def all_rows(self) -> list[BlockRow]:
        """The whole block index."""

        def work(connection: Connection) -> list[BlockRow]:
            query = select(
                blocks.c.hash, blocks.c.volume_id, blocks.c.stored_bytes, blocks.c.plain_bytes
            ).order_by(blocks.c.hash)
            return [
                BlockRow(BlockHash(name), VolumeId(volume), stored, plain)
                for name, volume, stored, plain in connection.execute(query)
            ]

        return self.db.read_now(work)

    def all_debts(self) -> set[tuple[VolumeId, int, BlockHash]]:
        """The whole table of debts."""

        def work(connection: Connection) -> set[tuple[VolumeId, int, BlockHash]]:
            query = select(debts.c.volume_id, debts.c.slot, debts.c.hash)
            return {
                (VolumeId(volume), slot, BlockHash(name))
                for volume, slot, name in connection.execute(query)
            }

        return self.db.read_now(work)

    def exchange(self, node_id: NodeId, one: FragmentKey, other: FragmentKey) -> None:
        """Two records of one disk, or of two, change places under their keys."""
        store = self.stores[node_id]
        first, second = store.get_many([one, other])
        assert first.record is not None
        assert second.record is not None
        store.put_group([(one, second.record), (other, first.record)])

    def holds(self, node_id: NodeId, volume: VolumeId, block: BlockHash, slot: int) -> bool:
        """Whether a node's disk has a good fragment."""
        (answer,) = self.stores[node_id].get_many([FragmentKey(volume, block, slot)])
        if answer.record is None:
            return False
        parse_expected(answer.record, volume, block, slot)
        return True

    # -- faults ----------------------------------------------------------------------------------

    def kill(self, *node_ids: NodeId) -> None:
        """These processes are gone; nobody has told the map."""
        for node_id in node_ids:
            self.faults[node_id].refuses = NodeUnavailable(f"{node_id}: connection refused")

    def heal(self) -> None:
        """All faults are over."""
        for faults in self.faults.values():
            faults.__init__()  # type: ignore[misc]

    # -- use -------------------------------------------------------------------------------------

    async def put(self, data: bytes, owner: int = OWNER) -> Any:
        """Put one block in two parts."""
        half = len(data) // 2
        parts = (data[:half], memoryview(data)[half:])
        return await self.client.put(owner, hash_block(data), parts, len(data))

    async def get(self, data: bytes) -> bytes:
        """Read back a block that should hold `data`."""
        return bytes(await self.client.get(hash_block(data)))


def simulate(
    main: Callable[[BlockCell], Awaitable[None]],
    *,
    scheme: str = "rs-6-3",
    nodes: int = 9,
    volumes: int = 3,
    seed: int = 1,
    shuffle: bool = True,
    keyring: Keyring | None = None,
    **settings: Any,
) -> None:
    """Run `main` on a fresh cell under virtual time.

    Fails if a task is left running, or one failed and nobody looked.
    """
    loop = SimLoop(shuffle=random.Random(seed) if shuffle else None, steps_max=5_000_000)

    async def whole() -> None:
        clock = VirtualClock(loop)
        cell = BlockCell(clock, Scheme.parse(scheme), nodes, seed, keyring, **settings)
        await cell.start(volumes)
        before = asyncio.all_tasks()
        await main(cell)
        await cell.pool.aclose()
        left = [task.get_name() for task in asyncio.all_tasks() - before]
        assert left == [], f"tasks left behind: {left}"
        cell.db.close()

    try:
        loop.run_until_complete(whole())
        assert loop.unnoticed_failures() == []
    finally:
        loop.close()
