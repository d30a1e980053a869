"""A small cell in one process for tests of the block client: memory stores, a real `cell.db` in
memory, virtual time, and nodes that fail the way a test says.

The test plays the placement service, through `cell_rows.Rows`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from cell_rows import CLUSTER_ID, Rows, node_spec
from faulty_port import Faults, FaultyPort
from sqlalchemy import Connection, delete, insert, select, update

from chaos.sim.clock import VirtualClock
from chaos.sim.loop import SimLoop
from cluster import map_rows
from cluster.block_client import BlockClient
from cluster.block_client_settings import BlockClientSettings, FragmentProblem
from cluster.block_index import BlockIndex, BlockRow
from cluster.cell import create_cell, prepare_schema
from cluster.node_pool import NodePool
from cluster.schema import blocks, debts, volume_slots, volumes
from cluster.topology import NodeState, NodeView
from cluster.volume_map import VolumeMap
from erasure.codec import Codec
from erasure.fragment import parse_expected
from erasure.keyring import Keyring
from erasure.scheme import Scheme
from protocol.clock import Clock
from protocol.errors import NodeUnavailable
from protocol.hashing import hash_block
from protocol.ids import BlockHash, NodeId, VolumeId
from sql.database import Database
from storage_node.identity import Identity
from storage_node.interface import FragmentKey, FragmentStore, NodePort
from storage_node.memory_store import MemoryStore
from storage_node.node import StorageNode

T = TypeVar("T")

LEASE_S = 1e6
OWNER = 7
RS = Scheme.parse("rs-6-3")
REPLICA = RS.small_twin()


def data_of(seed: int, size: int = 200_000) -> bytes:
    """Bytes that do not compress; large enough by default for the cell's own scheme."""
    return random.Random(seed).randbytes(size)


async def run_inline(function: Callable[..., T], *args: Any) -> T:
    """The `run` of tests: no threads."""
    return function(*args)


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
        self.db = self._make_database()
        self.node_ids = [NodeId.numbered(number + 1) for number in range(nodes)]
        specs = [node_spec(number + 1) for number in range(nodes)]
        create_cell(self.db, clock, CLUSTER_ID, scheme, specs)
        self.rows = Rows(self.db)
        self.index = BlockIndex(self.db, clock)
        self.map = VolumeMap(self.db, clock)
        self.stores = {node_id: self._make_store(node_id) for node_id in self.node_ids}
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

    def _make_database(self) -> Database:
        database = Database("sqlite://", inline=True)
        prepare_schema(database)
        return database

    def _make_store(self, node_id: NodeId) -> FragmentStore:
        return MemoryStore()

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
        """A new life of a node: another process in front of the same disk, the next incarnation.
        The old process is gone from the network."""

        incarnation = self.rows.register(self._number(node_id))
        identity = Identity(CLUSTER_ID, node_id, f"store-{self._number(node_id)}")
        self.nodes[node_id] = StorageNode(identity, self.stores[node_id], self.clock, run_inline)
        await self.nodes[node_id].lease(incarnation, LEASE_S)

    def set_state(self, node_id: NodeId, state: NodeState) -> None:
        """Change a node's state in the map."""
        self.rows.set_state(self._number(node_id), state)

    def open_volume(self, scheme: Scheme, slots: Sequence[NodeId | None] | None = None) -> VolumeId:
        """Open a volume on these nodes, or on a random choice (short of nodes, with vacancies)."""
        if slots is None:
            picked = self.rng.sample(self.node_ids, min(scheme.n, len(self.node_ids)))
            slots = [*picked, *([None] * (scheme.n - len(picked)))]
        volume_id = self.rows.open_volume(scheme, tuple(slots)).volume_id
        self.volumes_opened.append(volume_id)
        return volume_id

    def seal_volume(self, volume_id: VolumeId) -> None:
        """No more puts."""
        self.rows.seal(volume_id)

    def _number(self, node_id: NodeId) -> int:
        return self.node_ids.index(node_id) + 1

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

    def take_row(self, block: BlockHash) -> dict[str, Any]:
        """Take a block's row away, as if its put had not come to its end; returns its values."""

        def work(connection: Connection) -> dict[str, Any]:
            row = connection.execute(select(blocks).where(blocks.c.hash == bytes(block))).one()
            connection.execute(delete(blocks).where(blocks.c.hash == bytes(block)))
            return dict(row._mapping)

        return self.db.transact(work)

    def give_row(self, values: dict[str, Any]) -> None:
        """Put a row of `take_row` back."""
        self.db.transact(lambda connection: connection.execute(insert(blocks), values))

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

    # -- what is where ---------------------------------------------------------------------------

    async def row_of(self, data: bytes) -> BlockRow | None:
        """The row of the block that `data` is, if it is in the index."""
        return (await self.index.lookup([hash_block(data)])).get(hash_block(data))

    async def slots_of(self, data: bytes) -> tuple[NodeId, ...]:
        """The nodes of a block's volume, by slot; none may be vacant."""
        row = await self.row_of(data)
        assert row is not None
        await self.map.refresh()
        volume = await self.map.volume(row.volume)
        assert all(volume.slots)
        return tuple(node_id for node_id in volume.slots if node_id is not None)

    async def slots_held(self, data: bytes) -> list[int]:
        """Slots of a block whose fragment is on the disk of the node that the map names."""
        row = await self.row_of(data)
        assert row is not None
        await self.map.refresh()
        volume = await self.map.volume(row.volume)
        return [
            slot
            for slot, node_id in enumerate(volume.slots)
            if node_id is not None and self.holds(node_id, row.volume, row.hash, slot)
        ]

    # -- use -------------------------------------------------------------------------------------

    async def put(self, data: bytes, owner: int = OWNER) -> Any:
        """Put one block in two parts."""
        half = len(data) // 2
        parts = (data[:half], memoryview(data)[half:])
        return await self.client.put(owner, hash_block(data), parts, len(data))

    async def get(self, data: bytes) -> bytes:
        """Read back a block that should hold `data`."""
        return bytes(await self.client.get(hash_block(data)))


def _belongs_to_a_dead(task: asyncio.Task[Any]) -> bool:
    """Whether the simulated process that ran it was killed: its tasks never end."""
    process = getattr(task, "process", None)
    return process is not None and not process.alive


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
        left = [
            task.get_name() for task in asyncio.all_tasks() - before if not _belongs_to_a_dead(task)
        ]
        assert left == [], f"tasks left behind: {left}"
        cell.db.close()

    try:
        loop.run_until_complete(whole())
        failed = [task for task in loop.unnoticed_failures() if not _belongs_to_a_dead(task)]
        assert [(task.get_name(), task.exception()) for task in failed] == []
    finally:
        loop.close()
