"""The database wrapper: group commit, isolation of failures, durability settings."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
from sqlalchemy import Connection, text

from protocol.errors import DatabaseBusy
from sql.database import Database
from sql.engine import sqlite_url


@pytest.fixture
def database(tmp_path: Path):
    database = Database(sqlite_url(tmp_path / "test.db"))
    database.transact(lambda c: c.execute(text("CREATE TABLE t (k INTEGER PRIMARY KEY, v TEXT)")))
    yield database
    database.close()


def _insert(key: int):
    def work(connection: Connection) -> int:
        connection.execute(text("INSERT INTO t VALUES (:k, 'x')"), {"k": key})
        return key

    return work


def _count(connection: Connection) -> int:
    return connection.execute(text("SELECT count(*) FROM t")).scalar_one()


async def test_concurrent_writes_share_transactions(database: Database) -> None:
    before = database.stats()
    results = await asyncio.gather(*(database.write(_insert(i)) for i in range(500)))
    after = database.stats()
    assert results == list(range(500))
    assert await database.read(_count) == 500
    assert after.works - before.works == 500
    assert after.transactions - before.transactions < 250


async def test_a_failing_write_hurts_only_its_caller(database: Database) -> None:
    gate = threading.Event()

    def hold(connection: Connection) -> None:
        gate.wait(10)

    held = asyncio.ensure_future(database.write(hold))
    await asyncio.sleep(0)

    def fail(connection: Connection) -> None:
        connection.execute(text("INSERT INTO t VALUES (1000, 'never')"))
        raise KeyError("mine alone")

    tasks = [asyncio.ensure_future(database.write(_insert(i))) for i in range(5)]
    bad = asyncio.ensure_future(database.write(fail))
    tasks += [asyncio.ensure_future(database.write(_insert(i))) for i in range(5, 10)]
    await asyncio.sleep(0)
    gate.set()
    await held
    with pytest.raises(KeyError):
        await bad
    assert await asyncio.gather(*tasks) == list(range(10))
    assert await database.read(_count) == 10


async def test_a_write_is_on_disk_when_it_is_answered(database: Database, tmp_path: Path) -> None:
    await database.write(_insert(7))
    other = Database(sqlite_url(tmp_path / "test.db"))
    assert other.read_now(_count) == 1
    other.close()


def test_sqlite_syncs_at_every_commit(database: Database) -> None:
    def pragmas(connection: Connection) -> tuple[object, object, object]:
        def ask(name: str) -> object:
            return connection.exec_driver_sql(f"PRAGMA {name}").scalar()

        return ask("synchronous"), ask("journal_mode"), ask("foreign_keys")

    full = 2
    assert database.transact(pragmas) == (full, "wal", 1)


async def test_readers_cannot_write(database: Database) -> None:
    with pytest.raises(DatabaseBusy, match="readonly"):
        await database.read(_insert(1))


def test_a_locked_database_is_reported_as_busy(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("sql.engine.BUSY_TIMEOUT_MS", 1)
    first = Database(sqlite_url(tmp_path / "busy.db"))
    second = Database(sqlite_url(tmp_path / "busy.db"))
    first.transact(lambda c: c.execute(text("CREATE TABLE t (k INTEGER PRIMARY KEY, v TEXT)")))

    def nested(_connection: Connection) -> None:
        second.transact(_insert(1))

    with pytest.raises(DatabaseBusy, match="nothing was committed"):
        first.transact(nested)
    first.close()
    second.close()


async def test_an_inline_database_needs_no_threads() -> None:
    before = threading.active_count()
    database = Database("sqlite://", inline=True)
    database.transact(lambda c: c.execute(text("CREATE TABLE t (k INTEGER PRIMARY KEY, v TEXT)")))
    await database.write(_insert(1))
    assert await database.read(_count) == 1
    assert threading.active_count() == before
    database.close()


async def test_close_finishes_waiting_writes(tmp_path: Path) -> None:
    database = Database(sqlite_url(tmp_path / "close.db"))
    database.transact(lambda c: c.execute(text("CREATE TABLE t (k INTEGER PRIMARY KEY, v TEXT)")))
    tasks = [asyncio.ensure_future(database.write(_insert(i))) for i in range(50)]
    await asyncio.sleep(0)
    await database.aclose()
    assert await asyncio.gather(*tasks) == list(range(50))
    again = Database(sqlite_url(tmp_path / "close.db"))
    assert again.read_now(_count) == 50
    again.close()
