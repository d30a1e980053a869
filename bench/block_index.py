"""CPU and time of the block index alone: `python -m bench.block_index [--blocks N] [--busy]`.

Figures of `docs/design/008-block-index.md`.  A real file with synced commits, no nodes: receipts
are made up.  With `--busy` another thread computes all the time, as the event loop of a saturated
gateway does: then the interpreter lock decides.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from sqlalchemy import Connection

from cluster import map_rows
from cluster.block_index import BlockIndex, NewBlock, Receipt, RecordOutcome
from cluster.block_sql_portable import PortableBlockSql
from cluster.cell import NodeSpec, create_cell, prepare_schema
from cluster.topology import VolumeView
from erasure.scheme import Scheme
from protocol.clock import SystemClock
from protocol.ids import BlockHash, NodeId
from protocol.limits import BATCH_BLOCKS_MAX
from sql.database import Database
from sql.engine import sqlite_url
from storage_node.interface import NodeRegistration

NODES = tuple(NodeId.numbered(number) for number in range(1, 10))
PREFILL_BATCH = 50_000
REPEATS = 15


class Setting:
    """An index with some blocks in it already, and volumes to put more into."""

    def __init__(self, directory: Path, blocks: int) -> None:
        self.rng = random.Random(1)
        self.db = Database(sqlite_url(directory / "cell.db"))
        prepare_schema(self.db)
        clock = SystemClock()
        specs = [NodeSpec(name, f"store of {name}", "", "host", "rack") for name in NODES]
        create_cell(self.db, clock, "bench", Scheme.rs(6, 3), specs)
        self.volumes = self.db.transact(_open_volumes)
        self.index = BlockIndex(self.db, clock)
        self.portable = BlockIndex(self.db, clock, PortableBlockSql())
        self.stored = [self.name() for _ in range(blocks)]
        for start in range(0, blocks, PREFILL_BATCH):
            self._prefill(sorted(self.stored[start : start + PREFILL_BATCH]))

    def name(self) -> BlockHash:
        return BlockHash(self.rng.randbytes(32))

    def batch(self, count: int) -> list[NewBlock]:
        """Small blocks, acknowledged by all four nodes of their volume."""
        made = []
        for number in range(count):
            volume = self.volumes[number % len(self.volumes)]
            receipts = tuple(Receipt(slot, NodeId(node_id), 1) for slot, node_id in _held(volume))
            made.append(NewBlock(self.name(), 1, volume.volume_id, 1, 1_100, 1_024, receipts))
        return made

    def _prefill(self, names: Sequence[BlockHash]) -> None:
        def work(connection: Connection) -> None:
            connection.exec_driver_sql(
                "INSERT INTO blocks (hash, volume_id, stored_bytes, plain_bytes, state, created, "
                "owner) VALUES (?, 1, 1100, 1024, 0, 1.0, 2)",
                [(bytes(name),) for name in names],
            )

        self.db.transact(work)


def _held(volume: VolumeView) -> list[tuple[int, str]]:
    return [(slot, node_id) for slot, node_id in enumerate(volume.slots) if node_id is not None]


def _open_volumes(connection: Connection) -> list[VolumeView]:
    version = map_rows.next_version(connection)
    for name in NODES:
        announced = NodeRegistration(name, "", "127.0.0.1:1", 1, "", 1 << 40)
        map_rows.begin_incarnation(connection, announced, version)
    planned = [(Scheme.replica(4), NODES[first : first + 4]) for first in range(4)]
    return map_rows.read_volumes(
        connection, map_rows.insert_volumes(connection, planned, 1.0, version)
    )


async def measure(what: str, count: int, run: Callable[[], Awaitable[object]]) -> None:
    """Print rate, time and CPU per block of one run over `count` blocks."""
    wall, cpu = time.perf_counter(), time.process_time()
    await run()
    wall_us = (time.perf_counter() - wall) / count * 1e6
    cpu_us = (time.process_time() - cpu) / count * 1e6
    print(f"{what:44} {1e6 / wall_us:9,.0f}/s {wall_us:9.1f} us {cpu_us:9.1f} us CPU a block")


async def measure_calls(what: str, run: Callable[[], Awaitable[object]]) -> None:
    """Print the median and the CPU of one call."""
    await run()
    times, cpu = [], time.process_time()
    for _ in range(REPEATS):
        began = time.perf_counter()
        await run()
        times.append((time.perf_counter() - began) * 1e3)
    cpu_ms = (time.process_time() - cpu) / REPEATS * 1e3
    print(f"{what:44} p50 {statistics.median(times):7.2f} ms {cpu_ms:9.2f} ms CPU a call")


async def measure_puts(setting: Setting) -> None:
    async def record(batches: Sequence[list[NewBlock]]) -> None:
        for batch in batches:
            assert set(await setting.index.record_puts(batch)) == {RecordOutcome.NEW}

    for size in (BATCH_BLOCKS_MAX, 1_000, 64):
        batches = [setting.batch(size) for _ in range(max(1, 16_000 // size))]
        count = size * len(batches)
        await measure(f"record_puts, {size} a call", count, partial(record, batches))
    for callers in (1, 16, 64):
        singles = [[block] for block in setting.batch(200 * callers)]
        shares = [singles[start::callers] for start in range(callers)]

        async def together(shares: Sequence[list[list[NewBlock]]] = shares) -> None:
            await asyncio.gather(*(record(share) for share in shares))

        await measure(f"record_puts, one a call, {callers} callers", len(singles), together)


async def measure_reads(setting: Setting) -> None:
    names = setting.rng.sample(setting.stored, BATCH_BLOCKS_MAX)
    index = setting.index
    began = time.perf_counter()
    assert len(await index.claim(7, names)) == len(names)
    print(f"{'first claim of 4,096 (writes)':44} {(time.perf_counter() - began) * 1e3:11.2f} ms")
    await measure_calls("lookup of 4,096", lambda: index.lookup(names))
    await measure_calls("claim of 4,096, all young", lambda: index.claim(7, names))

    async def check() -> None:
        await index.lookup(names)
        await index.claim(7, names)

    await measure_calls("check of 4,096: lookup and claim", check)

    async def one_by_one() -> None:
        for name in setting.stored[:500]:
            await index.lookup([name])

    async def concurrently() -> None:
        await asyncio.gather(*(one_by_one() for _ in range(32)))

    await measure("lookup of one, one caller", 500, one_by_one)
    await measure("lookup of one, 32 callers", 16_000, concurrently)


@contextlib.contextmanager
def busy_thread() -> Iterator[None]:
    """A thread that computes without ever giving the interpreter away of its own accord."""
    running = True

    def spin() -> None:
        while running:
            sum(range(2_000))

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        yield
    finally:
        running = False
        thread.join()


async def measure_beside_a_busy_thread(setting: Setting) -> None:
    ways = {"one statement a batch": setting.index, "row by row": setting.portable}
    for interval_s in (0.005, 0.0002):
        sys.setswitchinterval(interval_s)
        print(f"-- beside a busy thread, switch interval {interval_s * 1e3:g} ms")
        for way, index in ways.items():
            names = setting.rng.sample(setting.stored, 1_000)
            batch = setting.batch(1_000)
            with busy_thread():
                await measure(f"record_puts, 1000, {way}", 1_000, partial(index.record_puts, batch))
                await measure(f"lookup of 1,000, {way}", 1_000, partial(index.lookup, names))


async def main(blocks: int, busy: bool) -> None:
    """Fill, then measure."""
    with tempfile.TemporaryDirectory() as directory:
        setting = Setting(Path(directory), blocks)
        gc.collect()
        gc.freeze()
        if busy:
            await measure_beside_a_busy_thread(setting)
        else:
            await measure_puts(setting)
            await measure_reads(setting)
        await setting.db.aclose()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=500_000, help="in the index before")
    parser.add_argument("--busy", action="store_true", help="beside a busy thread")
    options = parser.parse_args()
    asyncio.run(main(options.blocks, options.busy))
