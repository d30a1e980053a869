"""What would be lost, from the placement alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cell_rows import (
    CLUSTER_ID,
    RS,
    SMALL,
    START,
    HandClock,
    Rows,
    empty_database,
    new_block,
    new_cell,
    node_ids,
    node_spec,
)

from cluster import map_rows
from cluster.block_index import BlockIndex
from cluster.cell import create_cell
from cluster.explain.domains import Domain, Level, domains_at, resolve
from cluster.explain.slot_table import SlotTable, read_slot_table
from cluster.explain.what_if import Amount, lose, unreadable, worst_of
from cluster.map_rows import NodeReport
from cluster.topology import NodeState, NodeView
from protocol.errors import InvalidRequest
from protocol.ids import NodeId
from sql.database import Database


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    database = empty_database(tmp_path)
    new_cell(database, HandClock(), nodes=12)
    Rows(database).register_all()
    reports = [NodeReport(node_id, 1 << 30, 0, 0) for node_id in node_ids(12)]
    database.transact(lambda c: map_rows.save_reports(c, reports))
    yield database
    database.close()


@pytest.fixture
def rows(db: Database) -> Rows:
    return Rows(db)


def table_of(db: Database) -> SlotTable:
    return db.read_now(read_slot_table)


def node(*numbers: int) -> list[Domain]:
    return [
        Domain(Level.NODE, NodeId.numbered(number), (NodeId.numbered(number),))
        for number in numbers
    ]


def blocks_by_spare(histogram: dict[int, Amount]) -> dict[int, int]:
    return {spare: amount.blocks for spare, amount in histogram.items() if amount.blocks}


async def test_each_lost_node_takes_a_fragment_of_every_block_it_holds(
    db: Database, rows: Rows
) -> None:
    index = BlockIndex(db, HandClock())
    large, other = rows.open_volume(RS, node_ids(9)), rows.open_volume(SMALL, node_ids(4, 7))
    await index.record_puts([new_block(number, large) for number in range(5)])
    await index.record_puts([new_block(f"s{number}", other) for number in range(2)])
    table = table_of(db)
    nothing = lose(table, [])
    assert nothing.before == nothing.after == {3: Amount(2, 7, 35_000)}
    report = lose(table, node(1, 8))
    assert report.before == nothing.before
    assert report.after == {1: Amount(1, 5, 25_000), 2: Amount(1, 2, 10_000)}
    assert report.fragments_of_one_block_max == 2
    dead = lose(table, node(1, 2, 3, 4))
    assert unreadable(dead.after) == Amount(1, 5, 25_000)
    assert dead.unreadable == (large.volume_id,)
    assert dead.rebuilding.lost_slots == 4


async def test_debts_vacant_slots_and_nodes_that_are_down_count_as_lost_already(
    db: Database, rows: Rows
) -> None:
    index = BlockIndex(db, HandClock())
    volume = rows.open_volume(RS, node_ids(9))
    vacant = rows.open_volume(RS, (*node_ids(8), None))
    batch = [
        new_block("whole", volume),
        new_block("owes one", volume, missing=(4,)),
        new_block("owes two", volume, missing=(4, 5)),
        new_block("owes the same two", volume, missing=(4, 5)),
        new_block("in the other", vacant, missing=(8,)),
    ]
    await index.record_puts(batch)
    assert blocks_by_spare(lose(table_of(db), []).after) == {3: 1, 2: 2, 1: 2}
    rows.set_state(5, NodeState.DOWN)  # slot 4 of both volumes
    report = lose(table_of(db), node(6))  # slot 5
    assert blocks_by_spare(report.before) == {2: 2, 1: 3}
    assert blocks_by_spare(report.after) == {1: 4, 0: 1}
    assert sum(amount.volumes for amount in report.after.values()) == 2
    assert report.after[0].volumes == 1


async def test_a_volume_counts_as_its_worst_block(db: Database, rows: Rows) -> None:
    volume = rows.open_volume(RS, node_ids(9))
    batch = [new_block("a", volume), new_block("b", volume, missing=(0, 1))]
    await BlockIndex(db, HandClock()).record_puts(batch)
    report = lose(table_of(db), [])
    assert report.after == {1: Amount(1, 1, 5_000), 3: Amount(0, 1, 5_000)}


async def test_it_says_whether_the_rest_can_make_it_whole(db: Database, rows: Rows) -> None:
    volume = rows.open_volume(RS, node_ids(9))
    await BlockIndex(db, HandClock()).record_puts([new_block(n, volume) for n in range(6)])
    table = table_of(db)
    assert lose(table, []).rebuilding.slots == 0
    three = lose(table, node(1, 2, 3)).rebuilding
    assert (three.slots, three.slots_without_target, three.nodes) == (3, 0, 9)
    assert three.possible
    assert three.room_bytes == 9 << 30
    assert three.fragment_bytes == 3 * 5_000, "a sixth of 30,000 for each slot"
    assert three.slots_beyond_spread == 0, "all nodes stand on one host, now as then"
    four = lose(table, node(1, 2, 10, 11, 12)).rebuilding
    assert (four.slots, four.slots_without_target, four.possible) == (2, 2, False)


async def test_a_spread_that_the_loss_makes_worse_is_said(tmp_path: Path) -> None:
    """Three racks of four, nine slots in threes: two racks must take more than three each."""
    database = empty_database(tmp_path)
    specs = [node_spec(n + 1, rack=f"r{n % 3}", host=f"h{n}") for n in range(12)]
    create_cell(database, HandClock(), CLUSTER_ID, RS, specs)
    rows = Rows(database)
    rows.register_all()
    volume = rows.open_volume(RS, node_ids(9))
    await BlockIndex(database, HandClock()).record_puts([new_block("a", volume)])
    table = table_of(database)
    assert lose(table, node(1)).rebuilding.slots_beyond_spread == 0, "its rack has another node"
    rack = lose(table, domains_at(Level.RACK, table.nodes)[:1]).rebuilding
    assert (rack.slots, rack.slots_without_target, rack.slots_beyond_spread) == (3, 1, 2)
    database.close()


async def test_too_little_room_is_said(db: Database, rows: Rows) -> None:
    volume = rows.open_volume(RS, node_ids(9))
    await BlockIndex(db, HandClock()).record_puts([new_block(n, volume) for n in range(60)])
    full = [NodeReport(node_id, 10, 1 << 30, 60) for node_id in node_ids(12)]
    db.transact(lambda c: map_rows.save_reports(c, full))
    rebuilding = lose(table_of(db), node(1)).rebuilding
    assert (rebuilding.fragment_bytes, rebuilding.room_bytes) == (50_000, 110)
    assert not rebuilding.possible


async def test_the_worst_domain_is_the_one_whose_loss_leaves_least(
    db: Database, rows: Rows
) -> None:
    index = BlockIndex(db, HandClock())
    a, b = rows.open_volume(RS, node_ids(9)), rows.open_volume(SMALL, node_ids(4, 9))
    await index.record_puts([new_block(number, a) for number in range(5)])
    await index.record_puts([new_block("s", b), new_block("t", b, missing=(1, 2, 3))])
    table = table_of(db)
    worst = worst_of(table, Level.NODE)
    assert worst[0].domain.name == "node-09", "it holds the only copy of a block"
    assert blocks_by_spare(worst[0].after) == {-1: 1, 2: 6}
    for risk in worst:
        assert risk.domain.level is Level.NODE
        assert blocks_by_spare(risk.after) == blocks_by_spare(lose(table, [risk.domain]).after)


def test_an_empty_cell_has_nothing_to_lose(db: Database) -> None:
    table = table_of(db)
    assert lose(table, node(1)).after == {}
    assert [risk.after for risk in worst_of(table, Level.RACK)] == [{}]


def views(*places: tuple[str, str]) -> list[NodeView]:
    return [
        NodeView(
            NodeId.numbered(number), f"s{number}", "", host, rack, 1.0, NodeState.UP, START,
            1, "h:1", 1, 1, 1, 0, 0, "",
        )
        for number, (rack, host) in enumerate(places, start=1)
    ]  # fmt: skip


def test_names_of_domains_are_understood_or_refused_with_the_choice() -> None:
    nodes = views(("r1", "a"), ("r1", "b"), ("r2", "a"), ("r2", "node-01"), ("b", "c"))
    assert resolve("r1", nodes).nodes == node_ids(2)
    assert resolve("node-02", nodes) == Domain(Level.NODE, "node-02", node_ids(1, 2))
    assert resolve("r2/a", nodes).nodes == node_ids(1, 3)
    assert resolve("host:c", nodes).nodes == node_ids(1, 5)
    assert resolve("rack:b", nodes).nodes == node_ids(1, 5)
    assert resolve("node:node-01", nodes).level is Level.NODE
    for unclear in ("a", "b", "node-01", "host:a"):
        with pytest.raises(InvalidRequest, match="write which one"):
            resolve(unclear, nodes)
    for unknown in ("node-77", "rack:a", ""):
        with pytest.raises(InvalidRequest, match="no node, host or rack"):
            resolve(unknown, nodes)
    with pytest.raises(InvalidRequest, match="node:NAME"):
        resolve("datacentre:x", nodes)
    assert [domain.name for domain in domains_at(Level.RACK, nodes)] == ["b", "r1", "r2"]
