"""The schema: migrations make what the code declares, and look-ups stay look-ups."""

from __future__ import annotations

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from metadata_store import MetadataStore, block
from sqlalchemy import Connection, event

from metadata import schema
from metadata.changes import CommitRequest
from metadata.migrate import prepare_schema


@pytest.fixture
def store():
    store = MetadataStore()
    yield store
    store.close()


def test_migrations_make_exactly_the_declared_schema(store: MetadataStore) -> None:
    def differences(connection: Connection) -> list[object]:
        return list(compare_metadata(MigrationContext.configure(connection), schema.metadata))

    def tables(connection: Connection) -> set[str]:
        rows = connection.exec_driver_sql("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")
        return {
            " ".join(sql.split()) for (sql,) in rows if "alembic" not in sql and "CREATE" in sql
        }

    assert store.database.read_now(differences) == []
    migrated = store.database.read_now(tables)

    def declare(connection: Connection) -> set[str]:
        for name in ("journal", "namespace_blocks", "versions", "entries", "namespaces"):
            connection.exec_driver_sql(f"DROP TABLE {name}")
        connection.exec_driver_sql("DROP TABLE tokens")
        connection.exec_driver_sql("DROP TABLE accounts")
        schema.metadata.create_all(connection)
        return tables(connection)

    assert _sorted_columns(store.database.transact(declare)) == _sorted_columns(migrated)


def _sorted_columns(statements: set[str]) -> set[tuple[str, ...]]:
    """Statements whose constraints may come in any order."""
    return {tuple(sorted(sql.replace("(", ",").replace(")", ",").split(","))) for sql in statements}


def test_preparing_twice_changes_nothing(store: MetadataStore) -> None:
    prepare_schema(store.database)


async def test_no_query_of_a_request_scans_a_table(store: MetadataStore) -> None:
    """Each statement that requests run is explained; only small helpers may be scanned."""
    account = await store.open()
    token = await store.accounts.issue_token(account, "t")
    seen: list[tuple[str, object]] = []

    def note(_c: object, _cur: object, statement: str, parameters: object, *_rest: object) -> None:
        if statement.lstrip().split()[0] in ("SELECT", "WITH", "UPDATE", "INSERT"):
            seen.append((statement, parameters))

    engine = store.database._writer_engine
    event.listen(engine, "before_cursor_execute", note)
    requests = [CommitRequest(path=f"/d{i}/f", size=1, mtime=1.0, content=b"x") for i in range(3)]
    await store.tree.commit_many(account, requests, frozenset())
    one = await store.tree.entry(account, "/d1/f")
    await store.tree.commit(
        account,
        CommitRequest(path="/d1/f", size=1, mtime=1.0, content=b"y", parent_rev=one.rev),
        frozenset(),
    )
    await store.accounts.authenticate(token)
    await store.tree.list_folder(account, "/", limit=2, recursive=True)
    await store.tree.references(account, [block(1)])
    await store.tree.delete(account, "/d1")
    event.remove(engine, "before_cursor_execute", note)
    assert len(seen) > 15

    def explain(connection: Connection) -> list[str]:
        plans = []
        for statement, parameters in seen:
            one = parameters[0] if isinstance(parameters, list) else parameters
            rows = connection.exec_driver_sql("EXPLAIN QUERY PLAN " + statement, one)
            plans += [f"{row[3]} -- {statement}" for row in rows]
        return plans

    small = ("SCAN walk", "SCAN w ", "SCAN subtree", "SCAN high", "SCAN low", "SCAN CONSTANT")
    scans = [plan for plan in store.database.read_now(explain) if plan.startswith("SCAN")]
    assert [plan for plan in scans if not plan.startswith(small) and "CONSTANT" not in plan] == []
