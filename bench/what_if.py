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

from sqlalchemy import Connection, text

from cluster import map_rows
from cluster.cell import NodeSpec, create_cell, prepare_schema
from cluster.explain.domains import Level, domains_at
from cluster.explain.slot_table import read_slot_table
from cluster.explain.what_if import lose, worst_of
from cluster.topology import NodeState
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


def main() -> None:
    """Print one line per step."""
    parser = argparse.ArgumentParser(prog="python -m bench.what_if")
    parser.add_argument("--volumes", type=int, default=100_000)
    parser.add_argument("--nodes", type=int, default=1_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        db = Database(sqlite_url(Path(directory) / "cell.db"), inline=True)
        prepare_schema(db)
        fill(db, given.volumes, given.nodes)
        started = time.perf_counter()
        table = db.read_now(read_slot_table)
        print(f"{len(table.volume_ids)} volumes, {len(table.nodes)} nodes")
        print(f"read      {time.perf_counter() - started:8.3f} s")
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
        db.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"peak memory {peak} MiB")


if __name__ == "__main__":
    main()
