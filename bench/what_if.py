"""How long `haversack what-if` thinks: `python -m bench.what_if --volumes 1000000 --nodes 1000`.

Builds a `cell.db` with so many volumes of rs-6-3, placed at random over racks of ten nodes, and
times reading it into a `SlotTable`, losing a node and a rack, and finding the worst of each level.
"""

from __future__ import annotations

import argparse
import random
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from sqlalchemy import Connection, text

from cluster import map_rows
from cluster.cell import NodeSpec, create_cell, prepare_schema
from cluster.explain.domains import Level, domains_at
from cluster.explain.slot_table import SlotTable, read_slot_table
from cluster.explain.what_if import lose, worst_of
from cluster.topology import NodeState, NodeView
from erasure.scheme import Scheme
from protocol.clock import SystemClock
from protocol.ids import NodeId
from sql.database import Database
from sql.engine import sqlite_url

SCHEME = Scheme.rs(6, 3)
NODES_PER_RACK = 10
_BATCH = 10_000


def fill(db: Database, volumes: int, nodes: int) -> None:
    """Nodes that are up, and sealed volumes of a hundred blocks."""
    names = [NodeId(f"node-{number:05d}") for number in range(nodes)]
    specs = [
        NodeSpec(name, f"s{name}", "", f"host-{number}", f"rack-{number // NODES_PER_RACK}")
        for number, name in enumerate(names)
    ]
    create_cell(db, SystemClock(), "bench", SCHEME, specs)
    rng = random.Random(1)

    def up(connection: Connection) -> None:
        for name in names:
            map_rows.set_node_state(connection, name, NodeState.UP, 0.0, "", 1)
        connection.execute(text("UPDATE nodes SET free_bytes = 1000000000000"))

    def some(connection: Connection) -> None:
        planned = [(SCHEME, tuple(rng.sample(names, SCHEME.n))) for _ in range(_BATCH)]
        map_rows.insert_volumes(connection, planned, 0.0, 1)

    db.transact(up)
    for _ in range(volumes // _BATCH):
        db.transact(some)
    counters = "UPDATE volumes SET state = 'sealed', blocks = 300, stored_bytes = 1000000000"
    db.transact(lambda connection: connection.execute(text(counters)))


def at_random(volumes: int, nodes: int) -> SlotTable:
    """The same table without the database."""
    rng = np.random.default_rng(1)
    # Neighbours on a ring: distinct, without a permutation per volume.
    slots = (rng.integers(nodes, size=(volumes, 1)) + np.arange(SCHEME.n) * 7) % nodes
    views = tuple(
        NodeView(
            NodeId(f"node-{number:05d}"), f"s{number}", "", f"host-{number}",
            f"rack-{number // NODES_PER_RACK}", 1.0, NodeState.UP, 0.0, 1, "h:1", 1,
            10**12, 10**12, 0, 0, "",
        )
        for number in range(nodes)
    )  # fmt: skip
    return SlotTable(
        nodes=views,
        schemes=(SCHEME,),
        volume_ids=np.arange(1, volumes + 1),
        scheme_of=np.zeros(volumes, np.int32),
        slots=slots.astype(np.int32),
        blocks=np.full(volumes, 300),
        stored_bytes=np.full(volumes, 10**9),
    )


def read_back(volumes: int, nodes: int) -> SlotTable:
    """Write the table to SQLite and time its reading."""
    with tempfile.TemporaryDirectory() as directory:
        db = Database(sqlite_url(Path(directory) / "cell.db"), inline=True)
        prepare_schema(db)
        fill(db, volumes, nodes)
        started = time.perf_counter()
        table = db.read_now(read_slot_table)
        print(f"read      {time.perf_counter() - started:8.3f} s")
        db.close()
    return table


def main() -> None:
    """Print one line per step."""
    parser = argparse.ArgumentParser(prog="python -m bench.what_if")
    parser.add_argument("--volumes", type=int, default=100_000)
    parser.add_argument("--nodes", type=int, default=1_000)
    parser.add_argument("--arrays", action="store_true", help="without a database")
    given = parser.parse_args()
    make = at_random if given.arrays else read_back
    table = make(given.volumes, given.nodes)
    print(f"{len(table.volume_ids)} volumes, {len(table.nodes)} nodes")
    for level in Level:
        domain = domains_at(level, table.nodes)[0]
        started = time.perf_counter()
        report = lose(table, [domain])
        seconds = time.perf_counter() - started
        print(f"lose {level:4} {seconds:8.3f} s  {report.rebuilding.slots} slots to make")
    for level in Level:
        started = time.perf_counter()
        worst = worst_of(table, level)
        seconds = time.perf_counter() - started
        print(f"any {level:5} {seconds:8.3f} s  {worst[0].domain}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"peak memory {peak} MiB")


if __name__ == "__main__":
    main()
