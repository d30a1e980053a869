"""How long repair plans: `python -m bench.repair_plan`.  Figures of `docs/design/015-repair.md`.

10,000 nodes in 100 racks of 10 hosts.  First what the service does, from SQL to plan, after the
loss of one node and of 1,500 in cells of 10^3 to 10^6 volumes; then the planner alone over as many
volumes that each lost a slot, the worst 64 of them planned and all.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import random
import resource
import tempfile
import time
from pathlib import Path

from bench.placement import NODES, make_node
from cluster import map_rows
from cluster.cell import NodeSpec, create_cell, prepare_schema
from cluster.placement import plan_slots
from cluster.repair.plan import RepairBudget, RepairView, plan_repair
from cluster.repair.repair_rows import read_view
from cluster.repair.settings import RepairSettings
from cluster.topology import NodeState, NodeView, VolumeState, VolumeView
from erasure.scheme import Scheme
from protocol.clock import SystemClock
from protocol.ids import NodeId, VolumeId
from protocol.limits import GIB
from sql.database import Database
from sql.engine import sqlite_url

SCHEME = Scheme.rs(6, 3)
OUT_NODES = 1_500
"""Of 10,000: so that nearly every volume lost something."""

_INSERTED_AT_ONCE = 20_000


def peak_mib() -> float:
    """Of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def make_volumes(nodes: list[NodeView], count: int) -> list[VolumeView]:
    """Sealed volumes on all nodes."""
    planned = plan_slots(nodes, SCHEME, count, random.Random(1))
    return [
        VolumeView(VolumeId(number), SCHEME, VolumeState.SEALED, 1, slots, GIB, 256)
        for number, slots in enumerate(planned)
    ]


def down(node: NodeView) -> NodeView:
    """The same node, out."""
    return dataclasses.replace(node, state=NodeState.DOWN)


def plan_all(count: int) -> None:
    """Plan `count` damaged volumes in one go, and the first 64 of them as the service does."""
    healthy = [make_node(number) for number in range(NODES)]
    lost = random.Random(2).sample(range(NODES), OUT_NODES)
    out = frozenset(healthy[number].node_id for number in lost)
    nodes = tuple(down(node) if node.node_id in out else node for node in healthy)
    volumes = [
        volume for volume in make_volumes(healthy, 2 * count) if not out.isdisjoint(volume.slots)
    ][:count]
    view = RepairView(nodes, out, tuple(volumes))
    for what, budget in (("all", len(volumes)), ("64", 64)):
        began = time.process_time()
        plan = plan_repair(view, RepairBudget(budget, 0.02), random.Random(3))
        spent_s = time.process_time() - began
        moves = sum(len(repair.moves) for repair in plan.repairs)
        print(
            f"{len(volumes):9,} damaged volumes, {what:>3} planned: {moves:9,} moves "
            f"{spent_s:6.2f} s, peak {peak_mib():,.0f} MiB",
            flush=True,
        )


def fill(db: Database, nodes: list[NodeView], count: int) -> None:
    """Rows of a large cell."""
    prepare_schema(db)
    first = NodeSpec(NodeId("node-first"), "first", "/first", "host", "rack")
    create_cell(db, SystemClock(), "c" * 32, SCHEME, [first])
    db.transact(functools.partial(map_rows.insert_nodes, views=nodes, version=1))
    slots = plan_slots(nodes, SCHEME, count, random.Random(1))
    for start in range(0, count, _INSERTED_AT_ONCE):
        part = [(SCHEME, item) for item in slots[start : start + _INSERTED_AT_ONCE]]
        db.transact(
            functools.partial(map_rows.insert_volumes, planned=part, created=0.0, version=1)
        )


def lose(count: int) -> None:
    """In a cell of `count` volumes one node is lost, then a great many: each from SQL to plan, as
    the service does it."""
    nodes = [make_node(number) for number in range(NODES)]
    many = random.Random(2).sample([node.node_id for node in nodes], OUT_NODES)
    settings = RepairSettings()
    budget = RepairBudget(settings.volumes_per_pass, settings.headroom_share)
    with tempfile.TemporaryDirectory(prefix="haversack-bench-") as directory:
        db = Database(sqlite_url(Path(directory) / "cell.db"), inline=True)
        fill(db, nodes, count)
        for out in (many[:1], many):
            began = time.perf_counter()
            read = functools.partial(
                read_view, out=frozenset(out), volumes_max=settings.volumes_seen_max
            )
            view = db.read_now(read)
            read_s = time.perf_counter() - began
            plan = plan_repair(view, budget, random.Random(3))
            total_s = time.perf_counter() - began
            print(
                f"{count:9,} volumes in SQL, {len(out):5,} of {NODES:,} nodes lost: "
                f"{len(view.volumes):5,} volumes read after {read_s:5.2f} s, "
                f"{len(plan.repairs):2} planned after {total_s:5.2f} s, "
                f"peak {peak_mib():,.0f} MiB",
                flush=True,
            )
        db.close()


def main() -> None:
    """Print the curve."""
    parser = argparse.ArgumentParser(prog="python -m bench.repair_plan")
    parser.add_argument("--most", type=int, default=10**6)
    most = parser.parse_args().most
    powers = [10**power for power in range(3, 7) if 10**power <= most]
    for count in powers:
        lose(count)
    for count in powers:
        plan_all(count)


if __name__ == "__main__":
    main()
