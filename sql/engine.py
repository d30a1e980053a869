"""SQLAlchemy engines with the settings durability needs, for SQLite and PostgreSQL."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.pool import StaticPool

BUSY_TIMEOUT_MS = 10_000
"""How long SQLite waits for another process's write before it answers `locked`."""

PAGE_CACHE_KIB = 16 * 1024
"""SQLite page cache of one connection."""


class Engines(NamedTuple):
    """Separate engines, so that readers cannot write and the writer takes its lock at BEGIN."""

    writer: Engine
    reader: Engine


def sqlite_url(path: Path) -> str:
    """URL of a SQLite file."""
    return f"sqlite:///{path}"


def make_engines(url: str, *, inline: bool) -> Engines:
    """Engines for a database URL.  An inline SQLite memory database is one shared connection."""
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        engine = create_engine(parsed, pool_pre_ping=True)
        return Engines(engine, engine)
    if parsed.database in (None, "", ":memory:"):
        assert inline, "a memory database has one connection and so cannot have reader threads"
        memory = create_engine(
            parsed, poolclass=StaticPool, connect_args={"check_same_thread": False}
        )
        _set_up_sqlite(memory, begin="BEGIN", read_only=False)
        return Engines(memory, memory)
    writer = create_engine(parsed, connect_args={"check_same_thread": False})
    reader = create_engine(parsed, connect_args={"check_same_thread": False}, pool_size=8)
    _set_up_sqlite(writer, begin="BEGIN IMMEDIATE", read_only=False)
    _set_up_sqlite(reader, begin="BEGIN", read_only=True)
    return Engines(writer, reader)


def _set_up_sqlite(engine: Engine, *, begin: str, read_only: bool) -> None:
    """WAL with a sync at every COMMIT: NORMAL loses acknowledged commits at a power cut."""

    def on_connect(dbapi_connection: Any, _record: Any) -> None:
        dbapi_connection.isolation_level = None  # transactions are ours, not the driver's
        cursor = dbapi_connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        if not read_only:
            cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.execute(f"PRAGMA cache_size = -{PAGE_CACHE_KIB}")
        cursor.execute("PRAGMA temp_store = MEMORY")
        if read_only:
            cursor.execute("PRAGMA query_only = ON")
        cursor.close()

    def on_begin(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    event.listen(engine, "connect", on_connect)
    event.listen(engine, "begin", on_begin)
