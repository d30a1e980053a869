"""CPU of the block client: its own work, the codec, the map and the index, without the nodes.

`python -m bench.block_client` prints the figures of `docs/design/009-put-and-get.md`.  Nine nodes
in the same process acknowledge at once and look at nothing; `cell.db` is in memory.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import structlog
import uvloop

from cluster.block_client import BlockClient
from cluster.block_client_settings import BlockClientSettings, PutResult
from cluster.block_index import BlockIndex
from cluster.cell import NodeSpec, create_cell, prepare_schema
from cluster.node_pool import NodePool
from cluster.placement_service import PlacementService
from cluster.topology import NodeView
from cluster.volume_map import VolumeMap
from erasure.codec import Codec
from erasure.fragment import peek_key
from erasure.scheme import Scheme
from protocol.allocator import reuse_large_buffers
from protocol.clock import SystemClock
from protocol.errors import NodeUnavailable
from protocol.hashing import Buffer, hash_block
from protocol.ids import BlockHash, NodeId
from protocol.limits import KIB, MIB
from protocol.messages import ItemStatus, PutPurpose
from sql.database import Database
from storage_node.identity import Identity
from storage_node.interface import (
    FragmentKey,
    NodePort,
    NodeRegistration,
    PutOutcome,
    StoredRecord,
)
from storage_node.local_port import LocalPort
from storage_node.memory_store import MemoryStore
from storage_node.node import StorageNode

NODES = 9
LARGE_BLOCKS = 72
SMALL_BLOCKS = 4_000
CALLERS = 32


class _Memory:
    """What the nodes of one bench remember, and who of them is gone."""

    def __init__(self) -> None:
        self.keeps = True
        self.records: dict[bytes, bytes] = {}
        self.dead: set[NodeId] = set()


class _FreePort(LocalPort):
    """Acknowledges at once."""

    def __init__(self, node: StorageNode, memory: _Memory) -> None:
        super().__init__(node)
        self._memory = memory

    async def put(
        self,
        incarnation: int,
        records: Sequence[Sequence[Buffer]],
        deadline_s: float,
        *,
        purpose: PutPurpose = PutPurpose.CLIENT,
    ) -> PutOutcome:
        if self._memory.keeps:
            for record in records:
                volume, block, slot, _ = peek_key(joined := b"".join(record))
                self._memory.records[FragmentKey(volume, block, slot).pack()] = joined
        return PutOutcome(incarnation, [ItemStatus.OK] * len(records))

    async def get(self, keys: Sequence[FragmentKey], deadline_s: float) -> list[StoredRecord]:
        if self.node_id in self._memory.dead:
            raise NodeUnavailable(f"{self.node_id} is switched off")
        return [StoredRecord(ItemStatus.OK, self._memory.records[key.pack()]) for key in keys]


class _Bench:
    """A cell of nodes, map, index and client in one process and one event loop."""

    def __init__(self) -> None:
        self._clock = SystemClock()
        self.memory = _Memory()
        self._executor = ThreadPoolExecutor(2)
        self._db = Database("sqlite://", inline=True)
        self._nodes: dict[NodeId, StorageNode] = {}
        self._scheme = Scheme.parse("rs-6-3")

    async def start(self) -> None:
        """Create the cell, lease the nodes, open volumes."""
        names = [NodeId.numbered(number + 1) for number in range(NODES)]
        specs = [NodeSpec(name, f"store-{name}", "", "host", "rack") for name in names]
        prepare_schema(self._db)
        create_cell(self._db, self._clock, "bench", self._scheme, specs)
        placement = PlacementService(
            self._db,
            self._clock,
            random.Random(1),
            lambda view: LocalPort(self._nodes[view.node_id]),
        )
        await placement.start()
        for spec in specs:
            identity = Identity("bench", spec.node_id, spec.store_id)
            self._nodes[spec.node_id] = StorageNode(
                identity, MemoryStore(), self._clock, self._run_now
            )
            await placement.register(
                NodeRegistration(spec.node_id, spec.store_id, "here", 1, "", 1 << 40)
            )
        for node in self._nodes.values():
            await node.lease(node.incarnation, 3600.0)
        await placement.step()
        await placement.stop()
        volume_map = VolumeMap(self._db, self._clock)
        rng = random.Random(2)
        self.pool = NodePool(volume_map, self._connect, self._clock, rng)
        self.client = BlockClient(
            BlockIndex(self._db, self._clock),
            volume_map,
            self.pool,
            Codec(),
            None,
            self._clock,
            rng,
            self._run,
            BlockClientSettings(scheme=self._scheme),
        )

    def switch_off(self, count: int) -> None:
        """Reads of the first nodes fail from now on."""
        self.memory.dead.update(sorted(self._nodes)[:count])

    def _connect(self, view: NodeView) -> NodePort:
        return _FreePort(self._nodes[view.node_id], self.memory)

    async def _run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, work, *arguments)

    async def _run_now(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return work(*arguments)


async def _measure(label: str, count: int, work: Awaitable[Any]) -> Any:
    """Print the CPU of this process per item of `work`, in microseconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = await work
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    print(f"| {label} | {1e6 * cpu / count:,.0f} | {1e6 * wall / count:,.0f} |", flush=True)
    return result


