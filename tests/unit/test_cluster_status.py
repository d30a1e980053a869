"""What an operator sees of a cell."""

from __future__ import annotations

import json
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
)

from cluster import map_rows
from cluster.block_index import BlockIndex, RecordOutcome
from cluster.disk_reports import DiskReport, save_disk_reports
from cluster.map_rows import NodeReport
from cluster.status import CellStatus, read_status, status_of
from cluster.topology import NodeState
from protocol.errors import ConfigInvalid
from protocol.ids import NodeId
from protocol.messages import ScrubProgress, SpaceReport
from sql.database import Database


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    database = empty_database(tmp_path)
    new_cell(database, HandClock())
    Rows(database).register_all()
    yield database
    database.close()


@pytest.fixture
def rows(db: Database) -> Rows:
    return Rows(db)


def status_of_now(db: Database) -> CellStatus:
    return db.read_now(lambda connection: status_of(connection, START))


def test_a_node_shows_what_it_last_told_of_its_disk(db: Database) -> None:
    told = DiskReport(
        NodeId.numbered(2),
        SpaceReport(1_000, 700, 100, 200, 250),
        ScrubProgress(4, running=True, bytes_done=5, bytes_total=50, findings=1),
    )
    older = DiskReport(told.node_id, SpaceReport(), ScrubProgress())
    for number, report in enumerate((older, told)):
        db.transact(lambda c, r=report, n=number: save_disk_reports(c, [r], START + n))
    nodes = status_of_now(db).to_json()["nodes"]
    assert nodes[0]["disk"] is None
    disk = nodes[1]["disk"]
    assert disk["reported"] == START + 1
    assert disk["space"]["client_free_bytes"] == 200
    assert (disk["scrub"]["pass_number"], disk["scrub"]["findings"]) == (4, 1)
    assert told.differs_in_kind(older)


async def test_a_database_without_a_cell_has_no_status(tmp_path: Path) -> None:
    database = empty_database(tmp_path)
    with pytest.raises(ConfigInvalid):
        await read_status(database, START)
    database.close()


async def test_the_json_names_the_cell_its_nodes_and_its_sums(db: Database, rows: Rows) -> None:
    index = BlockIndex(db, HandClock())
    small, large = rows.open_volume(SMALL, node_ids(4)), rows.open_volume(RS, node_ids(9))
    batch = [new_block("a", small), new_block("b", large, missing=(8,)), new_block("c", large)]
    assert await index.record_puts(batch) == [RecordOutcome.NEW] * 3
    rows.seal(large.volume_id)
    reports = [
        NodeReport(NodeId.numbered(1), 900, 250, 2),
        NodeReport(NodeId.numbered(2), 9, 50, 1),
    ]
    db.transact(lambda c: map_rows.save_reports(c, reports))
    shown = json.loads(json.dumps((await read_status(db, START)).to_json()))
    nodes = shown.pop("nodes")
    assert shown == {
        "cluster_id": CLUSTER_ID,
        "scheme": "rs-6-3",
        "map_version": db.read_now(map_rows.read_version),
        "volumes": {"open": 1, "sealed": 1, "by_spare": {"2": 1, "3": 1}},
        "blocks": 3,
        "logical_bytes": 12_000,
        "stored_bytes": 15_000,
        "fragment_bytes": 300,
        "debts": 1,
        "redundancy": {
            "blocks_by_spare": {"2": 1, "3": 2},
            "debts": 1,
            "oldest_debt": START,
            "unrepairable": 0,
            "moves": 0,
        },
        "repair": None,
        "verification": {
            "current": None,
            "finished": None,
            "request": None,
            "removal": None,
            "strays": {},
        },
        "watcher": {"blocks": 0, "by_step": {}, "late_s": 0.0, "looks": {}},
        "canaries": [],
        "jobs": [],
        "alarms": [],
    }
    assert [node["id"] for node in nodes] == list(node_ids(9))
    assert nodes[0] == {
        "id": "node-01",
        "state": "up",
        "since": HandClock().wall(),
        "pid": 1001,
        "endpoint": "127.0.0.1:7001",
        "directory": "/disks/node-01",
        "host": "host",
        "rack": "rack",
        "weight": 1.0,
        "incarnation": 1,
        "bytes": 250,
        "fragments": 2,
        "capacity_bytes": 1 << 40,
        "free_bytes": 900,
        "placement_free_bytes": -1,
        "disk_failed": False,
        "detail": "",
        "disk": None,
    }


async def test_spare_fragments_fall_with_every_node_that_does_not_serve(
    db: Database, rows: Rows
) -> None:
    rows.open_volume(RS, node_ids(9))
    rows.open_volume(SMALL, node_ids(4, 6))
    rows.open_volume(RS, (*node_ids(7), None, None))
    assert (await read_status(db, START)).spare == {3: 2, 1: 1}
    rows.set_state(1, NodeState.SUSPECT)
    rows.set_state(2, NodeState.DRAINING)
    assert (await read_status(db, START)).spare == {3: 2, 1: 1}, "both still serve"
    for number in (1, 2, 3, 4):
        rows.set_state(number, NodeState.DOWN)
    assert (await read_status(db, START)).spare == {-1: 1, 3: 1, -3: 1}


async def test_a_debt_counts_once_per_slot_however_many_blocks_owe_it(
    db: Database, rows: Rows
) -> None:
    index = BlockIndex(db, HandClock())
    volume = rows.open_volume(RS, node_ids(9))
    await index.record_puts([new_block(number, volume, missing=(4,)) for number in range(20)])
    await index.record_puts([new_block("other", volume, missing=(5,))])
    status = await read_status(db, START)
    assert status.redundancy.debts == 21
    assert status.redundancy.blocks_by_spare == {2: 21}
    assert status.spare == {1: 1}
    rows.set_state(5, NodeState.DOWN)
    assert (await read_status(db, START)).spare == {1: 1}, "slot 4 is node-05's: lost once"
