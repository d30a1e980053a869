"""Creating and opening `cell.db`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from cell_rows import CLUSTER_ID, RS, START, HandClock, Rows, empty_database, new_cell, node_spec
from sqlalchemy import text

from cluster import map_rows
from cluster.cell import (
    CELL_FORMAT,
    add_nodes,
    create_cell,
    mark_stopped,
    open_cell,
    prepare_schema,
)
from cluster.schema import metadata
from cluster.topology import NodeState
from erasure.scheme import Scheme
from protocol.errors import ConfigInvalid, FormatUnsupported
from sql.database import Database
from sql.engine import sqlite_url


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    database = empty_database(tmp_path)
    yield database
    database.close()


def test_migrations_lead_to_the_tables_the_code_knows(tmp_path: Path) -> None:
    database = Database(sqlite_url(tmp_path / "fresh.db"), inline=True)
    prepare_schema(database)
    prepare_schema(database)  # again: nothing to do

    def differences(connection: object) -> list[object]:
        context = MigrationContext.configure(connection)  # type: ignore[arg-type]
        return list(compare_metadata(context, metadata))

    assert database.read_now(differences) == []
    tables = "SELECT name FROM sqlite_master WHERE type = 'table' AND sql LIKE '%WITHOUT ROWID%'"
    with_hash_keys = {"blocks", "claims", "debts", "volume_slots", "volumes"}
    found = database.read_now(lambda c: set(c.execute(text(tables)).scalars()))
    assert with_hash_keys <= found
    database.close()


def test_a_prepared_database_holds_no_cell_until_one_is_created(db: Database) -> None:
    assert open_cell(db) is None
    created = new_cell(db, HandClock())
    opened = open_cell(db, RS)
    assert opened == created
    assert (created.cluster_id, created.scheme, created.created) == (CLUSTER_ID, RS, START)
    assert created.schemes == (RS, Scheme.replica(4))
    assert [node.state for node in created.nodes] == [NodeState.JOINING] * 9
    assert {node.incarnation for node in created.nodes} == {0}


def test_a_replica_cell_needs_open_volumes_of_one_scheme_only(db: Database) -> None:
    assert new_cell(db, HandClock(), 3, Scheme.replica(3)).schemes == (Scheme.replica(3),)


def test_a_cell_is_created_once(db: Database) -> None:
    new_cell(db, HandClock())
    with pytest.raises(ConfigInvalid, match="already"):
        new_cell(db, HandClock())


def test_another_scheme_than_the_cells_is_refused_by_name(db: Database) -> None:
    new_cell(db, HandClock())
    with pytest.raises(ConfigInvalid, match=r"rs-6-3, not rs-4-2"):
        open_cell(db, Scheme.rs(4, 2))


def test_a_cell_of_a_newer_format_is_refused(db: Database) -> None:
    new_cell(db, HandClock())
    db.transact(lambda c: c.execute(text(f"UPDATE cell SET format = {CELL_FORMAT + 1}")))
    with pytest.raises(FormatUnsupported, match="newer version"):
        open_cell(db)


def test_an_edited_cell_row_is_refused(db: Database) -> None:
    new_cell(db, HandClock())
    db.transact(lambda c: c.execute(text("UPDATE cell SET scheme = 'rs-4-2'")))
    with pytest.raises(ConfigInvalid, match="edited"):
        open_cell(db)


def test_a_node_or_a_store_joins_once(db: Database) -> None:
    new_cell(db, HandClock(), nodes=2)
    with pytest.raises(ConfigInvalid, match="node-02"):
        add_nodes(db, HandClock(), [node_spec(3), node_spec(2)])
    assert len(db.read_now(map_rows.read_nodes)) == 2, "all or nothing"
    twice = [node_spec(1), node_spec(1)]
    with pytest.raises(ConfigInvalid, match="node-01"):
        add_nodes(db, HandClock(), twice)


def test_an_added_node_joins_and_is_announced(db: Database) -> None:
    new_cell(db, HandClock(), nodes=2)
    version = db.read_now(map_rows.read_version)
    add_nodes(db, HandClock(), [node_spec(3, rack="r2", host="h7", weight=2.5)])
    (added,) = db.read_now(lambda c: map_rows.read_nodes(c, version))
    assert (added.rack, added.host, added.weight) == ("r2", "h7", 2.5)
    assert added.state is NodeState.JOINING


def test_two_nodes_cannot_share_a_store(db: Database) -> None:
    spec = node_spec(1)
    twin = type(spec)(node_spec(2).node_id, spec.store_id, "/other", "h", "r")
    with pytest.raises(ConfigInvalid, match="store"):
        create_cell(db, HandClock(), CLUSTER_ID, RS, [spec, twin])
    assert open_cell(db) is None


def test_a_cold_start_forgets_where_nodes_were_and_trusts_none_of_them(tmp_path: Path) -> None:
    db, clock = empty_database(tmp_path), HandClock()
    new_cell(db, clock)
    Rows(db).register_all()
    mark_stopped(db, clock)
    mark_stopped(db, clock)
    cell = open_cell(db)
    assert cell is not None
    assert {(node.endpoint, node.pid) for node in cell.nodes} == {("", 0)}
    assert not any(node.serves_reads or node.takes_writes for node in cell.nodes)
    assert {node.incarnation for node in cell.nodes} == {1}
    db.close()
