"""A small cell in one process on real directories: RocksDB stores, `cell.db`, `metadata.db`, laid
out as `haversack up` does, and closed in order at the end.  For tests of `fsck`."""

from __future__ import annotations

import asyncio
import hashlib
import random
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from block_cell import BlockCell
from cell_rows import CLUSTER_ID

from chaos.sim.clock import VirtualClock
from chaos.sim.database import copy_databases
from chaos.sim.loop import SimLoop
from cluster.cell import mark_stopped
from erasure.scheme import Scheme
from protocol.clock import Clock
from protocol.ids import NodeId
from sql.database import Database
from sql.engine import sqlite_url
from storage_node.identity import Identity, initialise
from storage_node.interface import FragmentStore
from storage_node.rocks_options import StoreOptions
from storage_node.rocks_store import open_store

TABLES = ("nodes", "volumes", "volume_slots", "blocks", "debts")


class DiskCell(BlockCell):
    """`BlockCell` below `data`."""

    def __init__(
        self, data: Path, clock: Clock, scheme: Scheme, nodes: int, **settings: Any
    ) -> None:
        self.data = data
        super().__init__(clock, scheme, nodes, 1, **settings)

    def _make_database(self) -> Database:
        copy_databases(self.data)
        return Database(sqlite_url(self.data / "cell.db"), inline=True)

    def _make_store(self, node_id: NodeId) -> FragmentStore:
        directory = self.data / "nodes" / node_id
        owner = Identity(CLUSTER_ID, node_id, f"store-{self._number(node_id)}")
        initialise(directory, owner)
        return open_store(directory, owner, StoreOptions(reserve_bytes=0))


def on_disks(
    data: Path,
    main: Callable[[DiskCell], Awaitable[None]],
    *,
    scheme: str = "rs-2-2",
    nodes: int = 5,
    volumes: int = 2,
    **settings: Any,
) -> None:
    """Run `main` on a cell in `data`, then stop the cell."""
    loop = SimLoop(shuffle=random.Random(1), steps_max=5_000_000)

    async def whole() -> None:
        cell = DiskCell(data, VirtualClock(loop), Scheme.parse(scheme), nodes, **settings)
        await cell.start(volumes)
        before = asyncio.all_tasks()
        await main(cell)
        await cell.pool.aclose()
        assert asyncio.all_tasks() - before == set()
        for store in cell.stores.values():
            store.close()
        mark_stopped(cell.db, cell.clock)
        cell.db.close()

    try:
        loop.run_until_complete(whole())
    finally:
        loop.close()


def tree_digest(directory: Path) -> dict[str, str]:
    """Every file below, by content, permissions and time; links and folders by name."""
    return {
        str(path.relative_to(directory)): (
            f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.stat().st_mode} "
            f"{path.stat().st_mtime_ns}"
            if path.is_file()
            else "folder"
        )
        for path in sorted(directory.rglob("*"))
    }


def rows_of(database: Path, table: str, columns: str = "*") -> list[tuple[Any, ...]]:
    """A table, sorted."""
    with closing(sqlite3.connect(database)) as connection:
        return sorted(connection.execute(f"SELECT {columns} FROM {table}").fetchall())