async def _in_parallel(callers: int, calls: Sequence[Callable[[], Awaitable[Any]]]) -> None:
    waiting = iter(calls)

    async def caller() -> None:
        for call in waiting:
            await call()

    await asyncio.gather(*(caller() for _ in range(callers)))


def _named(count: int, size: int) -> list[tuple[BlockHash, bytes]]:
    blocks = [os.urandom(size) for _ in range(count)]
    return [(hash_block(block), block) for block in blocks]


async def _large(bench: _Bench) -> None:
    client = bench.client
    kept, dropped = _named(8, 4 * MIB), _named(8, 4 * MIB)
    await client.put_many(1, kept)
    bench.memory.keeps = False  # fresh memory for each fragment would cost more than the put
    # The names lie, so that each put is of a new block and no time goes into making one.
    names = [BlockHash(os.urandom(32)) for _ in range(LARGE_BLOCKS)]
    puts = [
        lambda n=n, b=dropped[i % 8][1]: client.put(1, n, (b,), len(b)) for i, n in enumerate(names)
    ]
    gets = [lambda n=kept[i % 8][0]: client.get(n) for i in range(LARGE_BLOCKS)]
    await _in_parallel(1, puts[:8])
    await _measure("put 4 MiB", len(puts) - 8, _in_parallel(1, puts[8:]))
    await _in_parallel(1, gets[:8])
    await _measure("get 4 MiB", len(gets), _in_parallel(1, gets))
    bench.switch_off(3)
    await _in_parallel(1, gets[:8])
    await _measure("get 4 MiB, three nodes lost", len(gets), _in_parallel(1, gets))


async def _small(bench: _Bench) -> None:
    client = bench.client
    await client.put_many(1, _named(100, KIB))
    blocks = _named(SMALL_BLOCKS, KIB)
    names = [name for name, _ in blocks]
    results = await _measure("put_many, 1 KiB each", SMALL_BLOCKS, client.put_many(1, blocks))
    assert all(isinstance(result, PutResult) and result.new for result in results)
    found = await _measure("get_many, 1 KiB each", SMALL_BLOCKS, client.get_many(names))
    assert [bytes(data) for data in found] == [block for _, block in blocks]
    singles = _named(SMALL_BLOCKS // 4, KIB)
    puts = [lambda n=n, b=b: client.put(1, n, (b,), len(b)) for n, b in singles]
    gets = [lambda n=n: client.get(n) for n, _ in singles]
    await _measure(f"put 1 KiB, {CALLERS} callers", len(puts), _in_parallel(CALLERS, puts))
    await _measure(f"get 1 KiB, {CALLERS} callers", len(gets), _in_parallel(CALLERS, gets))


async def _main() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    print("| operation | CPU, µs | wall, µs |\n|---|---|---|")
    for measure in (_large, _small):
        bench = _Bench()
        await bench.start()
        await measure(bench)
        await bench.pool.aclose()


if __name__ == "__main__":
    reuse_large_buffers(256 * MIB)
    uvloop.run(_main())
