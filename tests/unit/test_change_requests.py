"""Asking for changes: what is written down, what is refused, and that a dry run writes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cell_rows import CLUSTER_ID, RS, START, HandClock, Rows, empty_database, new_cell, node_ids
from sqlalchemy import event

from cluster import members
from cluster.cell import open_cell
from cluster.change import requests
from cluster.change.jobs import JobEvent, JobKind, JobState, read_job, read_jobs
from cluster.change.plans import MovePlan, TranscodePlan
from cluster.change.requests import ChangeRequest, parse_request, request_of
from cluster.controller_plan import read_plan
from cluster.topology import NodeState
from erasure.scheme import Scheme
from protocol.errors import (
    ConfigInvalid,
    DirectoryForeign,
    InvalidRequest,
    MalformedId,
    NodeNotFound,
    WrongState,
)
from protocol.ids import NodeId
from sql.database import Database
from storage_node import identity
from storage_node.node_config import NodeUpkeep

DRAIN = parse_request("drain", {"node": "node-03"})


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    """Twelve nodes that are up; three sealed volumes with a block each, and an open one."""
    database = empty_database(tmp_path)
    new_cell(database, HandClock(), nodes=12)
    rows = Rows(database)
    rows.register_all()
    for number in range(4):
        volume = rows.open_volume(RS, node_ids(9, first=1 + number % 3))
        if number < 3:
            database.transact(
                lambda c, v=volume: c.exec_driver_sql(  # type: ignore[misc]
                    "UPDATE volumes SET blocks = 1, stored_bytes = 600 WHERE volume_id = ?",
                    (int(v.volume_id),),
                )
            )
            rows.seal(volume.volume_id)
    yield database
    database.close()


def submit(db: Database, request: ChangeRequest) -> Any:
    return db.transact(lambda c: requests.submit(c, request, START))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("drain", {"node": "node-03"}),
        ("decommission", {"node": "node-03"}),
        ("replace", {"node": "node-03", "target": "node-12"}),
        ("rebalance", {}),
        ("transcode", {"from": "rs-6-3", "to": "rs-4-2", "for_new": True}),
    ],
)
def test_a_dry_run_of_every_kind_writes_nothing(
    db: Database, tmp_path: Path, kind: str, fields: dict[str, Any]
) -> None:
    said: list[str] = []
    engine = db.read_now(lambda c: c.engine)

    def spy(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        said.append(statement.lstrip().split(None, 1)[0].upper())

    before = db.read_now(lambda c: list(c.connection.driver_connection.iterdump()))  # type: ignore[union-attr]
    files = sorted(tmp_path.rglob("*"))
    event.listen(engine, "before_cursor_execute", spy)
    request = parse_request(kind, fields)
    plan = db.read_now(lambda c: requests.preview(c, request))
    event.remove(engine, "before_cursor_execute", spy)
    assert plan.units >= (0 if kind == "rebalance" else 1)
    assert set(said) <= {"SELECT", "BEGIN", "PRAGMA"}
    assert said.count("SELECT") >= 3
    after = db.read_now(lambda c: list(c.connection.driver_connection.iterdump()))  # type: ignore[union-attr]
    assert after == before
    assert sorted(tmp_path.rglob("*")) == files


def test_a_drain_is_planned_as_the_runner_will_plan_it(db: Database) -> None:
    plan = db.read_now(lambda c: requests.preview(c, DRAIN))
    assert isinstance(plan, MovePlan)
    assert plan.units == 3
    assert plan.blocked == ()
    assert len(plan.waiting) == 1
    assert "open" in plan.waiting[0].reason


def test_submitting_a_drain_takes_the_node_out_of_new_volumes_at_once(db: Database) -> None:
    job = submit(db, DRAIN)
    assert (job.kind, job.state, job.subject) == (JobKind.DRAIN, JobState.PLANNED, "node-03")
    assert request_of(job) == DRAIN
    assert Rows(db).node(3).state is NodeState.DRAINING


def test_cancelling_a_drain_gives_the_node_back(db: Database) -> None:
    job = submit(db, DRAIN)
    db.transact(lambda c: requests.act(c, job.job_id, JobEvent.CANCEL, START))
    assert Rows(db).node(3).state is NodeState.UP
    again = submit(db, DRAIN)
    db.transact(lambda c: requests.undrain(c, NodeId("node-03"), START))
    assert db.read_now(lambda c: read_job(c, again.job_id)).state is JobState.CANCELLED
    assert Rows(db).node(3).state is NodeState.UP
    with pytest.raises(WrongState):
        db.transact(lambda c: requests.undrain(c, NodeId("node-03"), START))


def test_pausing_keeps_the_node_draining(db: Database) -> None:
    job = submit(db, DRAIN)
    db.transact(lambda c: requests.act(c, job.job_id, JobEvent.PAUSE, START))
    assert Rows(db).node(3).state is NodeState.DRAINING


@pytest.mark.parametrize(
    ("kind", "fields", "error"),
    [
        ("paint", {}, InvalidRequest),
        ("drain", {}, InvalidRequest),
        ("drain", {"node": "Node 3"}, MalformedId),
        ("replace", {"node": "node-03", "target": "node-03"}, InvalidRequest),
        ("transcode", {"from": "rs-6-3", "to": "rs-6-3"}, InvalidRequest),
        ("transcode", {"from": "rs-6-3", "to": "raid-5"}, InvalidRequest),
    ],
)
def test_requests_that_mean_nothing_are_refused(
    kind: str, fields: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        parse_request(kind, fields)


def test_a_dead_node_is_not_drained_but_may_be_replaced(db: Database) -> None:
    Rows(db).set_state(3, NodeState.DOWN)
    with pytest.raises(WrongState, match="replace it"):
        submit(db, DRAIN)
    submit(db, parse_request("replace", {"node": "node-03", "target": "node-12"}))
    assert Rows(db).node(3).state is NodeState.DOWN


def test_unknown_nodes_and_gone_ones_are_refused_and_nothing_is_written(db: Database) -> None:
    with pytest.raises(NodeNotFound):
        submit(db, parse_request("drain", {"node": "node-77"}))
    Rows(db).set_state(3, NodeState.GONE)
    with pytest.raises(WrongState):
        submit(db, DRAIN)
    assert db.read_now(read_jobs) == []


def test_transcode_for_new_changes_what_new_blocks_get_and_the_cell_still_opens(
    db: Database,
) -> None:
    fields = {"from": "rs-6-3", "to": "rs-4-2", "for_new": True}
    plan = db.read_now(lambda c: requests.preview(c, parse_request("transcode", fields)))
    assert isinstance(plan, TranscodePlan)
    assert (len(plan.volumes), plan.bytes, len(plan.blocked)) == (3, 1_800, 1)
    submit(db, parse_request("transcode", fields))
    for asked in (None, Scheme.rs(4, 2), RS):
        cell = open_cell(db, asked)
        assert cell is not None
        assert (cell.scheme, cell.created_scheme) == (Scheme.rs(4, 2), RS)
    with pytest.raises(ConfigInvalid, match="haversack transcode"):
        open_cell(db, Scheme.rs(2, 1))


# -- members ---------------------------------------------------------------------------------------


def test_a_node_is_emptied_only_when_nothing_refers_to_it(db: Database) -> None:
    submit(db, DRAIN)
    node = NodeId("node-03")
    assert not db.transact(lambda c: members.mark_emptied(c, node, START))
    db.transact(
        lambda c: c.exec_driver_sql(
            "UPDATE volume_slots SET node_id = NULL WHERE node_id = 'node-03'"
        )
    )
    db.transact(
        lambda c: c.exec_driver_sql(
            "INSERT INTO slot_moves (volume_id, slot, target, epoch, reason, begun) "
            "VALUES (1, 2, 'node-03', 2, 'rebalance', 0)"
        )
    )
    assert not db.transact(lambda c: members.mark_emptied(c, node, START))
    assert not db.transact(lambda c: members.remove_node(c, node, START))
    db.transact(lambda c: c.exec_driver_sql("DELETE FROM slot_moves"))
    assert db.transact(lambda c: members.mark_emptied(c, node, START))
    assert Rows(db).node(3).state is NodeState.DRAINED
    assert db.transact(lambda c: members.remove_node(c, node, START))
    gone = Rows(db).node(3)
    assert (gone.state, gone.endpoint) == (NodeState.GONE, "")


def test_a_node_that_is_up_is_not_removed(db: Database) -> None:
    db.transact(lambda c: c.exec_driver_sql("DELETE FROM volume_slots"))
    assert not db.transact(lambda c: members.remove_node(c, NodeId("node-03"), START))
    assert Rows(db).node(3).state is NodeState.UP


def test_a_directory_becomes_a_node_and_the_controller_is_told(
    db: Database, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    view = members.add_node(db, HandClock(), disk, "h9", "", 2.0)
    assert (view.node_id, view.state, view.host, view.rack, view.weight) == (
        NodeId("node-13"),
        NodeState.JOINING,
        "h9",
        members.RACK,
        2.0,
    )
    found = identity.load(disk)
    assert (found.cluster_id, found.node_id, found.store_id) == (
        CLUSTER_ID,
        view.node_id,
        view.store_id,
    )
    Rows(db).set_state(3, NodeState.GONE)
    members.write_controller_plan(db, tmp_path, 7, NodeUpkeep())
    planned = {node.node_id: node.directory for node in read_plan(tmp_path).nodes}
    assert planned["node-13"] == str(disk)
    assert "node-03" not in planned
    assert len(planned) == 12


def test_adding_a_directory_twice_is_one_node(db: Database, tmp_path: Path) -> None:
    first = members.add_node(db, HandClock(), tmp_path / "disk", "", "", 1.0)
    assert members.add_node(db, HandClock(), tmp_path / "disk", "", "", 1.0) == first


def test_a_directory_that_was_formatted_and_not_yet_added_is_taken(
    db: Database, tmp_path: Path
) -> None:
    store = members.format_directory(tmp_path / "disk", CLUSTER_ID, NodeId("node-13"))
    view = members.add_node(db, HandClock(), tmp_path / "disk", "", "", 1.0)
    assert view.store_id == store


def test_a_directory_with_anything_in_it_is_refused_and_left_alone(
    db: Database, tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "photo.jpg").write_bytes(b"x")
    with pytest.raises(DirectoryForeign):
        members.add_node(db, HandClock(), tmp_path / "disk", "", "", 1.0)
    assert [entry.name for entry in (tmp_path / "disk").iterdir()] == ["photo.jpg"]
    assert len(Rows(db).nodes()) == 12


def test_a_directory_inside_another_nodes_is_refused(db: Database) -> None:
    for path in ("/disks/node-03/more", "/disks"):
        with pytest.raises(ConfigInvalid, match="node-"):
            members.add_node(db, HandClock(), Path(path), "", "", 1.0)


def test_names_of_gone_nodes_are_not_given_again() -> None:
    assert members.next_node_id([]) == NodeId("node-01")
    assert members.next_node_id([NodeId("node-01"), NodeId("node-07")]) == NodeId("node-08")
