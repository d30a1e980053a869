"""What status counts in SQL and what `what-if` counts in arrays are the same cell."""

from __future__ import annotations

import random

from cell_rows import CLUSTER_ID, RS, SMALL, START, HandClock, node_spec
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, insert

from cluster import map_rows
from cluster.cell import create_cell
from cluster.explain.domains import Level, domains_at
from cluster.explain.slot_table import read_slot_table
from cluster.explain.what_if import lose, worst_of
from cluster.placement import plan_slots
from cluster.redundancy import blocks_by_spare
from cluster.schema import debts, metadata, volumes
from cluster.topology import NodeState
from erasure.scheme import Scheme
from protocol.ids import NodeId
from sql.database import Database

NODES = 12
STATES = (NodeState.UP, NodeState.UP, NodeState.SUSPECT, NodeState.DOWN, NodeState.DRAINING)


def _fill(connection: Connection, rng: random.Random) -> None:
    """Volumes with vacant slots and debts, on nodes in any state."""
    names = [NodeId.numbered(number + 1) for number in range(NODES)]
    for name in names:
        map_rows.set_node_state(connection, name, rng.choice(STATES), START, "", 1)
    for number in range(rng.randrange(6)):
        scheme = rng.choice((RS, SMALL))
        slots: list[NodeId | None] = list(rng.sample(names, scheme.n))
        for slot in rng.sample(range(scheme.n), rng.choice((0, 0, 1, 2))):
            slots[slot] = None
        (volume_id,) = map_rows.insert_volumes(connection, [(scheme, tuple(slots))], START, 1)
        blocks = rng.randrange(5)
        connection.execute(
            volumes.update()
            .where(volumes.c.volume_id == int(volume_id))
            .values(blocks=blocks, stored_bytes=blocks * 100)
        )
        owed = [
            {
                "volume_id": int(volume_id),
                "slot": slot,
                "hash": bytes([number, block]) * 16,
                "since": START,
                "reason": "missing",
            }
            for block in range(blocks)
            for slot in rng.sample(range(scheme.n), rng.choice((0, 0, 1, 2, 3)))
        ]
        if owed:
            connection.execute(insert(debts), owed)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_status_and_what_if_count_the_same_blocks(seed: int) -> None:
    rng = random.Random(seed)
    db = Database("sqlite://", inline=True)
    db.transact(metadata.create_all)
    racks = rng.choice((1, 3, 4))
    specs = [
        node_spec(number + 1, rack=f"r{number % racks}", host=f"h{number % 6}")
        for number in range(NODES)
    ]
    create_cell(db, HandClock(), CLUSTER_ID, RS, specs)
    db.transact(lambda connection: _fill(connection, rng))
    table = db.read_now(read_slot_table)
    nothing = lose(table, [])
    counted = {spare: amount.blocks for spare, amount in nothing.after.items() if amount.blocks}
    assert counted == db.read_now(blocks_by_spare)
    assert sum(amount.volumes for amount in nothing.after.values()) == len(set(table.volume_ids))
    assert sum(amount.stored_bytes for amount in nothing.after.values()) == 100 * sum(
        counted.values()
    )
    for level in Level:
        for risk in worst_of(table, level):
            alone = lose(table, [risk.domain]).after
            assert {spare: (amount.blocks, amount.stored_bytes) for spare, amount in alone.items()
                    if amount.blocks} == {
                spare: (amount.blocks, amount.stored_bytes) for spare, amount in risk.after.items()
            }  # fmt: skip
    db.close()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    racks=st.integers(3, 6),
    per_rack=st.integers(3, 5),
    scheme=st.sampled_from((Scheme.rs(6, 3), Scheme.rs(4, 2), Scheme.replica(4))),
)
def test_losing_a_rack_never_takes_more_fragments_than_the_scheme_can_lose(
    seed: int, racks: int, per_rack: int, scheme: Scheme
) -> None:
    """As long as the racks allow it: n slots over r racks need n <= r * m."""
    db = Database("sqlite://", inline=True)
    db.transact(metadata.create_all)
    specs = [
        node_spec(number + 1, rack=f"r{number % racks}", host=f"h{number}")
        for number in range(racks * per_rack)
    ]
    create_cell(db, HandClock(), CLUSTER_ID, scheme, specs)

    def fill(connection: Connection) -> None:
        for spec in specs:
            map_rows.set_node_state(connection, spec.node_id, NodeState.UP, START, "", 1)
        nodes = map_rows.read_nodes(connection)
        planned = plan_slots(nodes, scheme, 40, random.Random(seed))
        map_rows.insert_volumes(connection, [(scheme, slots) for slots in planned], START, 1)
        connection.execute(volumes.update().values(blocks=1, stored_bytes=10))

    db.transact(fill)
    table = db.read_now(read_slot_table)
    for rack in domains_at(Level.RACK, table.nodes):
        report = lose(table, [rack])
        assert report.fragments_of_one_block_max <= scheme.m
        assert min(report.after) >= 0
    db.close()
